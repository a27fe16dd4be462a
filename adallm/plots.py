"""Records drawn as figures: one style, SVG and PNG, the source of the numbers under each figure.

Colours are Okabe and Ito's, which colour-blind readers tell apart; bars also differ by hatching, so that a print in
grey can be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from adallm import results

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "")

STYLE = {
    "figure.figsize": (7.0, 3.6),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.6,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "adallm",
    "savefig.bbox": "tight",
}


def source_of(record: Mapping[str, Any]) -> str:
    """One line: where and with what the record was measured."""
    p = record["provenance"]
    where = p["gpu"] or "a CPU"
    return f"measured on {where}, {p['date'][:10]}, torch {p['torch']}, commit {(p['commit'] or 'unknown')[:9]}"


def save(figure: Any, name: str, *, root: Path | None = None) -> list[Path]:
    """Write ``<root>/figures/<name>.svg`` and ``.png`` and return their paths; the same figure gives the same SVG."""
    folder = Path(root or results.default_root()) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    with matplotlib.rc_context(STYLE):
        figure.savefig(paths[0], metadata={"Date": None, "Creator": None})
        figure.savefig(paths[1], dpi=160, metadata={"Software": None})
    return paths


def perplexity(record: Mapping[str, Any], *, task: str = "stdlib_ppl") -> Any:
    """Bits per byte by format, as the difference to the first format of the record, with paired standard errors."""
    rows = [row for row in record["rows"] if row["task"] == task and "delta" in row]
    if not rows:
        raise ValueError(f"the record has no perplexity rows of task {task!r}")
    base, others = rows[0], rows[1:]
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        for i, row in enumerate(others):
            axes.barh(
                i,
                row["delta"],
                xerr=2 * row["delta_stderr"],
                color=COLORS[i % len(COLORS)],
                hatch=HATCHES[i % len(HATCHES)],
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
        _source(figure, record)
    return figure


def training_curve(record: Mapping[str, Any]) -> Any:
    """Bits per byte of each split by epoch."""
    labels = {"train": "train (with dropout)", "validation": "validation", "heldout": "held out"}
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        for (split, label), marker in zip(labels.items(), "o^s", strict=True):
            points = [(row["epoch"], row["bits_per_byte"]) for row in record["rows"] if row["split"] == split]
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel("bits per byte")
        axes.set_yscale("log")
        axes.set_yticks([0.5, 0.6, 0.7, 0.8, 1.0, 1.3, 2.0], ["0.5", "0.6", "0.7", "0.8", "1.0", "1.3", "2.0"])
        axes.minorticks_off()
        axes.set_title("The bundled model: ten million weights on the standard library's source")
        axes.legend()
        _source(figure, record)
    return figure


def recipes(record: Mapping[str, Any]) -> Any:
    """Validation bits per byte by epoch, a line for each recipe that was tried."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        for name, marker in zip(dict.fromkeys(row["recipe"] for row in record["rows"]), "o^sDvP*X", strict=False):
            points = [
                (r["epoch"], r["bits_per_byte"]) for r in record["rows"] if r["recipe"] == name and r["epoch"] > 2
            ]
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation bits per byte")
        axes.set_title("What the recipe was chosen on")
        axes.legend()
        _source(figure, record)
    return figure


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Any:
    """A pandas table of some fields of rows under readable titles."""
    import pandas as pd

    return pd.DataFrame([{title: row.get(field) for field, title in columns.items()} for row in rows])


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure()
    return figure, figure.subplots()


def _source(figure: Any, record: Mapping[str, Any]) -> None:
    figure.supxlabel(source_of(record), fontsize=7, color="#555555", x=0.99, ha="right")
