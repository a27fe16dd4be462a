"""Ratios from the rows of a ``linear`` record: the time of a peer over ours, above 1 where ours is faster.

``vs_w4`` compares with the faster of the peers that read NVFP4 weights, ``vs_bf16`` with cuBLAS on BF16 weights. Only
rows of the same shape and number of tokens M are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from adallm.text import rounded_down, table

OURS = ("adallm-w4a16", "adallm-w4a8")
BETTER = "adallm, the better"  # of the two, in each case
BF16, FP8 = "cublas-bf16", "scaled-mm-fp8"
W4_PEERS = ("marlin", "humming")
IMPLS = (*OURS, BF16, FP8, *W4_PEERS)

# Name -> smallest and largest M. An M between two groups counts in the cases alone.
GROUPS = {"M <= 16": (1, 16), "M 24..512": (24, 512), "M 1024..3000": (1024, 3000), "M >= 4096": (4096, float("inf"))}
AGAINST = {"vs_w4": "best W4 peer", "vs_bf16": "cuBLAS BF16"}


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What a record says, from its rows alone; three lists of flat mappings.

    Returns:
        ``cases``: ``shape``, ``m``, ``impl`` (one of ours, or ``BETTER`` of both), ``us``, ``w4_peer``, ``vs_w4``,
        ``vs_bf16``; None where the peer has no row.
        ``groups``: ``group``, ``impl``, ``against``, ``cases``, ``geomean``, ``minimum``, ``minimum_at``; a group
        without a ratio is left out.
        ``read_share``: ``shape``, ``impl``, ``share``: bytes a second of a gate_up layer at M = 1 over those of reading
        alone.
    """
    rows = list(rows)
    times = _times(rows)
    cases = []
    for (shape, m), us in times.items():
        ours = [impl for impl in OURS if impl in us]
        if len(ours) == len(OURS):
            us = us | {BETTER: min(us[impl] for impl in ours)}
            ours.append(BETTER)
        cases += [_case(shape, m, impl, us) for impl in ours]
    return {"cases": cases, "groups": _groups(cases), "read_share": _read_share(rows)}


def report(rows: Iterable[Mapping[str, Any]]) -> str:
    """``summary`` as tables: times in us and ratios of each shape and M, then of the groups."""
    rows = list(rows)
    found = summary(rows)
    ratios = {(case["shape"], case["m"], case["impl"]): case for case in found["cases"]}
    lines = []
    for (shape, m), us in _times(rows).items():
        line = [shape, str(m), *(f"{us[impl]:.1f}" if impl in us else "-" for impl in IMPLS)]
        for impl in OURS:
            case = ratios.get((shape, m, impl), {})
            line += [_ratio(case.get(against)) for against in AGAINST]
        lines.append(line)
    short = [f"{impl.removeprefix('adallm-')} {against}" for impl in OURS for against in AGAINST]
    parts = [table(["shape", "M", *IMPLS, *short], lines, align="lr" + "r" * (len(IMPLS) + len(short)))]
    parts.append(groups_table(found["groups"]))
    shares = [[s["shape"], s["impl"], f"{s['share']:.1%}"] for s in found["read_share"]]
    parts.append(table(["M = 1", "impl", "of read bandwidth"], shares, align="llr"))
    return "\n\n".join(parts)


def groups_table(groups: Iterable[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """The ``groups`` of ``summary``: how often the time of a peer ours is, by geometric mean and at the least."""
    lines = []
    for g in groups:
        numbers = [str(g["cases"]), _ratio(g["geomean"]), rounded_down(g["minimum"])]
        lines.append([g["group"], g["impl"], AGAINST[g["against"]], *numbers, g["minimum_at"]])
    header = ["group", "impl", "against", "cases", "geomean", "minimum", "at"]
    return table(header, lines, align="lllrrrl", markdown=markdown)


def times_table(rows: Iterable[Mapping[str, Any]], shape: str, *, markdown: bool = False) -> str:
    """The times in us of one shape, a line for each M."""
    lines = [
        [str(m), *(f"{us[impl]:.1f}" if impl in us else "-" for impl in IMPLS)]
        for (name, m), us in _times(rows).items()
        if name == shape
    ]
    return table(["M", *IMPLS], lines, align="r" * (1 + len(IMPLS)), markdown=markdown)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _times(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, float]]:
    """(shape, M) -> implementation -> us, in the order of the rows."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row.get("shape") is not None:
            times.setdefault((row["shape"], row["m"]), {})[row["impl"]] = row["us"]
    return times


def _case(shape: str, m: int, impl: str, us: Mapping[str, float]) -> dict[str, Any]:
    peer = min((name for name in W4_PEERS if name in us), key=us.__getitem__, default=None)
    return {
        "shape": shape,
        "m": m,
        "impl": impl,
        "us": us[impl],
        "w4_peer": peer,
        "vs_w4": us[peer] / us[impl] if peer else None,
        "vs_bf16": us[BF16] / us[impl] if BF16 in us else None,
    }


def _groups(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for group, (low, high) in GROUPS.items():
        for impl in (*OURS, BETTER):
            for against in AGAINST:
                chosen = [
                    case
                    for case in cases
                    if case["impl"] == impl and low <= case["m"] <= high and case[against] is not None
                ]
                if not chosen:
                    continue
                worst = min(chosen, key=lambda case: case[against])
                found.append(
                    {
                        "group": group,
                        "impl": impl,
                        "against": against,
                        "cases": len(chosen),
                        "geomean": statistics.geometric_mean(case[against] for case in chosen),
                        "minimum": worst[against],
                        "minimum_at": f"{worst['shape']} M={worst['m']}",
                    }
                )
    return found


def _read_share(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    read = next((row["tb_s"] for row in rows if row["impl"] == "read"), None)
    if read is None:
        return []
    return [
        {"shape": row["shape"], "impl": row["impl"], "share": row["gb_s"] / (read * 1e3)}
        for row in rows
        if row["impl"] in (*OURS, *W4_PEERS) and row["m"] == 1 and row["shape"].endswith(".gate_up")
    ]
