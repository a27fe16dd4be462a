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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adallm import results
from adallm.bench import _run
from adallm.bench._linear_case import SEED, Measurer
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
# Powers of two, which fill the tiles of all kernels, and some between them, which do not.
TOKENS = (1, 2, 4, 8, 16, 24, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 3000, 4096, 8192)
SHAPES = {f"{model}.{layer}": nk for model, layers in MODELS.items() for layer, nk in layers.items()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.linear", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="default: all")
    parser.add_argument("--m", nargs="+", type=int, default=list(TOKENS), help="tokens (default: 1 to 8192)")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS), help="default: all")
    _run.add_options(parser)
    options = parser.parse_args(argv)
    _run.check_options(parser, options)
    if min(options.m) < 1:
        parser.error("--m must be at least 1")
    options.m = sorted(set(options.m))
    options.models, options.layers = list(dict.fromkeys(options.models)), list(dict.fromkeys(options.layers))
    return options


def cases(options: argparse.Namespace) -> list[_run.Case]:
    """A case for each layer and M that is asked for."""
    return [
        _run.Case((shape, m), shape, f"M={m}", (shape, *SHAPES[shape], m), options.impls)
        for shape in (f"{model}.{layer}" for model in options.models for layer in options.layers)
        for m in options.m
    ]


def run(
    options: argparse.Namespace,
    provenance: Mapping[str, Any],
    *,
    started: float,
    measurer: Callable[..., Any] = Measurer,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure, print and write, as ``_run.run`` does; the record is written after each shape."""
    return _run.run(
        options,
        lambda: Record(provenance, list(SHAPES), root=options.out, append=options.append),
        cases(options),
        impls=IMPLS,
        gpu=provenance["gpu"],
        measurer=lambda _: measurer(options.m, repeats=options.repeats),
        report=report,
        listed=_listed,
        started=started,
        clock=clock,
    )


def _listed(left: Sequence[_run.Case]) -> str:
    ms: dict[str, list[str]] = {}
    for case in left:
        ms.setdefault(case.group, []).append(case.name.removeprefix("M="))
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
