"""The record of a benchmark that takes cases one by one, which several runs may fill: one case comes from one run."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adallm import results

# What two runs must share for their rows to stand in one record.
SAME = ("commit", "dirty", "gpu", "torch", "triton", "vllm")
BANDWIDTHS = ("copy", "read")

Entry = Mapping[str, Any]


class Record:
    """Rows, and what has none, of this run and, if ``append``, of the record that is there.

    Runs that append may be under way at the same time: each keeps what the others have written.

    Attributes:
        experiment: the name of the folder; of a subclass.
        rows: as they are written: the bandwidths first, then in ``order``.
        absent: the fields of a case, ``impl`` and ``reason`` of what has no row.
        runs: ``command`` and ``date`` of every run.

    Raises:
        ValueError: with ``append``, a record of another commit, GPU or library version.
    """

    experiment: str

    def __init__(self, provenance: Mapping[str, Any], *, root: Path | None, append: bool) -> None:
        self._provenance, self._root = provenance, root
        self.rows: list[dict[str, Any]] = []
        self.absent: list[dict[str, Any]] = []
        self._run = {name: provenance[name] for name in ("command", "date")}
        self.runs: list[dict[str, Any]] = [self._run]
        self._append, self._own = append, set[Hashable]()
        self._path = Path(root or results.default_root()) / self.experiment / f"{results.slug(provenance['gpu'])}.json"
        self._read()

    def case_of(self, entry: Entry) -> Hashable | None:
        """What tells the entry's case from others; None for a bandwidth."""
        raise NotImplementedError

    def order(self, entry: Entry) -> tuple[int, ...]:
        """Sorts the entries of cases."""
        raise NotImplementedError

    def compare(self, row: dict[str, Any], tb_s: Mapping[str, float]) -> None:
        """Put into the row of a case what part it is of the bandwidths, ``tb_s`` of ``BANDWIDTHS``."""
        raise NotImplementedError

    def _read(self) -> None:
        """Take in what the file has of cases that are not this run's own."""
        path = self._path
        if not self._append or not path.is_file():
            return
        old = results.read(path)
        if self._provenance["commit"] is None:
            raise ValueError("the commit is unknown, so nothing can be appended; set ADALLM_COMMIT")
        for name in SAME:
            if old["provenance"][name] != self._provenance[name]:
                raise ValueError(
                    f"{path} is of {name} {old['provenance'][name]}, this run of {self._provenance[name]}; "
                    "without --append it is replaced"
                )
        bandwidths = [row for row in self.rows if row["impl"] in BANDWIDTHS]
        self.rows = self._others(old["rows"]) + [row for row in self.rows if self.case_of(row) in self._own]
        self.absent = self._others(old["absent"]) + [entry for entry in self.absent if self.case_of(entry) in self._own]
        self.add_bandwidth(bandwidths)
        self.runs = [run for run in old["runs"] if run != self._run] + [self._run]

    def _others(self, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [entry for entry in entries if self.case_of(entry) not in self._own]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other run that appends reads or writes the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def tried(self, case: Hashable) -> set[str]:
        """The implementations that have a row for this case or a reason for having none."""
        return {entry["impl"] for entry in (*self.rows, *self.absent) if self.case_of(entry) == case}

    def add_bandwidth(self, rows: Iterable[Entry]) -> None:
        """Keep the faster of two measurements: it says what the memory can do."""
        for row in rows:
            old = next((r for r in self.rows if r["impl"] == row["impl"]), None)
            if old is None or row["tb_s"] > old["tb_s"]:
                self.rows = [dict(row), *(r for r in self.rows if r is not old)]

    def add(self, case: Hashable, rows: Iterable[Entry], absent: Iterable[Entry]) -> None:
        """Take in a case, in place of what there was of it."""
        self._own.add(case)
        self.rows = [row for row in self.rows if self.case_of(row) != case] + [dict(row) for row in rows]
        self.absent = [entry for entry in self.absent if self.case_of(entry) != case] + [dict(e) for e in absent]

    def write(self) -> Path:
        """Order the rows, compare each with the bandwidths, and write the file.

        Raises:
            ValueError: as in the constructor, if another run has written a record since.
        """
        with self._alone():
            self._read()
            self.rows.sort(key=self._order)
            self.absent.sort(key=self._order)
            tb_s = {row["impl"]: row["tb_s"] for row in self.rows if row["impl"] in BANDWIDTHS}
            for row in self.rows:
                if row["impl"] not in BANDWIDTHS:
                    self.compare(row, tb_s)
            return results.write(
                self.experiment,
                self.rows,
                provenance=self._provenance,
                root=self._root,
                spread="interquartile range",
                absent=self.absent,
                runs=self.runs,
            )

    def _order(self, entry: Entry) -> tuple[int, ...]:
        if entry["impl"] in BANDWIDTHS:
            return (0, BANDWIDTHS.index(entry["impl"]))
        return (1, *self.order(entry))
