"""NVFP4 linear layers on one GPU: ours, vLLM's Marlin, Humming, cuBLAS BF16 and FP8, in one run.

Times are medians of CUDA-graph replays over enough copies of the weight that the L2 cache serves none again, the
implementations of a shape and M taking turns, replay by replay. Each is compared with FP32 on the dequantized weight
first: the run stops if ours is beyond its limit, and a peer above 1e-2 has a note in its row. W4A8 is timed with the
quantization of its activations, ``scaled-mm-fp8`` with activations that are quantized already: ``activation_quant``.
``us_fp8_input`` is W4A8 alone, as behind an operation that quantizes, such as a fused RMSNorm.

``gb_s`` counts the weight in its format, the activations as given and the output; ``summary`` computes the ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adallm import results
from adallm.bench._linear_case import SEED, Measurer, WrongResultError
from adallm.bench._linear_record import Record
from adallm.bench._linear_summary import IMPLS, report, summary

__all__ = ["IMPLS", "MODELS", "TOKENS", "main", "report", "summary"]

# Model -> layer -> (N, K): query, key and value fused, and gate and up.
MODELS = {
    "Qwen3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
    "Qwen3-32B": {"qkv": (10240, 5120), "o": (5120, 8192), "gate_up": (51200, 5120), "down": (5120, 25600)},
    "Gemma3-27B": {"qkv": (8192, 5376), "o": (5376, 4096), "gate_up": (43008, 5376), "down": (5376, 21504)},
}
LAYERS = ("qkv", "o", "gate_up", "down")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
SHAPES = {f"{model}.{layer}": nk for model, layers in MODELS.items() for layer, nk in layers.items()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.linear", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="default: all")
    parser.add_argument("--m", nargs="+", type=int, default=list(TOKENS), help="tokens (default: 1 to 8192)")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS), help="default: all")
    parser.add_argument("--repeats", type=int, default=15, help="timed replays for each row (default: %(default)s)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="take no new case once this much time is spent")
    parser.add_argument(
        "--append", action="store_true", help="add what the record of the same commit and GPU lacks, and keep its rows"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="root of the records (default: results)")
    options = parser.parse_args(argv)
    if options.repeats < 15:
        parser.error("--repeats must be at least 15")
    if min(options.m) < 1:
        parser.error("--m must be at least 1")
    options.m = sorted(set(options.m))
    options.models, options.layers = list(dict.fromkeys(options.models)), list(dict.fromkeys(options.layers))
    return options


def plan(options: argparse.Namespace, record: Record) -> list[tuple[str, int, list[str]]]:
    """Shape, M and implementations of every case that the record does not answer yet.

    All rows of a case come from one run, so that a case that gets a new implementation is measured as a whole again.
    """
    cases = []
    for model in options.models:
        for layer in options.layers:
            for m in options.m:
                tried = record.tried((f"{model}.{layer}", m))
                if not tried >= set(options.impls):
                    impls = [impl for impl in IMPLS if impl in tried or impl in options.impls]
                    cases.append((f"{model}.{layer}", m, impls))
    return cases


def run(
    options: argparse.Namespace,
    provenance: Mapping[str, Any],
    *,
    started: float,
    measurer: Callable[..., Any] = Measurer,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure, print and write; the record is written after each shape, so that a crash costs one shape at most.

    Returns:
        an exit code: 1 for a result of ours that is wrong, 2 for a record that cannot be appended to.
    """
    try:
        record = Record(provenance, list(SHAPES), root=options.out, append=options.append)
    except ValueError as error:
        print(f"--append: {error}", file=sys.stderr)
        return 2
    cases = plan(options, record)
    asked = len(options.models) * len(options.layers) * len(options.m)
    print(
        f"{len(cases)} cases to measure on {provenance['gpu']}, {asked - len(cases)} in the record already", flush=True
    )
    if cases:
        measuring = measurer(options.m, repeats=options.repeats)
        record.add_bandwidth(measuring.bandwidth())
        print(", ".join(f"{row['impl']} {row['tb_s']:.2f} TB/s" for row in record.rows if "tb_s" in row), flush=True)
    left = []
    for i, (shape, m, impls) in enumerate(cases):
        if options.budget is not None and clock() - started >= options.budget:
            left = cases[i:]
            break
        try:
            rows, absent = measuring.case(shape, *SHAPES[shape], m, impls)
        except WrongResultError as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
        record.add((shape, m), rows, absent)
        print(f"{shape} M={m}: " + ", ".join(f"{row['impl']} {row['us']:.1f}" for row in rows) + " us", flush=True)
        if i + 1 == len(cases) or cases[i + 1][0] != shape:
            record.write()
    if left:
        print(f"left out, as the budget of {options.budget:g} s is spent; --append takes them up: {_listed(left)}")
    if len(left) < len(cases):
        print(f"wrote {os.path.relpath(record.write())}")
    print(f"\n{report(record.rows)}")
    return 0


def _listed(cases: Sequence[tuple[str, int, Sequence[str]]]) -> str:
    ms: dict[str, list[str]] = {}
    for shape, m, _ in cases:
        ms.setdefault(shape, []).append(str(m))
    return "; ".join(f"{shape} M={','.join(of_shape)}" for shape, of_shape in ms.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the GPU and write ``results/linear/<slug>.json``; 2 and one line where there is no GPU."""
    started = time.monotonic()
    options = parse(argv)
    if not torch.cuda.is_available():
        print("the linear benchmark times GPU kernels, and this machine has no CUDA GPU", file=sys.stderr)
        return 2
    return run(options, results.provenance(seed=SEED), started=started)


if __name__ == "__main__":
    sys.exit(main())
