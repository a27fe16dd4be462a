"""Projected time of a product, or of a decode step, on a card of which there is a data sheet.

``us = latency + max(memory, issue, tensor)``, each being the time that this resource alone would take::

    memory = (weight + activations + output) / bandwidth
    issue  = clocks of a block * blocks of the busiest SM / (clock rate * issue efficiency)
    tensor = operations of a block * blocks of the busiest SM / tensor rate of an SM

*Bandwidth* is 0.9 of the data sheet's, or what the loads in flight allow if that is less: ``stages - 1`` steps of each
block that is resident, over the 0.7 us that a load from DRAM takes. Resident are ``blocks_per_sm`` on each SM, or an
equal share of the blocks for each wave of them.

*Clocks of a block* are those of its main loop for every step of K, and those of all other instructions once, for each
warp of a scheduler; among the others is what takes FP8 sums out of the tensor core, in one step of many. The loop takes
the most of: a clock for each instruction, two for each of the ALU, two for each of the FMA pipe. *Blocks of the busiest
SM* are ``ceil(blocks / SMs)``, which is what a last, partly filled wave costs.

Of a decode step memory is the keys and values that are read, and the work is counted in steps of the busiest SM::

    steps = ceil(blocks / SMs) * ceil(steps of all sequences / groups of blocks)

What a launch takes to find its sequences and to join their parts is in its latency, which therefore is another.

Left out: clocks other than boost, the sums of split blocks, activations that several blocks read (the L2 cache has
both), and whatever makes the three overlap less.

Hopper has no FP8 ``mma.sync``: what its driver makes of the same PTX converts to FP16 first. Times there are projected
from counts of that (``counts.measured("sm_90")``).

Two constants come from no binary and no data sheet: the issue efficiency, and the latency of a launch with its first
loads and last stores. ``fit`` takes them from times of this PTX on another GPU: the pair on a grid with the least sum
of squared ``log(projected / measured)``, of several such pairs that with the lowest efficiency. Until there are any,
``ASSUMED`` and ``ASSUMED_DECODE`` stand for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from adallm.hardware import GPU, SCHEDULERS, blocks_per_sm
from adallm.kernels import decode_choice, matmul
from adallm.kernels.layout import TILE_K
from adallm.paged import Shape
from adallm.sm89.counts import Counts

DRAM_EFFICIENCY = 0.9
DRAM_LATENCY_US = 0.7
_BITS = 4.5  # of a weight, with its share of a scale
_MMA = 2 * 16 * 8 * 16  # operations of HMMA.16816


@dataclass(frozen=True)
class Constants:
    """``issue``: share of the issue slots that a loop keeps busy. ``latency_us``: what every launch takes."""

    issue: float
    latency_us: float


ASSUMED = Constants(issue=0.7, latency_us=4.0)
ASSUMED_DECODE = Constants(issue=0.5, latency_us=12.0)
ALONE = Constants(issue=1.0, latency_us=0.0)
_ISSUE = tuple(i / 50 for i in range(5, 51))
_LATENCY = tuple(i / 4 for i in range(81))


@dataclass(frozen=True)
class Product:
    """``[m, k] x [n, k]`` in ``splits`` parts along K."""

    m: int
    n: int
    k: int
    splits: int = 1


@dataclass(frozen=True)
class DecodeStep:
    """``shape.queries`` new tokens for each of ``shape.batch`` sequences with ``context`` tokens in the cache."""

    shape: Shape
    context: int


@dataclass(frozen=True)
class Projection:
    """Times in us of each resource alone, and together."""

    us: float
    memory_us: float
    issue_us: float
    tensor_us: float

    @property
    def bound(self) -> str:
        """``"memory"``, ``"issue"`` or ``"tensor"``: the resource that takes longest."""
        return max(("memory", "issue", "tensor"), key=lambda name: getattr(self, f"{name}_us"))


def project(counts: Counts, gpu: GPU, product: Product, constants: Constants = ASSUMED) -> Projection:
    """Time of a product on a GPU, in us.

    Raises:
        ValueError: ``counts`` are of another kernel.
    """
    config = counts.config
    if not isinstance(config, matmul.Config):
        raise ValueError(f"{counts.kernel} multiplies no weight; this projection is for nvfp4_matmul")
    blocks = _cdiv(product.n, config.n) * _cdiv(product.m, config.m) * product.splits
    busiest = _cdiv(blocks, gpu.sms)
    steps = _cdiv(_cdiv(product.k, config.slices * config.k), product.splits)

    clocks = steps * _step_clocks(counts) + counts.outside * counts.warps / SCHEDULERS
    operations = 2 * config.n * config.m * config.k * config.slices * steps
    tflops = (gpu.fp8_tflops if counts.mma.startswith("QMMA") else gpu.fp16_tflops) * gpu.mma_sync

    memory_us = _bytes(counts.kind, product) / _bandwidth(counts, gpu, blocks) / 1e3
    return _together(gpu, constants, memory_us, clocks * busiest, operations * busiest, tflops)


def project_decode(counts: Counts, gpu: GPU, step: DecodeStep, constants: Constants = ASSUMED_DECODE) -> Projection:
    """Time of a decode step without a window on a GPU, in us.

    Raises:
        ValueError: ``counts`` are of another kernel.
    """
    config, shape = counts.config, step.shape
    if not isinstance(config, decode_choice.Config):
        raise ValueError(f"{counts.kernel} reads no cache; this projection is for paged_decode_kernel")
    tiles, steps = decode_choice.tiles(shape), shape.batch * _cdiv(step.context, config.n)
    # As the kernel shares its steps.
    groups = min(max(config.programs * gpu.sms // tiles, 1), steps, max(config.parts * shape.batch, steps // 4))
    busiest = _cdiv(groups * tiles, gpu.sms) * _cdiv(steps, groups)

    numbers = 2 * shape.batch * step.context * shape.kv_heads * shape.head_size
    memory_us = numbers * (1 if counts.kind.startswith("fp8") else 2) / (DRAM_EFFICIENCY * gpu.dram_gb_s) / 1e3
    operations = busiest * _MMA * counts.tensor / counts.steps * counts.warps
    tflops = gpu.fp16_tflops * gpu.mma_sync
    return _together(gpu, constants, memory_us, busiest * _step_clocks(counts), operations, tflops)


def _together(
    gpu: GPU, constants: Constants, memory_us: float, clocks: float, operations: float, tflops: float
) -> Projection:
    """Of the clocks and operations of the busiest SM, on a GPU with this tensor rate."""
    issue_us = clocks / (gpu.clock_ghz * constants.issue) / 1e3
    tensor_us = operations / (tflops / gpu.sms) / 1e6
    return Projection(constants.latency_us + max(memory_us, issue_us, tensor_us), memory_us, issue_us, tensor_us)


def _step_clocks(counts: Counts) -> float:
    """Of a block alone on an SM."""
    return max(counts.loop, 2 * counts.alu, 2 * counts.fma) / counts.steps * counts.warps / SCHEDULERS


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _bandwidth(counts: Counts, gpu: GPU, blocks: int) -> float:
    """GB/s."""
    config = counts.config
    fits = gpu.sms * max(blocks_per_sm(gpu, registers=counts.regs, shared=counts.shared, warps=counts.warps), 1)
    resident = blocks / _cdiv(blocks, fits)
    step = config.slices * config.k * (config.n * _BITS / 8 + config.m * (1 if counts.kind == "fp8" else 2))
    in_flight = resident * step * max(config.stages - 1, 1)
    return min(DRAM_EFFICIENCY * gpu.dram_gb_s, in_flight / DRAM_LATENCY_US / 1e3)


def _bytes(kind: str, p: Product) -> float:
    weight = p.n * _cdiv(p.k, TILE_K) * TILE_K * _BITS / 8 + 4 * p.n
    activations = p.m * p.k * (1 if kind == "fp8" else 2)
    return weight + activations + 2 * p.m * p.n


def fit(measured: Sequence[tuple[Projection, float]]) -> Constants:
    """The constants that project these times, in us, best.

    Args:
        measured: projections with ``ALONE``, and the times.
    """
    best, least = ALONE, math.inf
    for issue, latency in itertools.product(_ISSUE, _LATENCY):
        error = sum(
            math.log((latency + max(one.memory_us, one.issue_us / issue, one.tensor_us)) / us) ** 2
            for one, us in measured
        )
        if error < least:
            best, least = Constants(issue, latency), error
    return best
