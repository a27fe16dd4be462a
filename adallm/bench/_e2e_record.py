"""The record of the end-to-end benchmark: a case is a measure of one implementation with one model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from adallm.bench import _record
from adallm.bench._e2e_impls import IMPLS
from adallm.bench._e2e_summary import METRICS


class Record(_record.Record):
    """As there. There are no bandwidths."""

    experiment = "vllm_e2e"

    def case_of(self, entry: _record.Entry) -> Hashable:
        return (entry["model"], entry["layers"], entry["impl"], entry["metric"], entry["batch"])

    def order(self, entry: _record.Entry) -> tuple[Any, ...]:
        kind = (list(IMPLS).index(entry["impl"]), list(METRICS).index(entry["metric"]), entry["batch"] or 0)
        return (entry["model"], entry["layers"], *kind)

    def compare(self, row: dict[str, Any], tb_s: Mapping[str, float]) -> None:
        """Nothing: a row stands for itself."""
