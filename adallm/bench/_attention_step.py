"""Decode steps that are measured, and their inputs: copies of a paged cache that share a block table, as the layers of
a model do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adallm import fp8
from adallm.bench._attention_summary import SHORTEST

SEED = 0
FILLED_AT_ONCE = 1 << 16  # tokens
TABLE_WIDTH = 16  # of which a block table's width is a multiple


@dataclass(frozen=True)
class Step:
    """One new token for each sequence of a batch.

    Attributes:
        batch: sequences.
        context: tokens of each; the most of one if ``ragged``, where lengths are log-uniform from ``SHORTEST`` on.
        window: tokens that are seen, or None for all.
    """

    q_heads: int
    kv_heads: int
    head_size: int
    block: int
    batch: int
    context: int
    ragged: bool = False
    window: int | None = None

    @property
    def heads(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}/{self.head_size}"

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        if not self.ragged:
            return [self.context] * self.batch
        generator = torch.Generator().manual_seed(SEED)
        at = torch.rand(self.batch, generator=generator, dtype=torch.float64).tolist()
        return [round(SHORTEST * math.exp(x * math.log(self.context / SHORTEST))) for x in at]

    @property
    def tokens_read(self) -> int:
        """Tokens whose keys and values the result depends on."""
        return sum(min(length, self.window or length) for length in self.lengths)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each sequence, first and last + 1 of its blocks with a token that is read."""
        return [
            (max(length - (self.window or length), 0) // self.block, -(-length // self.block))
            for length in self.lengths
        ]

    @property
    def blocks(self) -> int:
        """Blocks with a token that is read, of one copy of the cache."""
        return sum(end - begin for begin, end in self.spans)

    def nbytes(self, itemsize: int) -> int:
        """Of the keys and values that are read."""
        return self.tokens_read * 2 * self.kv_heads * self.head_size * itemsize


class Pool:
    """Standard normal keys and values in E4M3, of which steps take their caches; the scale is 1."""

    def __init__(self, kv_heads: int, head_size: int, tokens: int, device: str | torch.device) -> None:
        self.shape, self.device = (kv_heads, head_size), device
        generator = torch.Generator(device).manual_seed(SEED)
        self._fp8 = [torch.empty(tokens, *self.shape, dtype=torch.float8_e4m3fn, device=device) for _ in range(2)]
        for stored in self._fp8:
            for part in stored.split(FILLED_AT_ONCE):
                part.copy_(fp8.to_e4m3(torch.randn(part.shape, generator=generator, device=device)))

    @functools.cached_property
    def _bf16(self) -> list[Tensor]:
        """The same numbers."""
        return [stored.bfloat16() for stored in self._fp8]

    def caches(self, block: int, blocks: int, copies: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``[blocks, block, Hkv, D]`` of each copy, E4M3 or bfloat16; no two share memory."""
        stored = self._fp8 if dtype == torch.float8_e4m3fn else self._bf16
        size = blocks * block
        k, v = ([x[i * size : (i + 1) * size].view(blocks, block, *self.shape) for i in range(copies)] for x in stored)
        return list(zip(k, v, strict=True))


@dataclass(frozen=True, eq=False)
class Inputs:
    """What implementations of a step take.

    Attributes:
        q: BF16 ``[B, Hq, D]``, standard normal.
        table: int32 ``[B, width]``, the same for all copies of the cache, blocks in random order. Entries that are not
            read, before a window or behind the end, name a block that another reads.
        seq_lens: int32 ``[B]``.
    """

    step: Step
    q: Tensor
    table: Tensor
    seq_lens: Tensor
    pool: Pool
    copies: int

    @classmethod
    def of(cls, step: Step, pool: Pool, copies: int) -> Inputs:
        generator = torch.Generator().manual_seed(SEED)
        width = -(-max(step.lengths) // step.block)
        width = -(-width // TABLE_WIDTH) * TABLE_WIDTH
        table = torch.randint(step.blocks, (step.batch, width), generator=generator, dtype=torch.int32)
        order = torch.randperm(step.blocks, generator=generator).int()
        taken = 0
        for row, (begin, end) in zip(table, step.spans, strict=True):
            row[begin:end] = order[taken : taken + end - begin]
            taken += end - begin
        q = torch.randn(step.batch, step.q_heads, step.head_size, generator=generator).bfloat16()
        seq_lens = torch.tensor(step.lengths, dtype=torch.int32)
        return cls(step, *(x.to(pool.device) for x in (q, table, seq_lens)), pool, copies)

    def caches(self, dtype: torch.dtype = torch.float8_e4m3fn) -> list[tuple[Tensor, Tensor]]:
        return self.pool.caches(self.step.block, self.step.blocks, self.copies, dtype)


def pool_tokens(steps: Sequence[tuple[Step, int]]) -> int:
    """What a pool must hold for these steps and their numbers of copies, one after the other."""
    return max(step.blocks * step.block * copies for step, copies in steps)
