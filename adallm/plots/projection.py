"""Decode on a card that was not measured: what is projected for it, hollow, and what others published, filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from adallm.plots.engines import IMPLS, look
from adallm.plots.style import COLORS, GREY, STYLE, new_figure, source_of, write_source


def decode_projection(
    projected: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]], source: Mapping[str, Any]
) -> Any:
    """Tokens a second by batch on a card: published points, filled, and projected ranges, hollow, under their roofs.

    Args:
        projected: rows ``impl``, ``batch``, ``gpu``, ``measured_on``, ``low``, ``high``, ``roof``, at least one.
        published: rows ``batch``, ``value``, ``source`` of the same card.
        source: the record that the projection comes from.

    Raises:
        ValueError: nothing projected, or projected for several cards.
    """
    gpus = sorted({row["gpu"] for row in projected})
    if len(gpus) != 1:
        raise ValueError(f"projected for {', '.join(gpus) or 'no card'}; one card is drawn")
    batches = sorted({row["batch"] for row in (*projected, *published)})
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(7.5, 4.2))
        impls = list(dict.fromkeys(row["impl"] for row in projected))
        for i, impl in enumerate(impls):
            of = [row for row in projected if row["impl"] == impl]
            color, _, marker = look(impl)
            # Side by side, where several would lie on each other.
            x = [row["batch"] * 2 ** (0.16 * (i - (len(impls) - 1) / 2)) for row in of]
            for end in ("low", "high"):
                label = f"{IMPLS.get(impl, impl)}, projected" if end == "low" else None
                y = [row[end] for row in of]
                axes.plot(x, y, marker, color=color, markerfacecolor="none", markersize=6, label=label)
            axes.vlines(x, [row["low"] for row in of], [row["high"] for row in of], color=color, linewidth=0.8)
            roof = [row["roof"] for row in of]
            axes.plot([row["batch"] for row in of], roof, color=color, linewidth=0.8, linestyle=":")
        axes.plot([], [], color=GREY, linewidth=0.8, linestyle=":", label="bound by the data sheet")
        points = sorted((row["batch"], row["value"]) for row in published)
        if points:
            label = f"published: {published[0]['source']}"
            axes.plot(*zip(*points, strict=True), "D-", color=COLORS[7], markersize=4, linewidth=0.8, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("sequences")
        axes.set_ylabel("tokens a second, all sequences")
        axes.set_title(f"{gpus[0]}, {source['rows'][0]['model']}, decode: projected and published, not measured")
        axes.legend(fontsize=7)
        write_source(figure, f"hollow: projected for {gpus[0]}, from what was {source_of(source)}")
    return figure
