"""What each build takes on an Ada SM, read back from its binary; or what its PTX takes when assembled for another GPU.

The kernels of a process are either compiled or, with ``TRITON_INTERPRET``, interpreted. So the reading is done by
another process, ``python -m adallm.sm89``, which does not inherit that.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Any

from triton.compiler import CompiledKernel

from adallm.hardware import GPUS, blocks_per_sm
from adallm.kernels import matmul
from adallm.kernels.dequant import check_registers
from adallm.kernels.layout import TILE_K, TILE_N
from adallm.sm89 import sass
from adallm.sm89.build import CONFIG, Config, Named, compiled

# The limits of an SM are the same for every Ada GPU.
ADA = GPUS["RTX 4090"]


@dataclass(frozen=True)
class Counts:
    """Read from one binary.

    Attributes:
        kernel, kind, config: as ``build.Named`` has them.
        warps: of a block.
        regs: registers of a thread.
        spills: bytes a thread moves to and from local memory.
        shared: bytes of a block.
        blocks_per_sm: resident at once on an Ada SM.
        mma: the tensor-core instruction, ``""`` for none.
        loop: instructions in the main loop, or in all if there is none.
        outside: instructions outside the main loop.
        steps: steps of K, or of tokens, in one pass of the loop, above 1 where ptxas unrolled it.
        alu, fma, tensor, memory, other: ``loop`` by pipe.
        instr_per_weight: instructions of the loop for each weight, or number of the cache, that is the share of a
            thread; 0 for a kernel that reads neither.
        problem: why there is no binary or it would compute something else, ``""`` if all is well.
    """

    kernel: str
    kind: str
    config: Config | None
    warps: int
    regs: int
    spills: int
    shared: int
    blocks_per_sm: int
    mma: str
    loop: int
    outside: int
    steps: int
    alu: int
    fma: int
    tensor: int
    memory: int
    other: int
    instr_per_weight: float
    problem: str

    @property
    def label(self) -> str:
        """``"n64 m8 k64 slices4 splits1 warps4 stages3"``, or the kind for a kernel without configurations."""
        if self.config is None:
            return self.kind
        if isinstance(self.config, matmul.Config):
            return self.config.label
        return " ".join(f"{name}{value}" for name, value in vars(self.config).items())


def count(named: Named, gpu: str = "sm_89") -> Counts:
    """Compile a build for sm_89 and read it back, or what a driver makes of its PTX on another GPU; where that fails,
    zeros and the message in ``problem``.
    """
    try:
        kernel = compiled(named.build)
        cubin = kernel.asm["cubin"] if gpu == "sm_89" else sass.assembled(kernel.asm["ptx"], gpu)
        return _read(named, kernel, sass.listing(cubin))
    except Exception as error:
        zeros = {field.name: 0 for field in fields(Counts)} | {"instr_per_weight": 0.0, "mma": ""}
        return Counts(**zeros | {**_names(named), "problem": f"{type(error).__name__}: {error}"})


def _names(named: Named) -> dict[str, Any]:
    return {"kernel": named.kernel, "kind": named.kind, "config": named.config}


def _read(named: Named, kernel: CompiledKernel, text: str) -> Counts:
    found = sass.instructions(text)
    loop = sass.main_loop(found, rare=bool(dict(named.build.constants).get("PROMOTE")))
    outside = len(found) - len(loop) if loop else 0
    loop = loop or [body for _, body in found]
    warps, regs, shared = kernel.metadata.num_warps, sass.registers(text), kernel.metadata.shared
    steps = _steps(named, kernel, loop)
    weights = steps * _weights(named, warps)
    if isinstance(named.config, matmul.Config):
        check_registers(kernel.asm["ttgir"])
    return Counts(
        **_names(named),
        warps=warps,
        regs=regs,
        spills=sass.spill_bytes(text),
        shared=shared,
        blocks_per_sm=blocks_per_sm(ADA, registers=regs, shared=shared, warps=warps),
        mma=", ".join(sorted(set(sass.mma(loop)))),
        loop=len(loop),
        outside=outside,
        steps=steps,
        **sass.pipes(loop),
        instr_per_weight=round(len(loop) / weights, 3) if weights else 0.0,
        problem="",
    )


def _weights(named: Named, warps: int) -> float:
    """Weights, or numbers of the cache, for each thread of a block in one step."""
    constants = dict(named.build.constants)
    tile = constants.get("R", 0) * TILE_N * constants.get("C", 0) * TILE_K * constants.get("SLICES", 1)
    cache = 2 * constants.get("N", 0) * constants.get("D", 0)
    return (tile or cache) / (32 * warps)


def _steps(named: Named, kernel: CompiledKernel, loop: list[str]) -> int:
    """Steps in a pass of the loop: its tensor-core instructions over those of a step."""
    config = named.config
    if config is None:
        return 1
    columns = sum(32 if ".16832." in name else 16 for name in sass.mma(loop))
    if isinstance(config, matmul.Config):
        steps = 16 * 8 * columns * config.warps / (config.n * config.m * config.k * config.slices)
    else:
        # Warps may compute the same, so that sizes do not tell; PTX has one step.
        ptx = kernel.asm["ptx"]
        steps = columns / (16 * ptx.count("mma.sync") + 16 * len(re.findall(r"mma\.sync\S*\.m16n8k32", ptx)))
    if steps < 1 or steps % 1:
        raise RuntimeError(f"the main loop has {steps} times the products of a step")
    return int(steps)


def row(counts: Counts) -> dict[str, Any]:
    """As JSON has it."""
    return {**vars(counts), "config": counts.config and vars(counts.config)}


@functools.cache
def measured(gpu: str = "sm_89") -> tuple[Counts, ...]:
    """``count`` of every build, by two processes; once in the life of this one.

    Args:
        gpu: that the sm_89 PTX is assembled for.

    Raises:
        RuntimeError: that process failed, with what it wrote.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "adallm.sm89", gpu], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"python -m adallm.sm89 failed:\n{done.stderr[-4000:]}")
    return tuple(
        Counts(**{**found, "config": found["config"] and CONFIG[found["kernel"]](**found["config"])})
        for found in json.loads(done.stdout)
    )
