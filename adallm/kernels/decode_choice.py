"""How a decode step is launched: rows of a tile, tokens of a step, blocks. All follow from sizes, none from lengths."""

from __future__ import annotations

import dataclasses
import functools
import itertools

from adallm.kernels.choice import GPU
from adallm.kernels.sizes import cdiv, next_power_of_2
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
        parts: of a sequence on the average, that are made before each has 4 steps.
        whole: where all sequences are as long and blocks would share tiles of them, some blocks are left out so that
            each has tiles, or parts of one, of its own; but not for more than so many tiles to a block.
        registers: of a thread, at the most.
    """

    n: int
    warps: int
    stages: int
    programs: int
    parts: int
    whole: int = 1
    # Left alone the compiler aims at more blocks than are launched, and spills for it.
    registers: int = 255


FEW = 64
# Sequences up to which decode attention writes new keys and values itself in vLLM's steps. With more a program waits
# for what it writes several times, which on an H100 took as long as the launch that it saves; there is no record of it.
WRITES_UP_TO = FEW
# By rows of a tile: heads of up to 128 columns, and of up to 256; each for one sequence, for up to FEW and for more.
# All are for E4M3; 16 bits take half the tokens. Those of 16 rows for "sm_90" were chosen by times on an H100 of which
# there is no record. The others were not timed; those for "sm_89", which serves "sm_80" too, compile without spills
# into 99 KB of shared memory.
TABLES = {
    "sm_90": {
        16: (
            (Config(64, 4, 5, 2, 8), Config(128, 4, 5, 2, 16), Config(64, 4, 5, 3, 16, registers=168)),
            (Config(64, 8, 5, 1, 128), *(Config(32, 4, 5, 2, 128, whole=2),) * 2),
        ),
        32: ((Config(32, 4, 5, 2, 16),) * 3, (Config(32, 8, 5, 1, 128),) * 3),
    },
    "sm_89": {
        16: ((Config(64, 4, 5, 2, 16),) * 3, (Config(64, 8, 5, 1, 128),) * 3),
        32: ((Config(32, 4, 5, 2, 16),) * 3, (Config(32, 8, 5, 1, 128),) * 3),
    },
}


def choose(shape: Shape, itemsize: int, family: str) -> Config:
    """The configuration for a step.

    Args:
        itemsize: bytes of an element of the cache.
        family: of ``choice.GPU``.
    """
    several = (shape.batch > 1) + (shape.batch > FEW)
    config = TABLES.get(family, TABLES["sm_89"])[rows(shape)][shape.head_size > 128][several]
    return dataclasses.replace(config, n=config.n // itemsize)


def programs(shape: Shape, itemsize: int, gpu: GPU) -> int:
    """Blocks of a launch: groups of one for each tile of a sequence."""
    of_group = tiles(shape)
    return max(choose(shape, itemsize, gpu.family).programs * gpu.sms // of_group, 1) * of_group


@functools.lru_cache(maxsize=1 << 12)
def chosen(shape: Shape, itemsize: int, gpu: GPU) -> tuple[Config, int]:
    """``choose`` and ``programs``."""
    return choose(shape, itemsize, gpu.family), programs(shape, itemsize, gpu)


def workspace_sizes(shape: Shape, itemsize: int, gpu: GPU) -> tuple[int, int]:
    """FP32 and int32 numbers of a workspace for a step."""
    count = programs(shape, itemsize, gpu)
    return workspace_floats(shape, count), 3 * count


def most_programs(shape: Shape, itemsize: int, gpu: GPU) -> int:
    """Of a launch with as many query tokens or fewer, and any number of sequences."""
    sizes = itertools.product((1, 2, FEW + 1), range(1, shape.queries + 1))
    return max(programs(dataclasses.replace(shape, batch=b, queries=t), itemsize, gpu) for b, t in sizes)


def rows(shape: Shape) -> int:
    """Rows of a tile: query tokens times the query heads of a KV head; of more than 32 there are several tiles."""
    return 16 if _rows(shape) <= 16 else 32


def most_sequences(batch: int) -> int:
    """That the kernel for a batch takes: 1, 16, 64, 256 and so on, so that few kernels serve any batch."""
    size = 1 if batch <= 1 else 16
    while size < batch:
        size *= 4
    return size


def tiles(shape: Shape) -> int:
    """Tiles of a sequence."""
    return shape.kv_heads * cdiv(_rows(shape), rows(shape))


def workspace_floats(shape: Shape, programs: int) -> int:
    """FP32 numbers that ``programs`` blocks leave: each a part of a tile that it ends, one of a tile that it does not,
    and parts of others, joined.
    """
    return 3 * programs * rows(shape) * (next_power_of_2(shape.head_size) + 3)


def _rows(shape: Shape) -> int:
    return shape.queries * (shape.q_heads // shape.kv_heads)
