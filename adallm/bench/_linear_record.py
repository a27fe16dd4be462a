"""The record of the linear benchmark: a case is a shape and M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adallm.bench import _record
from adallm.bench._linear_summary import IMPLS

Case = tuple[str, int]


class Record(_record.Record):
    """As there; ``shapes`` are in their order."""

    experiment = "linear"

    def __init__(
        self, provenance: Mapping[str, Any], shapes: Sequence[str], *, root: Path | None, append: bool
    ) -> None:
        self._shapes = list(shapes)
        super().__init__(provenance, root=root, append=append)

    def case_of(self, entry: _record.Entry) -> Case | None:
        return (entry["shape"], entry["m"]) if entry.get("shape") is not None else None

    def order(self, entry: _record.Entry) -> tuple[int, ...]:
        return (self._shapes.index(entry["shape"]), entry["m"], IMPLS.index(entry["impl"]))

    def compare(self, row: dict[str, Any], tb_s: Mapping[str, float]) -> None:
        row["share_of_copy"] = round(row["gb_s"] / (tb_s["copy"] * 1e3), 4)
