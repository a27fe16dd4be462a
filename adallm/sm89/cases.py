"""Layers of a real model, and the build that each takes on an Ada card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adallm.hardware import GPUS
from adallm.kernels import choice
from adallm.kernels.matmul import Config
from adallm.sm89.counts import Counts
from adallm.sm89.model import Product

# N and K.
LAYERS = {
    "Qwen3-8B.qkv": (6144, 4096),
    "Qwen3-8B.o": (4096, 4096),
    "Qwen3-8B.gate_up": (24576, 4096),
    "Qwen3-8B.down": (4096, 12288),
}
TOKENS = (1, 16, 64, 512, 4096)
KINDS = ("bf16", "fp8")
CARD = "RTX 4090"


@dataclass(frozen=True)
class Case:
    """A layer at M tokens, and the counts of the build that computes it."""

    shape: str
    product: Product
    counts: Counts

    @property
    def key(self) -> tuple[str, str, int]:
        """Layer, kind and M."""
        return self.shape, self.counts.kind, self.product.m

    @property
    def config(self) -> Config:
        """As it is launched: with the splits of this product."""
        return replace(self.counts.config, splits=self.product.splits)

    @property
    def label(self) -> str:
        """Of the configuration as it is launched."""
        return replace(self.counts, config=self.config).label


def cases(counts: Sequence[Counts]) -> list[Case]:
    """Every layer, kind and M with the configuration that the table chooses on ``CARD``.

    Left out is what the table leaves to a library, and what has a ``problem``.
    """
    by_config = {(c.kind, c.config): c for c in counts if c.config is not None and not c.problem}
    # No card of this name was ever tuned, so that the table alone decides.
    card = choice.GPU("sm_89", GPUS[CARD].sms, "no card")
    found = []
    for shape, (n, k) in LAYERS.items():
        for kind in KINDS:
            for m in TOKENS:
                config = choice.choose(m, n, k, kind, card)
                # However many splits there are, it is one binary.
                build = config and by_config.get((kind, replace(config, splits=min(config.splits, 2))))
                if build:
                    found.append(Case(shape, Product(m, n, k, config.splits), build))
    return found
