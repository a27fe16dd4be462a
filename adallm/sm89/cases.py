"""Layers of a real model and decode steps, and the build that each takes on an Ada card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adallm.hardware import GPU, GPUS
from adallm.kernels import choice
from adallm.kernels.matmul import Config
from adallm.paged import Shape
from adallm.sm89 import model
from adallm.sm89.build import attention_kind
from adallm.sm89.counts import Counts
from adallm.sm89.model import Constants, DecodeStep, Product, Projection

# N and K.
LAYERS = {
    "Qwen3-8B.qkv": (6144, 4096),
    "Qwen3-8B.o": (4096, 4096),
    "Qwen3-8B.gate_up": (24576, 4096),
    "Qwen3-8B.down": (4096, 12288),
}
TOKENS = (1, 16, 64, 512, 4096)
KINDS = ("bf16", "fp8")
# Query heads, KV heads and head size; sequences and tokens of each, in an E4M3 cache.
HEADS = ((32, 8, 128), (16, 2, 256))
STEPS = ((1, 8192), (1, 131072), (32, 1024), (64, 4096))
BLOCK = 16
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
    def sizes(self) -> dict[str, Any]:
        return {"n": self.product.n, "k": self.product.k}

    @property
    def config(self) -> Config:
        """As it is launched: with the splits of this product."""
        return replace(self.counts.config, splits=self.product.splits)

    @property
    def label(self) -> str:
        """Of the configuration as it is launched."""
        return replace(self.counts, config=self.config).label

    def project(self, gpu: GPU, constants: Constants) -> Projection:
        return model.project(self.counts, gpu, self.product, constants)


@dataclass(frozen=True)
class DecodeCase:
    """A decode step, and the counts of the build that computes it."""

    step: DecodeStep
    counts: Counts

    @property
    def heads(self) -> str:
        """``"32/8/128"``"""
        shape = self.step.shape
        return f"{shape.q_heads}/{shape.kv_heads}/{shape.head_size}"

    @property
    def key(self) -> tuple[str, str, int]:
        """``"decode 32/8/128 64x4096"``, ``"decode"`` and the number of sequences."""
        batch = self.step.shape.batch
        return f"decode {self.heads} {batch}x{self.step.context}", "decode", batch

    @property
    def sizes(self) -> dict[str, Any]:
        return {"heads": self.heads, "block": self.step.shape.block_size, "context": self.step.context}

    @property
    def label(self) -> str:
        return self.counts.label

    def project(self, gpu: GPU, constants: Constants) -> Projection:
        return model.project_decode(self.counts, gpu, self.step, constants)


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


def decode_cases(counts: Sequence[Counts]) -> list[DecodeCase]:
    """Every step of ``STEPS`` with every ``HEADS``, but for builds that have a ``problem``."""
    by_kind = {c.kind: c for c in counts if c.kernel == "paged_decode_kernel" and not c.problem}
    found = []
    for heads in HEADS:
        for batch, context in STEPS:
            shape = Shape(batch, 1, *heads, batch * context // BLOCK, BLOCK)
            if build := by_kind.get(attention_kind(shape, "fp8")):
                found.append(DecodeCase(DecodeStep(shape, context), build))
    return found
