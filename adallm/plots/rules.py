"""What the choice of scales changes in NVFP4: error of weights and outputs, and perplexity, by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from adallm import results
from adallm.plots.style import COLORS, GREY, HATCHES, MARKERS, STYLE, new_figure, source_of, write_source
from adallm.plots.weights import SOURCES

RULES = ("max", "four_over_six", "mse", "imatrix", "mse_fp8", "gptq")
_PATHS = {"nvfp4": "W4A16: weights as stored", "nvfp4-w4a8": "W4A8: as FP8 activations meet them"}


def rule_look(rule: str) -> tuple[str, str, str]:
    """Colour, hatching and marker of a rule."""
    i = RULES.index(rule)
    return COLORS[i], HATCHES[i], MARKERS[i]


def rule_errors(record: Mapping[str, Any]) -> Any:
    """Squared error of weights over that of W4A16 with the max rule: a panel for each path, a group for each source."""
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(2, 1, size=(7.5, 5.0), sharex=True, sharey=True)
        for axes, (path, title) in zip(panels, _PATHS.items(), strict=True):
            rules = [rule for rule in RULES if rule != "gptq" and _of(record, "tiny", path, rule)]
            width = 0.85 / len(rules)
            for i, rule in enumerate(rules):
                found = {group: _of(record, source, path, rule) for group, source in enumerate(SOURCES)}
                found = {group: row for group, row in found.items() if row}
                color, hatch, _ = rule_look(rule)
                bars = axes.bar(
                    [group + (i - (len(rules) - 1) / 2) * width for group in found],
                    [row["vs_max"] for row in found.values()],
                    width,
                    color=color,
                    hatch=hatch,
                    edgecolor="white",
                )
                axes.bar_label(bars, fmt="%.2f", fontsize=6.5, padding=1)
            axes.axhline(1, color=GREY, linewidth=0.8)
            axes.grid(axis="x", visible=False)
            axes.set_title(title)
            axes.set_ylabel("squared error /\nthat of W4A16, max")
            axes.set_ylim(0, 1.2)
        panels[-1].set_xticks(range(len(SOURCES)), SOURCES.values())
        shown = [rule for rule in RULES if rule != "gptq"]
        handles = [_swatch(rule) for rule in shown]
        figure.legend(handles, shown, loc="outside upper right", ncols=len(shown))
        write_source(figure, f"imatrix reads text, and is of the bundled model alone; {source_of(record)}")
    return figure


def rule_outputs(record: Mapping[str, Any]) -> Any:
    """Error of the bundled model's outputs against that of its weights, W4A16, a point for each rule."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(6.0, 3.6))
        for rule in RULES:
            row = _of(record, "tiny", "nvfp4", rule)
            color, _, marker = rule_look(rule)
            axes.plot(row["rel_sq_err"], row["rel_out_err"], marker, color=color, markersize=8)
            x, side = (-7, "right") if rule == "mse" else (7, "left")
            at = (row["rel_sq_err"], row["rel_out_err"])
            axes.annotate(rule, at, xytext=(x, 4), ha=side, textcoords="offset points")
        axes.margins(x=0.18, y=0.12)
        axes.set_xlabel("relative squared error of the weights")
        axes.set_ylabel("relative squared error of\nthe layers' outputs, held-out text")
        axes.set_title("What a rule does to weights and to outputs: all layers of the bundled model")
        write_source(figure, record)
    return figure


def rule_perplexity(record: Mapping[str, Any]) -> Any:
    """Bits per byte above BF16 by rule with paired standard errors, W4A16 and W4A8 side by side."""
    paths = {"nvfp4": "W4A16", "nvfp4-w4a8": "W4A8"}
    rows = {(row["format"], row["rule"]): row for row in record["rows"] if row["rule"] is not None}
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(7.0, 3.8))
        height = 0.8 / len(paths)
        for i, (path, title) in enumerate(paths.items()):
            axes.barh(
                [group + (i - (len(paths) - 1) / 2) * height for group in range(len(RULES))],
                [rows[path, rule]["delta"] for rule in RULES],
                height,
                xerr=[2 * rows[path, rule]["delta_stderr"] for rule in RULES],
                color=COLORS[i],
                hatch=HATCHES[i],
                edgecolor="white",
                error_kw={"capsize": 3, "ecolor": "#333333"},
                label=title,
            )
        axes.set_yticks(range(len(RULES)), [f"{rule}*" if rows["nvfp4", rule]["from_text"] else rule for rule in RULES])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("bits per byte above BF16 (bars: 2 paired standard errors)")
        axes.set_title(f"NVFP4 by scale rule: {record['rows'][0]['model']}, {record['rows'][0]['windows']} windows")
        figure.legend(loc="outside upper right", ncols=len(paths))
        write_source(figure, f"* reads text that is not held out; {source_of(record)}")
    return figure


def _swatch(rule: str) -> Any:
    from matplotlib.patches import Patch

    color, hatch, _ = rule_look(rule)
    return Patch(facecolor=color, hatch=hatch, edgecolor="white")


def _of(record: Mapping[str, Any], source: str, path: str, rule: str) -> Mapping[str, Any] | None:
    found: Sequence[Mapping[str, Any]] = results.select(record, source=(source,), format=(path,), rule=(rule,))["rows"]
    return found[0] if found else None
