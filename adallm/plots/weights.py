"""What a number format does to weights: its values, one block, and the error by source, layer, block and scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from adallm import results
from adallm.plots.style import COLORS, GREY, MARKERS, STYLE, TITLES, look, new_figure, source_of, write_source

SOURCES = {
    "gaussian": "Gaussian",
    "laplace": "Laplace",
    "student-t4": "Student t, 4 d.o.f.",
    "outliers": "Gaussian with\noutlier columns",
    "tiny": "bundled model,\nall layers",
}
SCALES = {"fp32": "FP32 (exact)", "e4m3": "E4M3 and a global scale", "e8m0": "E8M0 (powers of two)"}
_LAYER = "tiny.layers."
_STORED = (None, "max")  # rules of the formats as they are commonly stored
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Where E2M1 under a scale format in blocks of some size is a format with a name.
_NAMED = {("e4m3", 16): "nvfp4", ("e8m0", 32): "mxfp4"}


def grids(e2m1: Sequence[float], e4m3: Sequence[float], e8m0: Sequence[float]) -> Any:
    """All values of E2M1 with the points where rounding changes, and the positive ones of the two scale formats."""
    values = sorted(set(e2m1))
    positive = sorted(v for v in e4m3 if v > 0)
    with matplotlib.rc_context(STYLE):
        figure, (top, bottom) = new_figure(2, 1, size=(7.0, 3.4), height_ratios=(1, 1.6))
        middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
        top.vlines(middles, -0.5, 0.5, color=GREY, linewidth=0.8, linestyle=":", label="rounding changes here")
        top.plot(values, [0] * len(values), "o", color=COLORS[0], label="value")
        top.set_xticks(values, [f"{v:g}" for v in values], fontsize=8)
        top.set_title(f"E2M1: {len(values)} values (0 and -0 are one)")
        top.legend(loc="lower center", bbox_to_anchor=(0.78, 0.98), ncols=2, borderaxespad=0)

        normal = [v for v in positive if v >= 2.0**-6]
        lines = {
            "E4M3\nsubnormal": [v for v in positive if v < 2.0**-6],
            "E4M3\nnormal": normal,
            "E8M0": [v for v in e8m0 if positive[0] <= v <= positive[-1]],
        }
        for y, (points, color) in enumerate(zip(lines.values(), (COLORS[5], COLORS[0], COLORS[2]), strict=True)):
            bottom.plot(points, [y] * len(points), "|", color=color, markersize=14)
        bottom.set_xscale("log", base=2)
        bottom.set_yticks(range(len(lines)), lines)
        bottom.set_ylim(-0.6, len(lines) - 0.4)
        bottom.set_xlabel("value")
        bottom.set_title(
            f"Scales: {len(positive)} positive E4M3 values up to {positive[-1]:g}; E8M0 goes on to both sides"
        )
        for axes in (top, bottom):
            axes.grid(axis="y", visible=False)
        top.set_yticks([])
        top.spines["left"].set_visible(False)
        write_source(figure, "computed from the definitions of the formats")
    return figure


def block(
    weights: Sequence[float], quantized: Sequence[float], grid: Mapping[float, str], *, title: str, source: str
) -> Any:
    """One block: its weights, the values that the format has for it as lines, and where each weight went.

    Args:
        weights: as they were.
        quantized: as they are after quantizing and dequantizing.
        grid: every value that the block's scale allows, with the name of its code.
        title: above the figure.
        source: under the figure.
    """
    at = range(len(weights))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(7.5, 4.2))
        axes.grid(visible=False)
        axes.hlines(list(grid), -0.6, len(weights) - 0.4, color="#BBBBBB", linewidth=0.7, label="can be stored")
        axes.vlines(at, weights, quantized, color=COLORS[5], linewidth=2, label="error")
        axes.plot(at, quantized, "_", color=COLORS[0], markersize=13, markeredgewidth=2.5, label="quantized")
        axes.plot(at, weights, "o", color="black", markerfacecolor="white", markersize=4.5, label="weight")
        axes.set_xticks(at)
        axes.set_xlim(-0.6, len(weights) - 0.4)
        axes.set_xlabel("column in the block")
        axes.set_ylabel("value")
        axes.set_title(title)
        names = axes.secondary_yaxis("right")
        names.set_yticks(list(grid), list(grid.values()), fontsize=6.5)
        names.set_ylabel("E2M1 value")
        figure.legend(loc="outside upper right", ncols=4)
        write_source(figure, source)
    return figure


def sqnr(record: Mapping[str, Any]) -> Any:
    """SQNR in dB, a group of bars for each source, a bar for each format."""
    record = results.select(record, rule=_STORED)
    formats = _formats(record)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(7.5, 3.6))
        width = 0.8 / len(formats)
        for i, name in enumerate(formats):
            rows = [_row(record, source, name) for source in SOURCES]
            color, hatch, _ = look(name)
            bars = axes.bar(
                [group + (i - (len(formats) - 1) / 2) * width for group in range(len(rows))],
                [row["sqnr_db"] for row in rows],
                width,
                yerr=[20 / math.log(10) * (row["stderr"] or 0) / row["rel_sq_err"] for row in rows],
                color=color,
                hatch=hatch,
                edgecolor="white",
                label=f"{TITLES[name]}, {rows[0]['bits_per_weight']:.4g} bits",
            )
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axes.set_xticks(range(len(SOURCES)), SOURCES.values())
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("SQNR, dB (higher is better)")
        axes.set_title("Signal to quantization noise by format")
        figure.legend(loc="outside upper right", ncols=len(formats))
        write_source(figure, f"bars: 2 standard errors over matrices, hardly visible; {source_of(record)}")
    return figure


def sqnr_by_layer(record: Mapping[str, Any]) -> Any:
    """SQNR in dB of each layer of the bundled model: one map for each format of 4 bits, all on one scale."""
    record = results.select(record, rule=_STORED)
    rows = [row for row in record["rows"] if row["source"].startswith(_LAYER)]
    names = [name for name in _formats(record) if name != "fp8"]
    value = {}
    for row in rows:
        layer, *_, module = row["source"].removeprefix(_LAYER).split(".")
        value[row["format"], layer, module] = row["sqnr_db"]
    layers = sorted({layer for _, layer, _ in value}, key=int)
    modules = [module for module in _MODULES if (names[0], layers[0], module) in value]
    low, high = (f(v for (name, *_), v in value.items() if name in names) for f in (min, max))
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, panels = new_figure(1, len(names), size=(8.5, 3.2), sharey=True)
        for axes, name in zip(panels, names, strict=True):
            grid = [[value[name, layer, module] for module in modules] for layer in layers]
            image = axes.imshow(grid, vmin=low, vmax=high, cmap="cividis", aspect="auto")
            for y, line in enumerate(grid):
                for x, db in enumerate(line):
                    dark = db < (low + high) / 2
                    axes.text(x, y, f"{db:.1f}", ha="center", va="center", size=6.5, color="white" if dark else "black")
            axes.set_xticks(range(len(modules)), modules, rotation=60, ha="right")
            axes.set_yticks(range(len(layers)), layers)
            axes.set_title(TITLES[name])
        panels[0].set_ylabel("decoder layer")
        figure.colorbar(image, ax=panels, label="SQNR, dB", pad=0.02)
        write_source(figure, record)
    return figure


def block_sizes(
    record: Mapping[str, Any], sources: Sequence[str] = ("gaussian", "student-t4", "outliers", "tiny")
) -> Any:
    """SQNR of E2M1 against the block size, a line for each scale format, a panel for each source."""
    lines = (("black", "o--"), (COLORS[1], "o-"), (COLORS[4], "o-"))
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(1, len(sources), size=(8.5, 3.2), sharey=True, squeeze=False)
        for axes, source in zip(panels[0], sources, strict=True):
            value = {(row["scale_format"], row["block"]): row["sqnr_db"] for row in _sweep(record, source)}
            for (scale, label), (color, style) in zip(SCALES.items(), lines, strict=True):
                points = [(size, db) for (form, size), db in value.items() if form == scale]
                axes.plot(*zip(*points, strict=True), style, markersize=3, color=color, label=label)
            for (scale, size), name in _NAMED.items():
                color, _, marker = look(name)
                axes.plot(size, value[scale, size], marker, color=color, markersize=8, label=TITLES[name])
            blocks = sorted({size for _, size in value})
            axes.set_xscale("log", base=2)
            axes.set_xticks(blocks, [str(b) for b in blocks])
            axes.minorticks_off()
            axes.set_xlabel("weights that share a scale")
            axes.set_title(SOURCES[source], fontsize=9)
        panels[0][0].set_ylabel("SQNR of E2M1, dB")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
        write_source(figure, record)
    return figure


def scale_formats(record: Mapping[str, Any]) -> Any:
    """Squared error of E2M1 above that with an exact FP32 scale, in percent, for blocks of 16 and of 32."""
    bars = list(itertools.product((16, 32), ("e4m3", "e8m0")))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(7.5, 3.4))
        width = 0.8 / len(bars)
        for i, (size, scale) in enumerate(bars):
            above = [100 * (_error(record, s, scale, size) / _error(record, s, "fp32", size) - 1) for s in SOURCES]
            name = _NAMED.get((scale, size))
            color, hatch, _ = look(name) if name else (("#888888", "", "") if size == 16 else ("#BBBBBB", "||", ""))
            drawn = axes.bar(
                [group + (i - (len(bars) - 1) / 2) * width for group in range(len(SOURCES))],
                above,
                width,
                color=color,
                hatch=hatch,
                edgecolor="white",
                label=f"{scale.upper()}, block {size}" + (f" = {TITLES[name]}" if name else ""),
            )
            axes.bar_label(drawn, fmt="%.0f", fontsize=7, padding=2)
        axes.set_xticks(range(len(SOURCES)), SOURCES.values())
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("squared error above that of\nan exact scale, %")
        axes.set_title("What it costs to store the scale in 8 bits")
        figure.legend(loc="outside upper right", ncols=len(bars))
        write_source(figure, record)
    return figure


def global_scales(record: Mapping[str, Any]) -> Any:
    """Squared error of NVFP4 over that of the max rule against the global scale over the max rule's, by source."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(7.5, 3.4))
        for i, (source, title) in enumerate(SOURCES.items()):
            points = [(r["log2_factor"], r["vs_max"]) for r in record["rows"] if r["source"] == source]
            look = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 4, "linewidth": 1}
            axes.plot(*zip(*points, strict=True), label=title.replace("\n", " "), **look)
        exponents = sorted({row["log2_factor"] for row in record["rows"]})
        ticks = [e for e in exponents if e % 4 == 0]
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate("max rule", (0, 1), xytext=(4, -12), textcoords="offset points", fontsize=8)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.6)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(ticks, [f"$2^{{{e}}}$" for e in ticks])
        axes.set_xlabel("global scale over that of the max rule")
        axes.set_ylabel("squared error over\nthat of the max rule")
        axes.set_title("NVFP4 under other global scales")
        figure.legend(loc="outside upper right", ncols=len(SOURCES), fontsize=8)
        write_source(figure, record)
    return figure


def _formats(record: Mapping[str, Any]) -> list[str]:
    """Those with a title, in the record's order; the sweep over blocks and scales is none."""
    return [name for name in dict.fromkeys(row["format"] for row in record["rows"]) if name in TITLES]


def _row(record: Mapping[str, Any], source: str, name: str) -> Mapping[str, Any]:
    found = [row for row in record["rows"] if row["source"] == source and row["format"] == name]
    if not found:
        raise ValueError(f"the record has no row of source {source!r} and format {name!r}")
    return found[0]


def _sweep(record: Mapping[str, Any], source: str) -> list[Mapping[str, Any]]:
    return [row for row in record["rows"] if row["source"] == source and row["format"] == "e2m1"]


def _error(record: Mapping[str, Any], source: str, scale: str, size: int) -> float:
    [row] = [r for r in _sweep(record, source) if r["scale_format"] == scale and r["block"] == size]
    return row["rel_sq_err"]
