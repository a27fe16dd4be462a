"""Throughput of the NVFP4 reference: quantize and dequantize, both layouts and all rules, BF16 weights.

``mweights_s = n * k / median time``. Before anything is timed, the values of the whole tensor are compared with their
bound, and the bytes of sampled blocks with a second computation that uses Python floats and no torch arithmetic; of the
rules that search, the error of sampled blocks is compared with the least over all scales and codes.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import os
import statistics
import struct
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adallm import nvfp4, quantizers, results
from adallm.formats import E2M1_MAX, E2M1_VALUES, E4M3_MAX, E4M3_VALUES, NVFP4_BLOCK, NVFP4_RANGE

# Real layers, from one that fits the cache of a core to one that fits no cache.
SHAPES = {"tiny.down_proj": (384, 768), "Qwen3-0.6B.gate_proj": (3072, 1024), "Qwen3-8B.gate_proj": (12288, 4096)}
SEED = 0
SAMPLED_BLOCKS = 64

_COLUMNS = ("shape", "layout", "op", "rule", "ms", "ms_spread", "mweights_s", "rel_err")
_ROW = "{:<22}{:<20}{:<12}{:<15}{:>9}{:>11}{:>12}{:>9}"


def weights(n: int, k: int, device: str) -> Tensor:
    """``[n, k]`` BF16, normal with standard deviation 0.02 and a few outliers, the same on every device."""
    generator = torch.Generator().manual_seed(SEED)
    w = torch.randn(n, k, generator=generator).mul_(0.02)
    w.view(-1)[:: k * 7 + 3] *= 8
    return w.bfloat16().to(device)


def check(w: Tensor, t: nvfp4.NVFP4Tensor, dequantized: Tensor) -> float:
    """Compare ``t`` and ``dequantized`` with ``w``; return ``|w - dequantized| / |w|``, Frobenius norms.

    Raises:
        ValueError: a value further from its weight than the format allows, or a byte that differs from ``slow_block``;
            it names the place.
    """
    step = (t.scale.float() * t.global_scale).repeat_interleave(NVFP4_BLOCK, -1)
    error = (w.float() - dequantized).abs()
    # Half the widest gap of E2M1 is 1 step. Rounding a scale down, by 1/16 at most, cuts 6.4 to 6: less than that.
    # A scale below 2^-6 is subnormal and off by up to 2^-10, and the largest weight of the block by 6 times that.
    beyond = (error > step * 1.0001 + E2M1_MAX * 2.0**-10 * t.global_scale).nonzero()
    if len(beyond):
        row, column = beyond[0].tolist()
        raise ValueError(
            f"weight [{row}, {column}] is {float(w[row, column])}, dequantized {float(dequantized[row, column])}: "
            f"further apart than a step of {float(step[row, column])}"
        )
    blocks = t.scale.numel()
    for index in range(0, blocks, max(blocks // SAMPLED_BLOCKS, 1)):
        row, block = divmod(index, t.scale.shape[-1])
        at = slice(block * NVFP4_BLOCK, (block + 1) * NVFP4_BLOCK)
        scale = int(t.scale.view(torch.uint8)[row, block])
        codes = nvfp4.unpack(t.packed[row])[at].tolist()
        expected = slow_block(w[row, at].float().tolist(), t, reciprocal=w.is_cuda)
        if (scale, codes) != expected:
            raise ValueError(f"block {block} of row {row} is {(scale, codes)}, but computed slowly it is {expected}")
    return float((w.float() - dequantized).norm() / w.float().norm())


def check_rule(w: Tensor, t: nvfp4.NVFP4Tensor, rule: str, importance: Tensor | None) -> float:
    """``|w - dequantize(t)| / |w|`` of another rule than ``max``, after a look at sampled blocks.

    Raises:
        ValueError: a rule that searches, and a block with more error than another scale would give it.
    """
    blocks = torch.arange(0, t.scale.numel(), max(t.scale.numel() // SAMPLED_BLOCKS, 1))
    dequantized = nvfp4.dequantize(t)
    if rule in quantizers.SEARCHED:
        y = (w.float() / t.global_scale).double().cpu().view(-1, NVFP4_BLOCK)[blocks].abs()
        weight = torch.ones_like(y) if importance is None else importance.double().cpu().view(-1, NVFP4_BLOCK)
        weight = weight[blocks % len(weight)]
        exact = torch.tensor(E4M3_VALUES[1:0x7F])[:, None] * torch.tensor(E2M1_VALUES[:8])
        products = (quantizers.PRODUCTS[1:] if rule == "mse_fp8" else exact).double()
        least = torch.stack([((y[..., None] - row).abs().amin(-1).square() * weight).sum(-1) for row in products]).amin(
            0
        )
        codes = nvfp4.unpack(t.packed).cpu().view(-1, NVFP4_BLOCK)[blocks].long() & 7
        values = products[t.scale.view(torch.uint8).cpu().flatten()[blocks].long() - 1].gather(-1, codes)
        found = ((y - values).square() * weight).sum(-1)
        worse = (found > least * (1 + 1e-4)).nonzero()
        if len(worse):
            i = int(worse[0])
            raise ValueError(
                f"{rule}: block {int(blocks[i])} has the squared error {float(found[i])}, but with another scale it "
                f"has {float(least[i])}"
            )
    return float((w.float() - dequantized).norm() / w.float().norm())


def slow_block(block: Sequence[float], t: nvfp4.NVFP4Tensor, *, reciprocal: bool) -> tuple[int, list[int]]:
    """Scale byte and codes of one block of BF16 values by the table in ``nvfp4.py``, one Python float at a time.

    The global scale is that of ``t``, after a look whether it is ``amax / 2688`` at all. A quotient of two FP32 numbers
    in double precision, rounded to FP32, is the FP32 quotient, so rounding each result is enough.

    Args:
        reciprocal: divide by 6 by way of its reciprocal, as torch does on CUDA.
    """
    amax = max(map(abs, block))
    g = float(t.global_scale)
    if amax > NVFP4_RANGE * g * 1.01:
        raise ValueError(f"global scale {g} is too small for a weight of {amax}")
    if t.divisor is None:
        scale = _nearest(E4M3_VALUES[:0x7F], min(_fp32(amax / _fp32(E2M1_MAX * g)), E4M3_MAX))
        scale = scale if amax else 0x38
        step = _fp32(E4M3_VALUES[scale] * g)
    else:
        d = float(t.divisor)
        sixth = _bf16(_fp32(amax * _fp32(1 / E2M1_MAX)) if reciprocal else _fp32(amax / E2M1_MAX))
        scale = _nearest(E4M3_VALUES[:0x7F], min(_fp32(sixth * d), E4M3_MAX)) or 0x20
        step = _fp32(E4M3_VALUES[scale] / d)
    signs = [8 if str(value).startswith("-") else 0 for value in block]
    return scale, [s | _nearest(E2M1_VALUES[:8], _fp32(abs(v) / step)) for s, v in zip(signs, block, strict=True)]


def _nearest(values: Sequence[float], x: float) -> int:
    """Index of the value nearest to ``x`` in an ascending list, the even index of two that are equally near."""
    above = bisect.bisect_left(values, x)
    return min((i for i in (above - 1, above) if 0 <= i < len(values)), key=lambda i: (abs(values[i] - x), i % 2))


def _fp32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def _bf16(x: float) -> float:
    bits = struct.unpack("I", struct.pack("f", x))[0]
    return struct.unpack("f", struct.pack("I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0]


def time_ms(run: Callable[[], object], device: str, *, repeats: int) -> tuple[float, float]:
    """Median and interquartile range of ``repeats`` timed runs, in ms, after two that are not timed."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    low, median, high = statistics.quantiles(times[2:], n=4, method="inclusive")
    return median, high - low


def measure(device: str, *, repeats: int) -> list[dict[str, Any]]:
    """One row for each shape, layout, operation and rule, printed as it comes."""
    rows = []
    others = [("modelopt", rule) for rule in quantizers.RULES[1:]]
    for (shape, (n, k)), (layout, rule) in itertools.product(
        SHAPES.items(), [*((layout, "max") for layout in nvfp4.LAYOUTS), *others]
    ):
        w = weights(n, k, device)
        importance = torch.linspace(0.5, 2.0, k, device=device) if rule == "imatrix" else None
        quantize = partial(nvfp4.quantize, w, layout=layout, scale_rule=rule, importance=importance)
        t = quantize()
        rel_err = check(w, t, nvfp4.dequantize(t)) if rule == "max" else check_rule(w, t, rule, importance)
        operations: dict[str, Callable[[], object]] = {"quantize": quantize}
        if rule == "max":
            operations["dequantize"] = partial(nvfp4.dequantize, t, torch.bfloat16)
        for op, run in operations.items():
            ms, spread = time_ms(run, device, repeats=repeats)
            row = {
                "shape": shape,
                "n": n,
                "k": k,
                "dtype": "bfloat16",
                "layout": layout,
                "op": op,
                "rule": rule,
                "impl": "reference",
                "repeats": repeats,
                "ms": round(ms, 4),
                "ms_spread": round(spread, 4),
                "mweights_s": round(n * k / ms / 1e3, 2),
                "rel_err": round(rel_err, 6),
            }
            rows.append(row)
            print(_ROW.format(*(f"{v:.4g}" if isinstance(v := row[c], float) else v for c in _COLUMNS)), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the CPU and, where there is one, on the GPU; write ``results/quantize_speed/<slug>.json`` for each."""
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.quantize", description=__doc__.partition("\n")[0])
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, action="append", help="default: all that this machine has")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs for each row (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.repeats < 2:
        parser.error("--repeats must be at least 2, or there is no spread")
    for device in options.device or devices:
        name = (
            torch.cuda.get_device_name()
            if device == "cuda"
            else f"{torch.get_num_threads()} threads of {results.cpu_name()}"
        )
        print(f"\nNVFP4 reference on {name}\n{_ROW.format(*_COLUMNS)}")
        rows = measure(device, repeats=options.repeats)
        path = results.write(
            "quantize_speed",
            rows,
            provenance=results.provenance(seed=SEED, gpu=device == "cuda"),
            cpu=results.cpu_name(),
            threads=torch.get_num_threads(),
            spread="interquartile range",
        )
        print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
