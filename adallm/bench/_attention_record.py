"""The record of the attention benchmark: a case is a decode step, or the writing of heads and blocks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from adallm.bench import _record
from adallm.bench._attention_summary import IMPLS, WRITE, key_of


class Record(_record.Record):
    """As there.

    Args:
        heads, steps: names, and batch, context and ragged, in their order.
    """

    experiment = "attention"

    def __init__(
        self,
        provenance: Mapping[str, Any],
        heads: Sequence[str],
        steps: Sequence[tuple[int, int, bool]],
        **options: Any,
    ) -> None:
        self._heads, self._steps = list(heads), list(steps)
        super().__init__(provenance, **options)

    def case_of(self, entry: _record.Entry) -> Hashable | None:
        if entry["impl"] in _record.BANDWIDTHS:
            return None
        return (entry["heads"], entry["block"], WRITE) if entry["impl"] == WRITE else key_of(entry)

    def order(self, entry: _record.Entry) -> tuple[int, ...]:
        first = (self._heads.index(entry["heads"]), entry["block"])
        if entry["impl"] == WRITE:
            return (*first, len(self._steps), entry["tokens"])
        return (*first, self._steps.index(key_of(entry)[2:]), IMPLS.index(entry["impl"]))

    def compare(self, row: dict[str, Any], tb_s: Mapping[str, float]) -> None:
        against = "copy" if row["impl"] == WRITE else "read"
        row[f"share_of_{against}"] = round(row["tb_s"] / tb_s[against], 4)
