"""The KV cache: what it takes, what a card holds beside the weights, and what eight bits do to attention and loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from adallm import results
from adallm.plots.style import COLORS, GREY, HATCHES, MARKERS, STYLE, new_figure, source_of, write_source

_COMPUTED = "computed from config.json and data sheets, measured on no card"
_TITLES = {"bf16": "BF16", "fp8": "FP8", "nvfp4": "NVFP4"}
# A cache has one look in all of these; FP8 by its scales where they matter.
_PLACE = {"bf16": 0, "fp8": 1, "fp8-one": 1, "fp8-calibrated": 2, "fp8-token": 3, "nvfp4": 4}
_KIB, _GIB = 1 << 10, 1 << 30


def _look(cache: str) -> tuple[str, str, str]:
    i = _PLACE[cache]
    return COLORS[i], HATCHES[i], MARKERS[i]


def kv_bytes(of_token: Sequence[Mapping[str, Any]], by_context: Sequence[Mapping[str, Any]]) -> Any:
    """KiB of a token by model and cache, and GiB of a BF16 sequence against its length, a line for each model.

    Args:
        of_token: rows ``model``, ``cache``, ``bytes``.
        by_context: rows ``model``, ``cache``, ``tokens``, ``bytes``.
    """
    models = list(dict.fromkeys(row["model"] for row in of_token))
    size = {(row["model"], row["cache"]): row["bytes"] / _KIB for row in of_token}
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(1, 2, size=(8.5, 3.8))
        width = 0.84 / len(_TITLES)
        for i, (cache, title) in enumerate(_TITLES.items()):
            color, hatch, _ = _look(cache)
            at = [y + (i - (len(_TITLES) - 1) / 2) * width for y in range(len(models))]
            values = [size[model, cache] for model in models]
            bars = left.barh(at, values, width, color=color, hatch=hatch, edgecolor="white", label=title)
            left.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        left.set_yticks(range(len(models)), models)
        left.invert_yaxis()
        left.margins(x=0.1)
        left.grid(axis="y", visible=False)
        left.set_xlabel("KiB for a token, all layers")
        left.set_title("One token")
        left.legend(loc="lower left", bbox_to_anchor=(0.32, 1.0), ncols=len(_TITLES), borderaxespad=0.2, fontsize=8)
        for i, model in enumerate(models):
            points = [
                (r["tokens"], r["bytes"] / _GIB) for r in by_context if (r["model"], r["cache"]) == (model, "bf16")
            ]
            right.plot(*zip(*points, strict=True), color=COLORS[i], marker=MARKERS[i], markersize=4, label=model)
        ticks = [512, 2048, 8192, 32768, 131072]
        right.set_xscale("log", base=2)
        right.set_yscale("log", base=2)
        right.set_xticks(ticks, [f"{n // 1024} K" if n >= 1024 else str(n) for n in ticks])
        right.yaxis.set_major_formatter("{x:.2g}")
        right.minorticks_off()
        right.set_xlabel("tokens of the sequence")
        right.set_ylabel("GiB of a BF16 cache")
        right.set_title("One sequence, up to the model's positions")
        right.legend(fontsize=8)
        write_source(figure, _COMPUTED)
    return figure


def kv_fits(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The longest context and the largest batch: a map for each card, of models and of weights with a cache.

    Args:
        rows: ``gpu``, ``model``, ``weights``, ``cache``, ``context``, ``bound``, ``batch``, ``tokens``.
    """
    gpus, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("gpu", "model"))
    shown = [("bf16", "bf16"), *(("nvfp4", cache) for cache in _TITLES)]
    of = {(row["gpu"], row["model"], row["weights"], row["cache"]): row for row in rows}
    low, high = 10, 17  # powers of two, of the colours
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, panels = new_figure(1, len(gpus), size=(8.5, 4.2), sharey=True, squeeze=False)
        for axes, gpu in zip(panels[0], gpus, strict=True):
            cells = [[of[gpu, model, *pair] for pair in shown] for model in models]
            shade = [[math.log2(c["context"]) if c["context"] else math.nan for c in line] for line in cells]
            axes.imshow(shade, vmin=low, vmax=high, cmap="cividis", aspect="auto")
            for y, line in enumerate(cells):
                for x, cell in enumerate(line):
                    dark = cell["context"] and shade[y][x] < (low + high) / 2
                    color = "white" if dark else "black" if cell["context"] else GREY
                    axes.text(x, y, _said(cell), ha="center", va="center", fontsize=7, color=color)
            names = [f"{_TITLES[weights]}\n{_TITLES[cache]}" for weights, cache in shown]
            axes.set_xticks(range(len(shown)), names, fontsize=7)
            axes.set_xlabel("weights, and cache below", fontsize=7)
            axes.set_title(gpu)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        panels[0][0].set_yticks(range(len(models)), models)
        note = (
            f"K: 1,024 tokens of one sequence; x: sequences of {rows[0]['tokens']:,} tokens; *: the model's positions"
        )
        write_source(figure, f"{note}; {_COMPUTED}")
    return figure


def _said(cell: Mapping[str, Any]) -> str:
    if cell["bound"] == "weights":
        return "weights\ndo not fit"
    context = f"{cell['context'] / 1024:.3g} K" if cell["context"] >= 1024 else str(cell["context"])
    return f"{context}{'*' if cell['bound'] == 'positions' else ''}\nx {cell['batch']}"


def kv_magnitudes(record: Mapping[str, Any]) -> Any:
    """Relative error of attention's output against the magnitude of keys and values, a line for each cache."""
    rows = results.select(record, part=("magnitude",))["rows"]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(7.5, 3.8))
        for cache, title in {row["cache"]: row["title"] for row in rows}.items():
            color, _, marker = _look(cache)
            points = [(2.0 ** row["log2_std"], row["rel_err"]) for row in rows if row["cache"] == cache]
            # FP8's lines lie on each other where all is well.
            hollow = {"markerfacecolor": "none"} if cache == "fp8-token" else {}
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=title, **hollow)
        for value, what in ((2.0**-6, "E4M3's smallest\nnormal number"), (448.0, "E4M3's\nlargest: 448")):
            axes.axvline(value, color=GREY, linewidth=0.8, linestyle=":")
            axes.annotate(
                what, (value, 1.6), xytext=(-3, 0), textcoords="offset points", ha="right", va="top", fontsize=7
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(top=2)
        axes.set_xlabel("standard deviation of keys and values")
        axes.set_ylabel("relative error of the output")
        axes.set_title("Attention by cache: Gaussian keys and values")
        figure.legend(loc="outside upper right", ncols=5, fontsize=8)
        write_source(figure, record)
    return figure


def kv_model(record: Mapping[str, Any]) -> Any:
    """The bundled model: relative error of attention by layer, and bits per byte above those of a BF16 cache."""
    layers = results.select(record, part=("layer",))["rows"]
    losses = [row for row in results.select(record, part=("perplexity",))["rows"] if row["cache"] != "bf16"]
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(1, 2, size=(8.5, 3.6))
        for cache, title in {row["cache"]: row["title"] for row in layers}.items():
            color, _, marker = _look(cache)
            of = [row for row in layers if row["cache"] == cache]
            left.errorbar(
                [row["layer"] for row in of],
                [row["rel_err"] for row in of],
                [2 * row["rel_err_stderr"] for row in of],
                color=color,
                marker=marker,
                markersize=5,
                capsize=2,
                label=title,
            )
        left.set_yscale("log")
        left.set_xlabel("decoder layer")
        left.set_ylabel("relative error of attention's output")
        left.set_title("Held-out text")
        for y, row in enumerate(losses):
            color, hatch, _ = _look(row["cache"])
            error = {"ecolor": "#333333", "capsize": 3}
            right.barh(
                y,
                row["delta"],
                0.6,
                xerr=2 * row["delta_stderr"],
                color=color,
                hatch=hatch,
                edgecolor="white",
                error_kw=error,
            )
        right.axvline(0, color=GREY, linewidth=0.8)
        right.set_yticks(range(len(losses)), [row["title"].replace(", ", ",\n") for row in losses])
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
        right.locator_params(axis="x", nbins=5)
        right.set_xlabel("bits per byte above a BF16 cache")
        right.set_title("Loss, NVFP4 weights")
        figure.legend(loc="outside upper center", ncols=5, fontsize=8)
        write_source(figure, f"bars: 2 standard errors; {source_of(record)}")
    return figure
