"""One table at start-up: for each kind of layer, which kernel runs it and why. Then all are known, and compiled."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from adallm import text
from adallm.linear import FP8Linear, NVFP4Linear
from adallm.vllm_plugin import ahead

logger = logging.getLogger("vllm.adallm")

_HEADER = ("layers", "kind", "runs on", "because")


class Report:
    """Collects while the model is built, and is logged once, when the last of our layers is ready."""

    def __init__(self, config: VllmConfig | None) -> None:
        self._config = config
        self._rows: Counter[tuple[str, str, str]] = Counter()
        self._left = 0
        self._linear: list[NVFP4Linear] = []

    def add(self, kind: str, kernel: str, reason: str, *, ours: bool = False) -> None:
        """A layer.

        Args:
            ours: whether ``processed`` will be called for it.
        """
        self._rows[kind, kernel, reason] += 1
        self._left += ours

    def expect(self) -> None:
        """A layer that ``processed`` will be called for, and that may have no row."""
        self._left += 1

    def moved(self, old: tuple[str, str, str], new: tuple[str, str, str]) -> None:
        """A layer that one of ours was to run goes to vLLM's."""
        self._rows[old] -= 1
        self._rows[new] += 1
        self._left -= 1

    def processed(self, linear: NVFP4Linear | FP8Linear | None) -> None:
        """One of our layers has its weights in place; None for one that was expected and is none of ours."""
        if isinstance(linear, NVFP4Linear):
            self._linear.append(linear)
        self._left -= 1
        if not self._left:
            self._log()
            ahead.start(self._config, self._linear)
            self._linear.clear()

    def rows(self) -> list[tuple[str, str, str, str]]:
        """As they are logged, attention included."""
        attention: Counter[tuple[str, str, str]] = Counter()
        context = self._config.compilation_config.static_forward_context if self._config is not None else {}
        for layer in context.values():
            backend = getattr(layer, "attn_backend", None)
            if backend is not None:
                attention["attention", *_attention(layer, backend)] += 1
        both = [*self._rows.items(), *attention.items()]
        return [(str(count), *row) for row, count in both if count]

    def _log(self) -> None:
        if self._config is not None and self._config.parallel_config.rank:
            return
        logger.info("adallm:\n%s", text.table(_HEADER, self.rows(), align="rlll"))


def _attention(layer: Any, backend: Any) -> tuple[str, str]:
    cache = f"KV cache {getattr(layer, 'kv_cache_dtype', 'auto')}"
    if backend.__module__.startswith("adallm."):
        return layer.impl.runs, cache
    if current_platform.is_cpu():
        return f"vLLM {backend.get_name()}", cache
    return f"vLLM {backend.get_name()}", f"{cache}; --attention-backend CUSTOM has adallm's"
