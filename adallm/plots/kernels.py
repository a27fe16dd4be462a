"""Kernels side by side: linear layers and decode attention. All times are measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib

from adallm.plots.style import COLORS, GREY, MARKERS, STYLE, new_figure, write_source

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


def decode_attention(record: Mapping[str, Any], *, heads: str = "32/8/128", block: int = 16) -> Any:
    """TB/s at which keys and values are read, by batch and context, a point for each implementation."""
    rows = [r for r in record["rows"] if r.get("heads") == heads and r.get("block") == block and r["impl"] in ATTENTION]
    if not rows:
        raise ValueError(f"the record has no row of heads {heads!r} and block {block}")
    steps = list(dict.fromkeys((r["batch"], r["context"], r["ragged"]) for r in rows))
    [read] = [r["tb_s"] for r in record["rows"] if r["impl"] == "read"]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(8.0, 3.8))
        for i, (impl, title) in enumerate(ATTENTION.items()):
            of = {(r["batch"], r["context"], r["ragged"]): r["tb_s"] for r in rows if r["impl"] == impl}
            points = [(steps.index(step), value) for step, value in of.items()]
            filled = COLORS[i] if impl != "fa3-fp8" else "white"
            axes.plot(
                *zip(*points, strict=True),
                MARKERS[i],
                linestyle=":",
                linewidth=0.8,
                color=COLORS[i],
                markerfacecolor=filled,
                label=title,
            )
        axes.axhline(read, color=GREY, linewidth=0.8, linestyle="--", label="reading alone")
        axes.set_xticks(range(len(steps)), [_step(*step) for step in steps], rotation=45, ha="right")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("sequences x context")
        axes.set_ylabel("keys and values read, TB/s")
        axes.set_title(f"Decode attention over an FP8 cache: heads {heads}, blocks of {block}")
        figure.legend(loc="outside upper right", ncols=len(ATTENTION) + 1, fontsize=8)
        write_source(figure, record)
    return figure


def _speedup(us: Mapping[str, float], peers: tuple[str, ...]) -> float:
    ours, theirs = ([us[impl] for impl in impls if impl in us] for impls in (OURS, peers))
    return min(theirs) / min(ours) if ours and theirs else math.nan


def _step(batch: int, context: int, ragged: bool) -> str:
    size = f"{context // 1024} K" if context % 1024 == 0 else str(context)
    return f"{batch} x {'up to ' if ragged else ''}{size}"
