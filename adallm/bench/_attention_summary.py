"""Ratios from the rows of an ``attention`` record: the time of another over ours, above 1 where ours is faster.

Only rows of the same step are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adallm.text import rounded_down, table

ADALLM, BF16, WRITE = "adallm", "adallm-bf16", "adallm-write-kv"
OURS = (ADALLM, BF16, WRITE)
SM89_PEERS = ("flashinfer", "vllm-triton")  # which run on sm_89 and take BF16 queries
FP8_QUERIES, FA3 = "vllm-triton-fp8q", "fa3-fp8"
DECODE = (ADALLM, BF16, *SM89_PEERS, FP8_QUERIES, FA3)
IMPLS = (*DECODE, WRITE)
SHORTEST = 64  # sequence of a ragged batch
MANY = 256 << 10  # tokens that are read, from which on bandwidth is all that counts

# Ratio -> what ours is compared with, the fastest where there are several, and its name.
AGAINST = {
    "vs_sm89": (SM89_PEERS, "best sm_89 peer"),
    "vs_fp8q": ((FP8_QUERIES,), "vLLM Triton, FP8 queries"),
    "vs_fa3": ((FA3,), "FA3 FP8, Hopper only"),
    "vs_bf16": ((BF16,), "ours, BF16 cache"),
}

Key = tuple[str, int, int, int, bool]


def key_of(entry: Mapping[str, Any]) -> Key:
    """What tells a step from others."""
    return (entry["heads"], entry["block"], entry["batch"], entry["context"], entry["ragged"])


def named(key: Key) -> str:
    return f"{key[0]} block {key[1]} {step_name(*key[2:])}"


def step_name(batch: int, context: int, ragged: bool) -> str:
    return f"{batch}x{f'{SHORTEST}..' if ragged else ''}{context}"


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What a record says, from its rows alone; four lists of flat mappings.

    Returns:
        ``cases``: ``heads``, ``block``, ``batch``, ``context``, ``ragged``, ``us`` of ours, ``sm89_peer`` (the faster
        one), and a ratio for each of ``AGAINST``; None where there is no such row.
        ``groups``: ``group`` ("all", or heads), ``against``, ``cases``, ``geomean``, ``minimum``, ``minimum_at``; a
        group without a ratio is left out.
        ``read_share``: of our steps that read ``MANY`` tokens or more: ``at``, ``tokens_read``, ``share`` of the
        bandwidth of reading alone.
        ``writes``: ``heads``, ``block``, ``tokens``, ``us``, ``share_of_copy``.
    """
    rows = list(rows)
    cases = [_case(key, us) for key, us in _times(rows).items() if ADALLM in us]
    return {"cases": cases, "groups": _groups(cases), "read_share": _read_share(rows), "writes": _writes(rows)}


def report(rows: Iterable[Mapping[str, Any]]) -> str:
    """``summary`` as tables: times in us and ratios of each step, then of groups, bandwidth, and writing."""
    rows = list(rows)
    found = summary(rows)
    ratios = {key_of(case): case for case in found["cases"]}
    lines = []
    for key, us in _times(rows).items():
        case = ratios.get(key, {})
        lines.append(
            [key[0], str(key[1]), step_name(*key[2:]), *_cells(us), *(_ratio(case.get(against)) for against in AGAINST)]
        )
    header = ["heads", "block", "batch x context", *DECODE, *AGAINST]
    parts = [table(header, lines, align="lrl" + "r" * (len(header) - 3)), groups_table(found["groups"])]
    shares = [[s["at"], f"{s['tokens_read'] >> 10} K", f"{s['share']:.1%}"] for s in found["read_share"]]
    parts.append(table([ADALLM, "tokens read", "of read bandwidth"], shares, align="lrr"))
    writes = [
        [w["heads"], str(w["block"]), str(w["tokens"]), f"{w['us']:.2f}", f"{w['share_of_copy']:.1%}"]
        for w in found["writes"]
    ]
    parts.append(table(["write_kv", "block", "tokens", "us", "of copy bandwidth"], writes, align="lrrrr"))
    return "\n\n".join(parts)


def groups_table(groups: Iterable[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """The ``groups`` of ``summary``: how often the time of ours another takes, by geometric mean and at the least."""
    lines = []
    for g in groups:
        numbers = [str(g["cases"]), _ratio(g["geomean"]), rounded_down(g["minimum"])]
        lines.append([g["group"], AGAINST[g["against"]][1], *numbers, g["minimum_at"]])
    header = ["heads", "against", "cases", "geomean", "minimum", "at"]
    return table(header, lines, align="llrrrl", markdown=markdown)


def times_table(rows: Iterable[Mapping[str, Any]], heads: str, block: int, *, markdown: bool = False) -> str:
    """The times in us with these heads and blocks, a line for each step."""
    lines = [[step_name(*key[2:]), *_cells(us)] for key, us in _times(rows).items() if key[:2] == (heads, block)]
    return table(["batch x context", *DECODE], lines, align="l" + "r" * len(DECODE), markdown=markdown)


def _cells(us: Mapping[str, float]) -> list[str]:
    return [f"{us[impl]:.1f}" if impl in us else "-" for impl in DECODE]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _times(rows: Iterable[Mapping[str, Any]]) -> dict[Key, dict[str, float]]:
    """Step -> implementation -> us, in the order of the rows."""
    times: dict[Key, dict[str, float]] = {}
    for row in rows:
        if row["impl"] in DECODE:
            times.setdefault(key_of(row), {})[row["impl"]] = row["us"]
    return times


def _case(key: Key, us: Mapping[str, float]) -> dict[str, Any]:
    case: dict[str, Any] = dict(zip(("heads", "block", "batch", "context", "ragged"), key, strict=True))
    case |= {"us": us[ADALLM], "sm89_peer": _fastest(us, SM89_PEERS)}
    for against, (impls, _) in AGAINST.items():
        other = _fastest(us, impls)
        case[against] = us[other] / us[ADALLM] if other else None
    return case


def _fastest(us: Mapping[str, float], impls: Sequence[str]) -> str | None:
    return min((impl for impl in impls if impl in us), key=us.__getitem__, default=None)


def _groups(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for group in ("all", *dict.fromkeys(case["heads"] for case in cases)):
        for against in AGAINST:
            chosen = [case for case in cases if group in ("all", case["heads"]) and case[against] is not None]
            if not chosen:
                continue
            worst = min(chosen, key=lambda case: case[against])
            found.append(
                {
                    "group": group,
                    "against": against,
                    "cases": len(chosen),
                    "geomean": statistics.geometric_mean(case[against] for case in chosen),
                    "minimum": worst[against],
                    "minimum_at": named(key_of(worst)),
                }
            )
    return found


def _read_share(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    read = next((row["tb_s"] for row in rows if row["impl"] == "read"), None)
    return [
        {"at": named(key_of(row)), "tokens_read": row["tokens_read"], "share": row["tb_s"] / read}
        for row in rows
        if read is not None and row["impl"] == ADALLM and row["tokens_read"] >= MANY
    ]


def _writes(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    copy = next((row["tb_s"] for row in rows if row["impl"] == "copy"), None)
    return [
        {name: row[name] for name in ("heads", "block", "tokens", "us")} | {"share_of_copy": row["tb_s"] / copy}
        for row in rows
        if copy is not None and row["impl"] == WRITE
    ]
