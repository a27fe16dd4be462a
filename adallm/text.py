"""Tables for a terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str, markdown: bool = False) -> str:
    """Rows of strings, aligned in columns.

    Args:
        header: a title for each column.
        rows: as many strings each as there are columns.
        align: a letter for each column, ``l`` or ``r``.
        markdown: pipes and an alignment row instead of two spaces.

    Raises:
        ValueError: a row or ``align`` of another length than ``header``.
    """
    lines = [list(header), *map(list, rows)]
    if {len(line) for line in lines} != {len(align)}:
        raise ValueError(f"a table of {len(align)} columns has rows of {sorted({len(line) for line in lines})}")
    widths = [max(len(line[i]) for line in lines) for i in range(len(align))]
    cells = [
        [cell.rjust(widths[i]) if align[i] == "r" else cell.ljust(widths[i]) for i, cell in enumerate(line)]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in cells)
    rule = [("-" * (width - 1) + ":") if align[i] == "r" else "-" * width for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:]))


def one_line(error: Exception) -> str:
    """What an error says, or its kind."""
    return " ".join(str(error).split()) or type(error).__name__


def rounded_down(ratio: float) -> str:
    """Two decimals, never more than it is: what is slower does not become 1.00."""
    return f"{math.floor(100 * ratio) / 100:.2f}"
