"""What the records of the end-to-end benchmark hold: which one has what a figure needs, and rows made of its rows.

A record is of one card, and values of two cards are never put side by side here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adallm import results

EXPERIMENT = "vllm_e2e"
MODEL = "Qwen3-8B"
OURS = ("adallm-w4a16", "adallm-w4a8", "adallm-auto", "adallm-auto-lm-head")
# With a BF16 cache -> title, and the same with an FP8 cache; where there are several, the fastest stands for all.
CACHES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16": ("BF16", ("bf16-fp8kv",)),
    "stock-humming-bf16kv": ("Stock, Humming", ("stock-humming-flashinfer", "stock-humming-triton")),
    "adallm-w4a16-bf16kv": ("AdaLLM W4A16", ("adallm-w4a16",)),
    "adallm-w4a8-bf16kv": ("AdaLLM W4A8", ("adallm-w4a8",)),
}
# An implementation with this behind its name is the same with CUDA graphs for steps of more tokens.
GRAPHS = "-graphs"


def records(*, root: Path | None = None, model: str = MODEL) -> list[dict[str, Any]]:
    """Every record, with the rows alone that are of the model and of as many layers as it was measured with at most."""
    found = []
    for record in results.read_all(EXPERIMENT, root=root).values():
        layers = [row["layers"] for row in record["rows"] if row["model"] == model]
        if layers:
            found.append(results.select(record, model=(model,), layers=(max(layers),)))
    return found


def widest(
    known: Sequence[Mapping[str, Any]], *, metric: str, impls: Sequence[str] | None = None, first: str | None = None
) -> Mapping[str, Any] | None:
    """The record in which the most implementations have a metric, of several the latest; None if no record has any.

    Args:
        known: records.
        impls: implementations that count; None for all.
        first: a card, as ``card`` names it; its record is taken if it has any, however many others have.
    """

    def count(record: Mapping[str, Any]) -> int:
        of = {row["impl"] for row in record["rows"] if row["metric"] == metric}
        return len(of if impls is None else of.intersection(impls))

    def rank(record: Mapping[str, Any]) -> tuple[bool, int, str]:
        n = count(record)
        return n > 0 and card(record) == first, n, record["provenance"]["date"]

    best = max(known, key=rank, default=None)
    return best if best is not None and count(best) else None


def card(record: Mapping[str, Any]) -> str:
    """``"H200"``."""
    return (record["provenance"]["gpu"] or "CPU").removeprefix("NVIDIA ").partition(" ")[0]


def values(record: Mapping[str, Any]) -> dict[tuple[str, int | None], dict[str, float]]:
    """Metric and batch -> implementation -> value, in the order of the rows."""
    found: dict[tuple[str, int | None], dict[str, float]] = {}
    for row in record["rows"]:
        found.setdefault((row["metric"], row["batch"]), {})[row["impl"]] = row["value"]
    return found


def graph_pairs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each metric of an implementation with CUDA graphs for steps of more tokens, and of the same without.

    Returns:
        Rows ``impl``, ``metric``, ``batch``, ``value``, ``graphs``: of that without, its value, that with.
    """
    return [
        {"impl": impl, "metric": metric, "batch": batch, "value": value, "graphs": of[impl + GRAPHS]}
        for (metric, batch), of in values(record).items()
        for impl, value in of.items()
        if impl + GRAPHS in of
    ]


def cache_pairs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``ratio = tokens a second with an FP8 cache / with a BF16 cache``, of the same weights and the same kernel.

    Returns:
        Rows ``title``, ``metric``, ``batch``, ``bf16``, ``fp8``, ``ratio`` for each metric in tokens a second that both
        have; none where the record has no implementation with a BF16 cache.
    """
    rows = []
    for (metric, batch), of in values(record).items():
        for name, (title, others) in CACHES.items():
            there = [of[other] for other in others if other in of]
            if metric.endswith("_tok_s") and name in of and there:
                row = {"title": title, "metric": metric, "batch": batch, "bf16": of[name], "fp8": max(there)}
                rows.append(row | {"ratio": row["fp8"] / row["bf16"]})
    return rows
