"""The record of the linear benchmark, which several runs may fill: one case, a shape and M, comes from one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adallm import results
from adallm.bench._linear_summary import IMPLS

EXPERIMENT = "linear"
# What two runs must share for their rows to stand in one record.
SAME = ("commit", "dirty", "gpu", "torch", "triton", "vllm")

Case = tuple[str, int]


class Record:
    """Rows, and cases without one, of this run and, if ``append``, of the record that is there.

    Attributes:
        rows: as they are written: the bandwidths first, then by shape, M and implementation.
        absent: ``shape``, ``m``, ``impl``, ``reason`` of what has no row.
        runs: ``command`` and ``date`` of every run.

    Raises:
        ValueError: with ``append``, a record of another commit, GPU or library version.
    """

    def __init__(
        self, provenance: Mapping[str, Any], shapes: Sequence[str], *, root: Path | None, append: bool
    ) -> None:
        self._provenance, self._shapes, self._root = provenance, list(shapes), root
        self.rows: list[dict[str, Any]] = []
        self.absent: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        path = Path(root or results.default_root()) / EXPERIMENT / f"{results.slug(provenance['gpu'])}.json"
        if append and path.is_file():
            self._read(path)
        self.runs.append({name: provenance[name] for name in ("command", "date")})

    def _read(self, path: Path) -> None:
        old = results.read(path)
        if self._provenance["commit"] is None:
            raise ValueError("the commit is unknown, so nothing can be appended; set ADALLM_COMMIT")
        for name in SAME:
            if old["provenance"][name] != self._provenance[name]:
                raise ValueError(
                    f"{path} is of {name} {old['provenance'][name]}, this run of {self._provenance[name]}; "
                    "without --append it is replaced"
                )
        self.rows, self.absent, self.runs = old["rows"], old["absent"], old["runs"]

    def tried(self, case: Case) -> set[str]:
        """The implementations that have a row for this case or a reason for having none."""
        return {entry["impl"] for entry in (*self.rows, *self.absent) if _case(entry) == case}

    def add_bandwidth(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep the faster of two measurements: it says what the memory can do."""
        for row in rows:
            old = next((r for r in self.rows if r["impl"] == row["impl"]), None)
            if old is None or row["tb_s"] > old["tb_s"]:
                self.rows = [dict(row), *(r for r in self.rows if r is not old)]

    def add(self, case: Case, rows: Iterable[Mapping[str, Any]], absent: Iterable[Mapping[str, Any]]) -> None:
        """Take in a case, in place of what there was of it."""
        self.rows = [row for row in self.rows if _case(row) != case] + [dict(row) for row in rows]
        self.absent = [entry for entry in self.absent if _case(entry) != case] + [dict(entry) for entry in absent]

    def write(self) -> Path:
        """Order the rows, give each its ``share_of_copy``, and write the file."""
        self.rows.sort(key=self._order)
        self.absent.sort(key=self._order)
        copy = next(row["tb_s"] for row in self.rows if row["impl"] == "copy")
        for row in self.rows:
            if "gb_s" in row:
                row["share_of_copy"] = round(row["gb_s"] / (copy * 1e3), 4)
        return results.write(
            EXPERIMENT,
            self.rows,
            provenance=self._provenance,
            root=self._root,
            spread="interquartile range",
            absent=self.absent,
            runs=self.runs,
        )

    def _order(self, entry: Mapping[str, Any]) -> tuple[int, int, int]:
        if entry.get("shape") is None:
            return (-1, 0, ("copy", "read").index(entry["impl"]))
        return (self._shapes.index(entry["shape"]), entry["m"], IMPLS.index(entry["impl"]))


def _case(entry: Mapping[str, Any]) -> Case | None:
    return (entry["shape"], entry["m"]) if entry.get("shape") is not None else None
