"""Weight error of NVFP4 by its global scale, from far below to far above the one that the max rule takes.

The max rule's ``g = max |w| / 2688`` makes the largest block scale the largest E4M3 number. Here it is ``g * 2^e``:
below, blocks whose scale would be above 448 are cut; above, block scales sink to where E4M3 has fewer bits, and to 0.
``rel_sq_err = sum((w - qdq(w))^2) / sum(w^2)``, ``vs_max`` over that at ``e = 0``, ``blocks`` those whose scale has all
bits of its mantissa and is not cut, as a share. Sources are those of ``accuracy.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adallm import nvfp4, results, text
from adallm.bench.accuracy import DISTRIBUTIONS, SEEDS, distribution, layers, squares
from adallm.formats import E4M3_MAX, NVFP4_BLOCK, NVFP4_RANGE

EXPONENTS = tuple(range(-6, 21))
# Smallest E4M3 number with all of its mantissa.
_NORMAL = 2.0**-6


def measure_source(source: str, matrices: Sequence[Tensor], exponents: Sequence[int] = EXPONENTS) -> Iterator[dict]:
    """A row for each exponent, over all matrices of the source together."""
    errors = {}
    for e in sorted({*exponents, 0}):
        parts, whole, blocks = [], 0, 0
        for w in matrices:
            w = w.float()
            g = float(w.abs().max()) / NVFP4_RANGE * 2.0**e
            parts += squares(w, [nvfp4.dequantize(nvfp4.quantize(w, global_scale=g))])
            wanted = w.abs().unflatten(-1, (-1, NVFP4_BLOCK)).amax(-1) / (6 * g)
            # The largest is 448 but for the rounding of g.
            whole += int(((wanted >= _NORMAL) & (wanted <= E4M3_MAX * (1 + 2**-20))).sum())
            blocks += wanted.numel()
        noise, signal = (sum(part) for part in zip(*parts, strict=True))
        errors[e] = noise / signal, whole / blocks
    for e in exponents:
        error, share = errors[e]
        yield {
            "source": source,
            "log2_factor": e,
            "matrices": len(matrices),
            "rel_sq_err": float(f"{error:.6g}"),
            "vs_max": float(f"{error / errors[0][0]:.6g}"),
            "blocks": float(f"{share:.6g}"),
        }


def measure(exponents: Sequence[int] = EXPONENTS) -> Iterator[dict[str, Any]]:
    """All rows: the distributions, and all layers of the bundled model together, each with a scale of its own."""
    for name in DISTRIBUTIONS:
        yield from measure_source(name, [distribution(name, seed) for seed in range(SEEDS)], exponents)
    yield from measure_source("tiny", list(layers().values()), exponents)


def plateau(rows: Sequence[Mapping[str, Any]], source: str, within: float = 0.01) -> tuple[int, int]:
    """The exponents around 0 from and to which the error is that of the max rule, within a share of it."""
    near = {row["log2_factor"] for row in rows if row["source"] == source and abs(row["vs_max"] - 1) <= within}
    low = high = 0
    while low - 1 in near:
        low -= 1
    while high + 1 in near:
        high += 1
    return low, high


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """``vs_max`` by source and factor."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    of = {(row["source"], row["log2_factor"]): row["vs_max"] for row in rows}
    exponents = sorted({e for _, e in of})
    lines = [[f"2^{e}", *(f"{of[source, e]:.4f}" for source in sources)] for e in exponents]
    return text.table(("global scale, vs max", *sources), lines, align="r" * (1 + len(sources)))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the CPU, print, and write ``results/global_scale/cpu.json``."""
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.global_scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="root of the records (default: results)")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    # As in accuracy.py.
    torch.set_num_threads(1)
    try:
        rows = list(measure())
    finally:
        torch.set_num_threads(threads)
    print(report(rows))
    path = results.write("global_scale", rows, provenance=results.provenance(seed=0, gpu=False), root=options.out)
    print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
