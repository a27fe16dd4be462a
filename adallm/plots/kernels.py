"""Kernels side by side: linear layers and decode attention. All times are measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from adallm.plots.style import COLORS, GREY, MARKERS, STYLE, new_figure, source_of, write_source

OURS = ("adallm-w4a16", "adallm-w4a8")
AGAINST = {"the best W4 peer": ("marlin", "humming"), "cuBLAS BF16": ("cublas-bf16",)}
ATTENTION = {
    "adallm": "AdaLLM",
    "flashinfer": "FlashInfer",
    "vllm-triton": "vLLM Triton",
    "fa3-fp8": "FA3 FP8, Hopper only",
}


def linear_speedup(record: Mapping[str, Any]) -> Any:
    """Time of a peer over that of the better of ours, a cell for each layer and number of tokens; a map a peer."""
    us: dict[tuple[str, int], dict[str, float]] = {}
    for row in record["rows"]:
        if row.get("shape") is not None:
            us.setdefault((row["shape"], row["m"]), {})[row["impl"]] = row["us"]
    layers, tokens = list(dict.fromkeys(layer for layer, _ in us)), sorted({m for _, m in us})
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, panels = new_figure(len(AGAINST), 1, size=(9.0, 6.6), sharex=True)
        for axes, (name, peers) in zip(panels, AGAINST.items(), strict=True):
            grid = [[_speedup(us.get((layer, m), {}), peers) for m in tokens] for layer in layers]
            # White where both take as long; a factor and its inverse are as dark.
            image = axes.imshow(
                [[math.log2(v) for v in line] for line in grid], vmin=-1.5, vmax=1.5, cmap="PuOr", aspect="auto"
            )
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    if not math.isnan(value):
                        color = "white" if abs(math.log2(value)) > 1 else "black"
                        axes.text(x, y, f"{value:.2f}", ha="center", va="center", size=6.5, color=color)
            axes.set_yticks(range(len(layers)), layers, fontsize=8)
            axes.set_title(f"Time of {name} over ours, the better of W4A16 and W4A8")
        panels[-1].set_xticks(range(len(tokens)), [str(m) for m in tokens])
        panels[-1].set_xlabel("tokens M")
        bar = figure.colorbar(image, ax=panels, pad=0.02, ticks=[-1, 0, 1])
        bar.ax.set_yticklabels(["0.5", "1", "2"])
        bar.set_label("times as long")
        write_source(figure, record)
    return figure


def decode_attention(record: Mapping[str, Any], *, heads: Sequence[str] | None = None, block: int = 16) -> Any:
    """TB/s at which keys and values are read, by batch and context, a point for each implementation.

    Args:
        heads: a panel for each, ``"<query heads>/<KV heads>/<head size>"``; None for all that the record has.
        block: tokens of a block of the cache.

    Raises:
        ValueError: the record has none of these heads, or not with this block.
    """
    rows = [r for r in record["rows"] if r.get("block") == block and r["impl"] in ATTENTION and r.get("heads")]
    heads = list(dict.fromkeys(r["heads"] for r in rows)) if heads is None else heads
    if missing := [h for h in heads if h not in {r["heads"] for r in rows}]:
        raise ValueError(f"the record has no row of heads {missing[0]!r} and block {block}")
    steps = list(dict.fromkeys((r["batch"], r["context"], r["ragged"]) for r in rows))
    [read] = [r["tb_s"] for r in record["rows"] if r["impl"] == "read"]
    columns = min(len(heads), 2)
    lines = -(-len(heads) // columns)
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(
            lines, columns, size=(4.7 * columns, 2.4 * lines + 1.2), sharex=True, sharey=True, squeeze=False
        )
        for axes, of_heads in zip(panels.flat, heads, strict=False):
            _panel(axes, [r for r in rows if r["heads"] == of_heads], steps)
            axes.axhline(read, color=GREY, linewidth=0.8, linestyle="--", label="reading alone")
            axes.set_xticks(range(len(steps)), [_step(*step) for step in steps], rotation=45, ha="right", fontsize=8)
            axes.set_ylim(bottom=0)
        for axes in panels[-1]:
            axes.set_xlabel("sequences x context")
        for axes in panels[:, 0]:
            axes.set_ylabel("keys and values read, TB/s", fontsize=8)
        entries = panels[0, 0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside upper right", ncols=len(ATTENTION) + 1, fontsize=8)
        write_source(figure, f"FP8 cache, blocks of {block}; {source_of(record)}")
    return figure


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], steps: Sequence[tuple[int, int, bool]]) -> None:
    for i, (impl, title) in enumerate(ATTENTION.items()):
        of = {(r["batch"], r["context"], r["ragged"]): r["tb_s"] for r in rows if r["impl"] == impl}
        points = [(steps.index(step), value) for step, value in of.items()]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            MARKERS[i],
            linestyle=":",
            linewidth=0.8,
            color=COLORS[i],
            markerfacecolor=COLORS[i] if impl != "fa3-fp8" else "white",
            markersize=5,
            label=title,
        )
    q_heads, kv_heads, size = rows[0]["heads"].split("/")
    window = f", window {rows[0]['window']:,}" if rows[0]["window"] else ""
    axes.set_title(f"{q_heads} query, {kv_heads} KV heads of {size}{window}")


def _speedup(us: Mapping[str, float], peers: tuple[str, ...]) -> float:
    ours, theirs = ([us[impl] for impl in impls if impl in us] for impls in (OURS, peers))
    return min(theirs) / min(ours) if ours and theirs else math.nan


def _step(batch: int, context: int, ragged: bool) -> str:
    size = f"{context // 1024} K" if context % 1024 == 0 else str(context)
    return f"{batch} x {'up to ' if ragged else ''}{size}"
