"""What the figures share: colours, sizes, files, the line that names the source.

Colours are Okabe and Ito's, which colour-blind readers tell apart; bars also differ by hatching and points by marker,
so that a print in grey can be read. A format has the same look in every figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from adallm import results

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
# Of lines: each dot of a hatch would be a path in SVG.
HATCHES = ("", "///", "---", "xxx", "\\\\\\", "++", "||", "")
MARKERS = "os^DvPX*"
GREY = "#555555"

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
    # Text as text, which is smaller and can be searched; where DejaVu Sans is not there, its relative Verdana may be.
    "svg.fonttype": "none",
    "savefig.bbox": "tight",
}

_FORMATS = ("fp8", "nvfp4", "nvfp4-w4a8", "nvfp4-fp8kv", "mxfp4", "int4-g128", "int4-g128-sym")
TITLES = {"fp8": "FP8", "nvfp4": "NVFP4", "mxfp4": "MXFP4", "int4-g128": "INT4 g128"}
_PNG_DPI = 160
_PATH = re.compile(r' d="[^"]*"')
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")


def look(name: str) -> tuple[str, str, str]:
    """Colour, hatching and marker of a format; black for one that has none of its own."""
    i = _FORMATS.index(name) if name in _FORMATS else len(COLORS) - 1
    return COLORS[i], HATCHES[i], MARKERS[i]


def new_figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None, **options: Any
) -> tuple[Any, Any]:
    """A figure that pyplot does not know of, with its axes as ``Figure.subplots`` gives them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, **options)


def source_of(record: Mapping[str, Any]) -> str:
    """One line: where and with what the record was measured."""
    p = record["provenance"]
    where = p["gpu"] or "a CPU"
    return f"measured on {where}, {p['date'][:10]}, torch {p['torch']}, commit {(p['commit'] or 'unknown')[:9]}"


def write_source(figure: Any, source: Mapping[str, Any] | str) -> None:
    """Put the source, a record or a line of text, under the figure."""
    line = source if isinstance(source, str) else source_of(source)
    figure.supxlabel(line, fontsize=7, color=GREY, x=0.99, ha="right")


def _shorter(path: re.Match[str]) -> str:
    """An SVG's path in points, of which nobody sees a hundredth."""
    return " " + _DECIMALS.sub(lambda number: f"{float(number[0]):.2f}", " ".join(path[0].split()))


def save(figure: Any, name: str, *, root: Path | None = None) -> list[Path]:
    """Write ``<root>/figures/<name>.svg`` and ``.png`` and return their paths; the same figure gives the same files.

    The PNG has a palette of 256 colours and the SVG's paths have two decimals: files are in git, and redrawn often.
    """
    from PIL import Image

    folder = Path(root or results.default_root()) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    with matplotlib.rc_context(STYLE):
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        paths[0].write_text(_PATH.sub(_shorter, svg.getvalue()), encoding="utf-8")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_PNG_DPI)
    with Image.open(png) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(paths[1], optimize=True)
    return paths


def show(figure: Any, name: str, *, alt: str, root: Path | None = None) -> Any:
    """``save`` the figure and return the PNG for a notebook, with a text for readers who do not see it."""
    from IPython.display import Image

    _, png = save(figure, name, root=root)
    return Image(data=png.read_bytes(), format="png", width=round(110 * figure.get_figwidth()), alt=alt)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Any:
    """A pandas table of some fields of rows under readable titles."""
    import pandas as pd

    return pd.DataFrame([{title: row.get(field) for field, title in columns.items()} for row in rows])
