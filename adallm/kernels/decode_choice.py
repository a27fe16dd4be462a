"""How a decode step is launched: rows of a tile, tokens of a step, blocks. All follow from sizes, none from lengths."""

from __future__ import annotations

import dataclasses

import triton

from adallm.kernels.choice import GPU
from adallm.paged import Shape


@dataclasses.dataclass(frozen=True)
class Config:
    """A launch.

    Attributes:
        n: tokens of a step, a power of two.
        warps: warps in a block.
        stages: of Triton's pipeline. Block numbers are fetched a stage ahead of keys and values, so that 2 s + 1 stages
            have s steps on their way.
        programs: blocks for each multiprocessor, which share all steps.
        parts: of a sequence, that are made before each has 16 steps.
    """

    n: int
    warps: int
    stages: int
    programs: int
    parts: int = 16


# By rows of a tile: heads of up to 128 columns, and of up to 256, both in E4M3; 16 bits take half the tokens. Those of
# 16 rows for "sm_90" are the fastest of several on an H100. The others were not timed; those for "sm_89", which serves
# "sm_80" too, compile without spills into 99 KB of shared memory.
TABLES = {
    "sm_90": {16: (Config(128, 4, 5, 2), Config(64, 8, 5, 1)), 32: (Config(32, 4, 5, 2), Config(32, 8, 5, 1))},
    "sm_89": {16: (Config(64, 4, 5, 2), Config(64, 8, 5, 1)), 32: (Config(32, 4, 5, 2), Config(32, 8, 5, 1))},
}


def choose(shape: Shape, itemsize: int, family: str) -> Config:
    """The configuration for a step.

    Args:
        itemsize: bytes of an element of the cache.
        family: of ``choice.GPU``.
    """
    table = TABLES[family if family in TABLES else "sm_89"]
    config = table[rows(shape)][shape.head_size > 128]
    return dataclasses.replace(config, n=config.n // itemsize)


def programs(shape: Shape, itemsize: int, gpu: GPU) -> int:
    """Blocks of a launch: groups of one for each tile of a sequence."""
    config, of_group = choose(shape, itemsize, gpu.family), _tiles(shape)
    return max(config.programs * gpu.sms // of_group, 1) * of_group


def rows(shape: Shape) -> int:
    """Rows of a tile: query tokens times the query heads of a KV head; of more than 32 there are several tiles."""
    return 16 if _rows(shape) <= 16 else 32


def tiles(shape: Shape) -> int:
    """Tiles of all sequences, each with a counter."""
    return shape.batch * _tiles(shape)


def workspace_floats(shape: Shape, programs: int) -> int:
    """FP32 numbers in which ``programs`` blocks leave parts of tiles: each of one that it ends, and of one that it does
    not.
    """
    return 2 * programs * rows(shape) * (triton.next_power_of_2(shape.head_size) + 3)


def _rows(shape: Shape) -> int:
    return shape.queries * (shape.q_heads // shape.kv_heads)


def _tiles(shape: Shape) -> int:
    return shape.kv_heads * triton.cdiv(_rows(shape), rows(shape))
