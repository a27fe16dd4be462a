"""Decode attention over an FP8 KV cache on one GPU: ours, FlashInfer, vLLM's Triton kernel and FA3, in one run.

Times are medians of CUDA-graph replays over enough copies of the cache that the L2 cache serves none again, the
implementations of a step taking turns, replay by replay. The copies share a block table, as the layers of a model do;
blocks are in random order. Each result is compared with FP32 on the same cache first: the run stops if ours is off by
more than 5e-3, a peer above that has a note in its row, and one above 0.1 has none. Ours and two peers take BF16
queries; ``vllm-triton-fp8q`` (as vLLM 0.26 serves) and ``fa3-fp8`` (Hopper only) take FP8 ones, quantized before the
time begins. ``adallm-bf16`` is our kernel on a BF16 cache with the same numbers.

``tb_s`` counts keys and values that must be read, with a window those inside. A step whose ``ragged`` is true has
lengths that are log-uniform from 64 to ``context``. ``adallm-write-kv`` quantizes new tokens into the cache; its
``tb_s`` counts bytes read and written. ``summary`` computes the ratios.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adallm import results
from adallm.bench import _run
from adallm.bench._attention_case import Measurer, Writes
from adallm.bench._attention_record import Record
from adallm.bench._attention_step import SEED, Step
from adallm.bench._attention_summary import DECODE, IMPLS, WRITE, report, step_name, summary

__all__ = ["HEADS", "IMPLS", "STEPS", "main", "report", "summary"]

# Query heads, KV heads and head size -> window: Qwen3-8B, Qwen3-32B, Gemma3-27B's local layers, and few large heads.
HEADS = {"32/8/128": None, "64/8/128": None, "32/16/128": 1024, "16/2/256": None}
BLOCKS = (16, 64)
# Batch, context, ragged.
STEPS = {
    step_name(*step): step
    for step in (
        *((1, context, False) for context in (1024, 8192, 32768, 131072)),
        *((8, context, False) for context in (8192, 32768)),
        *((32, context, False) for context in (1024, 8192)),
        (64, 4096, False),
        (128, 2048, False),
        (256, 1024, False),
        (64, 16384, True),
    )
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.attention", description=__doc__.partition("\n")[0])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: all")
    parser.add_argument("--blocks", nargs="+", type=int, choices=BLOCKS, default=list(BLOCKS), help="default: all")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS), help="default: all")
    _run.add_options(parser)
    options = parser.parse_args(argv)
    _run.check_options(parser, options)
    for name in ("heads", "blocks", "steps", "impls"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    return options


def cases(options: argparse.Namespace) -> list[_run.Case]:
    """With each kind of heads and each block size: writing, and all steps that are asked for."""
    found = []
    decode = [impl for impl in options.impls if impl in DECODE]
    for heads in options.heads:
        sizes = tuple(map(int, heads.split("/")))
        for block in options.blocks:
            group = f"{heads} block {block}"
            if WRITE in options.impls:
                found.append(_run.Case((heads, block, WRITE), group, "write_kv", (Writes(*sizes, block),), [WRITE]))
            for name in options.steps if decode else ():
                step = Step(*sizes, block, *STEPS[name], window=HEADS[heads])
                found.append(_run.Case((heads, block, *STEPS[name]), group, name, (step,), decode))
    return found


def run(
    options: argparse.Namespace,
    provenance: Mapping[str, Any],
    *,
    started: float,
    measurer: Callable[..., Any] = Measurer,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure, print and write, as ``_run.run`` does; the record is written after each kind of heads and blocks."""
    return _run.run(
        options,
        lambda: Record(provenance, list(HEADS), list(STEPS.values()), root=options.out, append=options.append),
        cases(options),
        impls=IMPLS,
        gpu=provenance["gpu"],
        measurer=lambda planned: measurer([(*case.arguments, case.impls) for case in planned], repeats=options.repeats),
        report=report,
        listed=_listed,
        started=started,
        clock=clock,
    )


def _listed(left: Sequence[_run.Case]) -> str:
    names: dict[str, list[str]] = {}
    for case in left:
        names.setdefault(case.group, []).append(case.name)
    return "; ".join(f"{group}: {', '.join(of_group)}" for group, of_group in names.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the GPU and write ``results/attention/<slug>.json``; 2 and one line where there is no GPU."""
    started = time.monotonic()
    options = parse(argv)
    if not torch.cuda.is_available():
        print("the attention benchmark times GPU kernels, and this machine has no CUDA GPU", file=sys.stderr)
        return 2
    return run(options, results.provenance(seed=SEED), started=started)


if __name__ == "__main__":
    sys.exit(main())
