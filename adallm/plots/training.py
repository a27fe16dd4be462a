"""How the bundled model was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib

from adallm.plots.style import STYLE, new_figure, write_source


def training_curve(record: Mapping[str, Any]) -> Any:
    """Bits per byte of each split by epoch."""
    labels = {"train": "train (with dropout)", "validation": "validation", "heldout": "held out"}
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
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
        write_source(figure, record)
    return figure


def recipes(record: Mapping[str, Any]) -> Any:
    """Validation bits per byte by epoch, a line for each recipe that was tried."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for name, marker in zip(dict.fromkeys(row["recipe"] for row in record["rows"]), "o^sDvP*X", strict=False):
            points = [
                (r["epoch"], r["bits_per_byte"]) for r in record["rows"] if r["recipe"] == name and r["epoch"] > 2
            ]
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation bits per byte")
        axes.set_title("What the recipe was chosen on")
        axes.legend()
        write_source(figure, record)
    return figure
