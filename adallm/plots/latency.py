"""How long a request waits in vLLM, by implementation and load. All of it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.ticker import LogLocator

from adallm.plots.engines import names, order, where
from adallm.plots.style import COLORS, GREY, STYLE, new_figure, source_of, write_source

_PERCENTILES = {"p50": ("o", "median"), "p90": ("s", "90th percentile"), "p99": ("^", "99th percentile")}
_WAITS = {"ttft": "Time to first token", "itl": "Time between tokens"}


def latencies(record: Mapping[str, Any]) -> Any:
    """Median, 90th and 99th percentile of both latencies in ms, a panel for each and each number of requests."""
    of = {(row["impl"], row["metric"], row["batch"]): row["value"] for row in record["rows"]}
    rows = [row for row in record["rows"] if row["metric"].partition("_")[0] in _WAITS]
    if not rows:
        raise ValueError(f"the record has no latency; a metric begins with {' or '.join(_WAITS)}")
    loads = sorted({row["batch"] for row in rows})
    impls = [impl for impl in order(record) if any(row["impl"] == impl for row in rows)]
    with matplotlib.rc_context(STYLE):
        size = (8.5, 1.6 + 0.42 * len(impls))
        figure, panels = new_figure(len(_WAITS), len(loads), size=size, sharex="row", sharey=True, squeeze=False)
        for line, (wait, title) in zip(panels, _WAITS.items(), strict=True):
            for axes, load in zip(line, loads, strict=True):
                for y, impl in enumerate(impls):
                    points = {p: of.get((impl, f"{wait}_{p}_ms", load)) for p in _PERCENTILES}
                    points = {p: value for p, value in points.items() if value is not None}
                    axes.plot(list(points.values()), [y] * len(points), color=GREY, linewidth=0.8, zorder=1)
                    for p, value in points.items():
                        color = COLORS[list(_PERCENTILES).index(p)]
                        axes.plot(value, y, _PERCENTILES[p][0], color=color, markersize=5, label=_PERCENTILES[p][1])
                names(axes, impls)
                axes.margins(y=0.12 if len(impls) > 3 else 0.25)
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:,g}")
                axes.minorticks_off()
                axes.set_title(f"{title}, {load} requests at any time")
        for axes in panels[-1]:
            axes.set_xlabel("ms")
        handles, labels = panels[0][0].get_legend_handles_labels()
        first = dict(zip(reversed(labels), reversed(handles), strict=True))
        titles = [title for _, title in _PERCENTILES.values() if title in first]
        figure.legend([first[title] for title in titles], titles, loc="outside upper right", ncols=3, fontsize=8)
        write_source(figure, f"{where(record)}; {source_of(record)}")
    return figure
