"""A run of cases: those that the record does not answer yet, one after the other, as long as the budget lasts."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from adallm.bench._cases import WrongResultError
from adallm.bench._record import Record


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured at once.

    Attributes:
        key: as the record has it (``Record.case_of``).
        group: the record is written when it changes, so that a crash costs one group at most.
        name: tells the case from others of its group.
        arguments: what a measurer's ``case`` takes in front of ``impls``.
        impls: implementations.
    """

    key: Hashable
    group: str
    name: str
    arguments: tuple[Any, ...]
    impls: list[str]


def add_options(parser: argparse.ArgumentParser, *, repeats: int = 15, of: str = "timed replays for each row") -> None:
    """``--repeats``, with its default and what is repeated; ``--budget``, ``--append`` and ``--out``."""
    parser.add_argument("--repeats", type=int, default=repeats, help=f"{of} (default: %(default)s)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="take no new case once this much time is spent")
    parser.add_argument(
        "--append", action="store_true", help="add what the record of the same commit and GPU lacks, and keep its rows"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="root of the records (default: results)")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace, *, least: int = 15) -> None:
    if options.repeats < least:
        parser.error(f"--repeats must be at least {least}")


def plan(cases: Iterable[Case], record: Record, impls: Sequence[str]) -> list[Case]:
    """Every case that the record does not answer yet, its implementations in the order of ``impls``.

    All rows of a case come from one run, so that a case that gets a new implementation is measured as a whole again.
    """
    found = []
    for case in cases:
        tried = record.tried(case.key)
        if not tried >= set(case.impls):
            wanted = tried.union(case.impls)
            found.append(dataclasses.replace(case, impls=[impl for impl in impls if impl in wanted]))
    return found


def _times(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{row['impl']} {row['us']:.1f}" for row in rows) + " us"


def run(
    options: argparse.Namespace,
    record: Callable[[], Record],
    asked: Sequence[Case],
    *,
    impls: Sequence[str],
    gpu: str,
    measurer: Callable[[list[Case]], Any],
    report: Callable[[list[dict[str, Any]]], str],
    listed: Callable[[Sequence[Case]], str],
    started: float,
    clock: Callable[[], float] = time.monotonic,
    needs: Callable[[Case], float] = lambda case: 0,
    told: Callable[[Sequence[dict[str, Any]]], str] = _times,
) -> int:
    """Measure, print and write.

    Args:
        record: makes it.
        asked: all cases, and ``impls`` in order.
        measurer: from the cases to what has ``bandwidth()``, which may be no rows, and ``case(*arguments, impls)``.
        report: from rows to what is printed at the end.
        listed: names cases that are left.
        started: when the budget began, by ``clock``.
        needs: seconds that must be left for a case.
        told: from the rows of a case to what is printed then.

    Returns:
        an exit code: 1 for a result of ours that is wrong, 2 for a record that cannot be appended to.
    """
    try:
        record = record()
    except ValueError as error:
        print(f"--append: {error}", file=sys.stderr)
        return 2
    cases = plan(asked, record, impls)
    print(f"{len(cases)} cases to measure on {gpu}, {len(asked) - len(cases)} in the record already", flush=True)
    if cases:
        measuring = measurer(cases)
        record.add_bandwidth(measuring.bandwidth())
        bandwidths = [row for row in record.rows if record.case_of(row) is None]
        if bandwidths:
            print(", ".join(f"{row['impl']} {row['tb_s']:.2f} TB/s" for row in bandwidths), flush=True)
    left: Sequence[Case] = []
    for i, case in enumerate(cases):
        if options.budget is not None and clock() - started + needs(case) >= options.budget:
            left = cases[i:]
            break
        try:
            rows, absent = measuring.case(*case.arguments, case.impls)
        except WrongResultError as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
        record.add(case.key, rows, absent)
        print(f"{case.group} {case.name}: {told(rows)}", flush=True)
        if record.rows and (i + 1 == len(cases) or cases[i + 1].group != case.group):
            record.write()
    if left:
        print(f"left out, as the budget of {options.budget:g} s is spent; --append takes them up: {listed(left)}")
    if record.rows and len(left) < len(cases):
        print(f"wrote {os.path.relpath(record.write())}")
    print(f"\n{report(record.rows)}")
    return 0
