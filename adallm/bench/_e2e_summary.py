"""Ratios from the rows of a ``vllm_e2e`` record: above 1 where ours is better, be it faster, sooner or smaller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adallm.bench import _e2e_load
from adallm.bench._e2e_impls import BF16, IMPLS, OURS, SAME_HEAD, STOCK
from adallm.text import table

# Metric -> unit, and whether more is better.
METRICS = {
    "start_s": ("s", False),
    "weights_gib": ("GiB", False),
    "prefill_tok_s": ("tok/s", True),
    "decode_tok_s": ("tok/s", True),
    "long_tok_s": ("tok/s", True),
    "peak_gib": ("GiB", False),
    **dict.fromkeys(_e2e_load.METRICS, ("ms", False)),
}

Key = tuple[str, int, str, int | None]


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a record says, from its rows alone; a flat mapping for each measure that one of ours has.

    Returns:
        ``model``, ``layers``, ``metric``, ``batch``; ``ours``, the best of ours, and its ``value``; ``stock``, the best
        of stock vLLM with NVFP4; ``vs_stock`` and ``vs_bf16``; ``same_head``, the best of ours with an ``lm_head`` in
        16 bits, which ``stock`` has, against that. None where there is no row to compare with.
    """
    found = []
    for key, values in _values(rows).items():
        more = METRICS[key[2]][1]
        ours, stock = (_best(values, impls, more=more) for impls in (OURS, STOCK))
        if ours is None:
            continue
        case: dict[str, Any] = dict(zip(("model", "layers", "metric", "batch"), key, strict=True))
        case |= {"ours": ours, "value": values[ours], "stock": stock}
        same = _best(values, SAME_HEAD, more=more)
        for name, one, other in (
            ("vs_stock", ours, stock),
            ("vs_bf16", ours, BF16 if BF16 in values else None),
            ("same_head", same, stock),
        ):
            case[name] = None if None in (one, other) else _ratio(values[one], values[other], more=more)
        found.append(case)
    return found


def report(rows: Iterable[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Two tables for each model: values, a line for each implementation, and the ratios of ``summary``.

    Latencies, where there are any, stand in two of their own.
    """
    rows = list(rows)
    latencies = [row for row in rows if row["metric"] in _e2e_load.METRICS]
    others = [row for row in rows if row["metric"] not in _e2e_load.METRICS]
    return "\n\n".join(part for found in (others, latencies) if (part := _tables(found, markdown=markdown)))


def _tables(rows: Sequence[Mapping[str, Any]], *, markdown: bool) -> str:
    values, ratios = _values(rows), summary(rows)
    parts = []
    for model in dict.fromkeys(key[:2] for key in values):
        keys = [key for key in values if key[:2] == model]
        lines = [
            [impl, *(_cell(values[key].get(impl), key[2]) for key in keys)]
            for impl in IMPLS
            if any(impl in values[key] for key in keys)
        ]
        title = f"{model[0]}, {model[1]} layers"
        header = [title, *(f"{named(*key[2:])}{_unit(key[2])}" for key in keys)]
        parts.append(table(header, lines, align="l" + "r" * len(keys), markdown=markdown))
        lines = [
            [
                named(case["metric"], case["batch"]),
                f"{_cell(case['value'], case['metric'])}{_unit(case['metric'])}",
                case["ours"],
                *(_times(case[name]) for name in ("vs_stock", "vs_bf16", "same_head")),
                case["stock"] or "-",
            ]
            for case in ratios
            if (case["model"], case["layers"]) == model
        ]
        header = [title, "value", "best of ours", "vs stock", "vs bf16", "vs stock, same lm_head", "best of stock"]
        parts.append(table(header, lines, align="lrlrrrl", markdown=markdown))
    return "\n\n".join(parts)


def named(metric: str, batch: int | None) -> str:
    """``"decode x4"``."""
    name = metric.removesuffix("_tok_s").removesuffix("_gib").removesuffix("_ms").removesuffix("_s").replace("_", " ")
    return name if batch is None else f"{name} x{batch}"


def _unit(metric: str) -> str:
    return f" {METRICS[metric][0]}"


def _cell(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    precise = METRICS[metric][0] == "GiB" or metric.startswith("itl")
    return f"{value:.2f}" if precise else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _values(rows: Iterable[Mapping[str, Any]]) -> dict[Key, dict[str, float]]:
    """Model and measure -> implementation -> value; models as the rows have them, measures in the order of METRICS."""
    found: dict[Key, dict[str, float]] = {}
    for row in rows:
        key = (row["model"], row["layers"], row["metric"], row["batch"])
        found.setdefault(key, {})[row["impl"]] = row["value"]
    metrics = list(METRICS)
    return dict(sorted(found.items(), key=lambda item: (*item[0][:2], metrics.index(item[0][2]), item[0][3] or 0)))


def _best(values: Mapping[str, float], impls: Sequence[str], *, more: bool) -> str | None:
    there = [impl for impl in impls if impl in values]
    return (max if more else min)(there, key=values.__getitem__, default=None)


def _ratio(ours: float, other: float, *, more: bool) -> float:
    return ours / other if more else other / ours
