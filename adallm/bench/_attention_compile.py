"""Compile ahead, in several processes, what implementations of decode steps compile when they are called first.

Each process runs a small step of the same kind, which takes some memory of the GPU; Triton and FlashInfer keep what
they compile on disk. What fails here fails again where it is measured, and is dealt with there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from adallm.bench._attention_step import Inputs, Pool, Step

_PROCESSES = 12
_CONTEXT = 64  # tokens of the small step


def tasks(cases: Iterable[tuple[Step, Sequence[str]]]) -> list[tuple[Step, str]]:
    """A small step and an implementation for each kernel that the cases need, what takes longest first."""
    found: dict[Hashable, tuple[Step, str]] = {}
    for step, impls in cases:
        for impl in impls:
            key = _kernel(step, impl)
            if key is not None:
                found.setdefault((impl, *key), (dataclasses.replace(step, context=_CONTEXT, ragged=False), impl))
    return sorted(found.values(), key=lambda task: task[1] != "flashinfer")


def _kernel(step: Step, impl: str) -> tuple[Hashable, ...] | None:
    """What a kernel is compiled for; None for one that is compiled already."""
    if impl == "flashinfer":
        return (step.head_size, step.window is None)
    from adallm.kernels.decode_choice import most_sequences

    heads = (step.heads, step.block, step.window)
    if impl.startswith("vllm-triton"):
        # Its integers are specialized; small batches have another kernel.
        return (*heads, step.batch == 1, step.batch % 16 == 0, step.batch * step.kv_heads <= 128)
    return (*heads, most_sequences(step.batch)) if impl.startswith("adallm") else None


def compile_all(cases: Iterable[tuple[Step, Sequence[str]]]) -> int:
    """How many small steps were run."""
    found = tasks(cases)
    spawn = multiprocessing.get_context("spawn")
    # A process that crashes takes the others with it; then the rest is compiled where it is measured.
    with contextlib.suppress(BrokenProcessPool), ProcessPoolExecutor(_processes(), mp_context=spawn) as pool:
        wait([pool.submit(_compile, *task) for task in found])
    return len(found)


def _processes() -> int:
    return min(os.cpu_count() or 1, _PROCESSES)


def _compile(step: Step, impl: str) -> None:
    import torch

    from adallm.bench._attention_peers import BUILDERS

    pool = Pool(step.kv_heads, step.head_size, step.blocks * step.block, "cuda")
    BUILDERS[impl](Inputs.of(step, pool, 1)).calls[0]()
    torch.cuda.synchronize()
