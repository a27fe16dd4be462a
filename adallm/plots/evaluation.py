"""What a number format costs a model: perplexity by format, against stored bits, and as others published it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from adallm.plots.style import COLORS, HATCHES, STYLE, look, new_figure, write_source


def perplexity(record: Mapping[str, Any], *, task: str = "stdlib_ppl") -> Any:
    """Bits per byte by format, as the difference to the first format of the record, with paired standard errors."""
    base, others = _perplexity_rows(record, task)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for i, row in enumerate(others):
            color, hatch, _ = look(row["format"])
            axes.barh(
                i,
                row["delta"],
                xerr=2 * row["delta_stderr"],
                color=color,
                hatch=hatch,
                edgecolor="white",
                error_kw={"capsize": 3, "ecolor": "#333333"},
            )
        axes.set_yticks(range(len(others)), [f"{r['title']}\n{r['bits_per_weight']:.4g} bits a weight" for r in others])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"bits per byte above {base['title']} (bars: 2 paired standard errors)")
        axes.set_title(
            f"{base['model']} on {task}: {base['title']} {base['bits_per_byte']:.4f} bits per byte, "
            f"{base['tokens']:,} tokens"
        )
        write_source(figure, record)
    return figure


def loss_by_bits(record: Mapping[str, Any], *, task: str = "stdlib_ppl") -> Any:
    """Bits per byte above the first format against stored bits a weight; formats of equal size stand side by side."""
    base, others = _perplexity_rows(record, task)
    same = Counter(row["bits_per_weight"] for row in others)
    placed: Counter[float] = Counter()
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for row in others:
            bits = row["bits_per_weight"]
            x = bits + 0.08 * (placed[bits] - (same[bits] - 1) / 2)
            placed[bits] += 1
            color, _, marker = look(row["format"])
            error = 2 * row["delta_stderr"]
            axes.errorbar(
                x, row["delta"], error, color=color, marker=marker, markersize=7, capsize=3, label=row["title"]
            )
        axes.axhline(0, color="#333333", linewidth=0.8)
        axes.set_xlabel("stored bits a weight with block scales (equal ones side by side)")
        axes.set_ylabel(f"bits per byte above {base['title']}\n(bars: 2 paired standard errors)")
        axes.set_title(f"What the bits buy: {base['model']} on {task}")
        figure.legend(loc="outside right center", ncols=1, handlelength=1)
        write_source(figure, record)
    return figure


def divergence(record: Mapping[str, Any]) -> Any:
    """Kullback-Leibler divergence from the first format by format, a bar for each text."""
    texts = list(dict.fromkeys(row["text"] for row in record["rows"]))
    formats = list(dict.fromkeys(row["format"] for row in record["rows"]))[1:]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        height = 0.8 / len(texts)
        for i, text in enumerate(texts):
            of = {row["format"]: row for row in record["rows"] if row["text"] == text}
            drawn = axes.barh(
                [group + (i - (len(texts) - 1) / 2) * height for group in range(len(formats))],
                [of[name]["kl"] for name in formats],
                height,
                color=COLORS[i],
                hatch=HATCHES[i],
                edgecolor="white",
                label=f"{text} text, {of[formats[0]]['tokens']:,} tokens",
            )
            axes.bar_label(drawn, fmt="%.4f", fontsize=7, padding=3)
        axes.set_yticks(range(len(formats)), [of[name]["title"] for name in formats])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"divergence from {record['rows'][0]['title']}, nats a token")
        axes.set_title("How far each format moves the predictions of the bundled model")
        figure.legend(loc="outside upper right", ncols=len(texts))
        write_source(figure, record)
    return figure


def published(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Bits a token above 16 bits as others published it, one panel a model; hollow, so that nobody takes it for ours.

    Args:
        rows: of one source, with ``model``, ``task``, ``format``, ``delta_bits`` and ``source``.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(1, len(models), size=(7.0, 2.8), sharex=True, squeeze=False)
        for axes, model in zip(panels[0], models, strict=True):
            bars = [row for row in rows if row["model"] == model and row["delta_bits"]]
            drawn = axes.barh(
                range(len(bars)), [row["delta_bits"] for row in bars], color="white", edgecolor=COLORS[0], hatch="//"
            )
            axes.bar_label(drawn, fmt="%.3f", padding=3)
            axes.set_yticks(range(len(bars)), [row["format"] for row in bars])
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.15)
            axes.set_xlabel("bits a token above 16-bit weights")
            axes.set_title(f"{model}, {rows[0]['task']}")
        write_source(figure, f"published, not measured here: {rows[0]['source']}")
    return figure


def _perplexity_rows(record: Mapping[str, Any], task: str) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    rows = [row for row in record["rows"] if row["task"] == task and "delta" in row]
    if not rows:
        raise ValueError(f"the record has no perplexity rows of task {task!r}")
    return rows[0], rows[1:]
