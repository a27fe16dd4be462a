"""Weight error of each format, on four distributions and on the bundled model's layers.

``rel_sq_err = sum((w - qdq(w))^2) / sum(w^2)`` and ``sqnr_db = -10 log10(rel_sq_err)``. ``vs_max`` divides by the error
of NVFP4 with the max rule on the same source. NVFP4 is measured under each rule that needs the weights alone, with them
as they are stored and, as ``nvfp4-w4a8``, as FP8 activations meet them: products of code and block scale in E4M3. And
E2M1 is measured in blocks of 16 to 128 under three kinds of scale, which tells the cost of the block from the cost of
the scale.

Of the layers of the bundled model there are also the rules ``imatrix`` and ``gptq``, which read text, as ``adallm
quantize`` gives them by default; and ``rel_out_err = tr((w - w') H (w - w')^T) / tr(w H w^T)``, the relative squared
error of a layer's output, H being the second moments of its input on held-out text.

The distributions are ``SEEDS`` matrices each; their ``stderr`` is that of the ratio over the matrices. ``tiny`` stands
for all layers of the bundled model together, ``tiny.layers.0.mlp.down_proj`` for one of them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adallm import baselines, calibrated, checkpoint, evaluate, fp8, nvfp4, quantizers, results, text, tiny
from adallm.formats import (
    BITS_PER_WEIGHT,
    E2M1_MAX,
    E2M1_VALUES,
    E8M0_BIAS,
    INT4_GROUP,
    MXFP4_BLOCK,
    NVFP4_BLOCK,
    NVFP4_RANGE,
)

MODEL = Path(tiny.__file__).resolve().parent / "model"
DISTRIBUTIONS = ("gaussian", "laplace", "student-t4", "outliers")
SEEDS = 8
SHAPE = (256, 1024)
# Columns of the "outliers" matrices that are 10 times as large: one in each group of 128.
OUTLIER_COLUMNS = slice(64, None, 128)
BLOCKS = (16, 32, 64, 128)
SCALE_BITS = {"fp32": 32, "e4m3": 8, "e8m0": 8}


@dataclass(frozen=True)
class Scheme:
    """One way to quantize and dequantize a matrix ``[N, K]``, with what a row of the record says about it."""

    format: str
    rule: str | None
    block: int | None
    scale_format: str
    bits_per_weight: float
    qdq: Callable[[Tensor], Tensor] | None  # None where it takes a model


def nvfp4_qdq(w: Tensor, *, rule: str = "max") -> Tensor:
    """Quantized with a rule and dequantized, FP32."""
    return nvfp4.dequantize(nvfp4.quantize(w, scale_rule=rule))


def products_qdq(w: Tensor, *, rule: str) -> Tensor:
    """As ``nvfp4_qdq``, the product of each code and its block scale rounded to E4M3."""
    t = nvfp4.quantize(w, scale_rule=rule)
    codes = nvfp4.unpack(t.packed).long().unflatten(-1, (-1, NVFP4_BLOCK))
    products = quantizers.PRODUCTS[t.scale.view(torch.uint8).long()].gather(-1, codes & 7)
    return (torch.where(codes > 7, -products, products) * t.global_scale).flatten(-2)


def fp8_qdq(w: Tensor) -> Tensor:
    """Quantized with a scale for each row and dequantized, FP32."""
    return fp8.dequantize(fp8.quantize(w, granularity="row"))


def e2m1_qdq(w: Tensor, *, block: int, scale_format: str) -> Tensor:
    """``E2M1(w / s) * s`` in FP32, one scale for ``block`` columns.

    ``s = amax / 6`` of the block for ``"fp32"``; that rounded to E4M3 times the FP32 ``g = max |w| / 2688`` for
    ``"e4m3"``, which in blocks of 16 is NVFP4; ``2^(floor(log2 amax) - 2)`` for ``"e8m0"``, which in blocks of 32 is
    MXFP4.

    Args:
        w: ``[..., K]``, K a multiple of ``block``.
        block: columns that share a scale.
        scale_format: ``"fp32"``, ``"e4m3"`` or ``"e8m0"``.

    Raises:
        ValueError: another scale format, or another K.
    """
    if w.shape[-1] % block:
        raise ValueError(f"w has {w.shape[-1]} columns, not a multiple of {block}")
    w = w.float()
    x = w.unflatten(-1, (-1, block))
    amax = x.abs().amax(-1, keepdim=True)
    if scale_format == "fp32":
        scale = amax / E2M1_MAX
    elif scale_format == "e4m3":
        g = w.abs().amax() / NVFP4_RANGE
        scale = fp8.to_e4m3(amax / (E2M1_MAX * g)).float() * g
    elif scale_format == "e8m0":
        scale = torch.ldexp(torch.ones_like(amax), (torch.frexp(amax).exponent - 3).clamp(-E8M0_BIAS, E8M0_BIAS))
    else:
        raise ValueError(f"scale_format {scale_format!r}; supported: {', '.join(SCALE_BITS)}")
    codes = nvfp4.encode_e2m1(x / torch.where(scale == 0, 1.0, scale))
    return (torch.tensor(E2M1_VALUES)[codes.int()] * scale).flatten(-2)


# The first is what vs_max compares with.
FORMATS = (
    Scheme("nvfp4", "max", 16, "e4m3", BITS_PER_WEIGHT["nvfp4"], nvfp4_qdq),
    Scheme("mxfp4", None, MXFP4_BLOCK, "e8m0", BITS_PER_WEIGHT["mxfp4"], baselines.mxfp4),
    Scheme("int4-g128", None, INT4_GROUP, "fp16", BITS_PER_WEIGHT["int4-g128"], baselines.int4),
    Scheme("fp8", None, None, "fp32", BITS_PER_WEIGHT["fp8"], fp8_qdq),
)
_BITS = BITS_PER_WEIGHT["nvfp4"]
RULES = (
    *(
        Scheme("nvfp4", rule, 16, "e4m3", _BITS, partial(nvfp4_qdq, rule=rule))
        for rule in quantizers.RULES
        if rule not in ("max", "imatrix")
    ),
    *(
        Scheme("nvfp4-w4a8", rule, 16, "e4m3", _BITS, partial(products_qdq, rule=rule))
        for rule in ("max", "four_over_six", "mse", "mse_fp8")
    ),
    Scheme("int4-g16", None, 16, "fp16", 4 + (16 + 4) / 16, partial(baselines.int4, group=16)),
)
FROM_TEXT = tuple(Scheme("nvfp4", rule, 16, "e4m3", _BITS, None) for rule in calibrated.RULES)
SWEEP = tuple(
    Scheme(
        "e2m1", None, block, scale, 4 + bits / block, lambda w, b=block, s=scale: e2m1_qdq(w, block=b, scale_format=s)
    )
    for block in BLOCKS
    for scale, bits in SCALE_BITS.items()
)


def distribution(name: str, seed: int) -> Tensor:
    """A matrix ``SHAPE`` of unit scale, FP32.

    Args:
        name: ``"gaussian"``; ``"laplace"``; ``"student-t4"``, Student's t with 4 degrees of freedom; ``"outliers"``,
            Gaussian with ``OUTLIER_COLUMNS`` multiplied by 10.

    Raises:
        ValueError: another name.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    if name == "gaussian":
        return x
    if name == "laplace":
        # The difference of two exponential variables.
        a, b = torch.rand(2, *SHAPE, generator=generator, dtype=torch.float64).neg().log1p().neg().float()
        return a - b
    if name == "student-t4":
        # Normal over the root of a chi-squared variable over its 4 degrees of freedom.
        return x / (torch.randn(4, *SHAPE, generator=generator).square().mean(0)).sqrt()
    if name == "outliers":
        x[:, OUTLIER_COLUMNS] *= 10
        return x
    raise ValueError(f"distribution {name!r}; supported: {', '.join(DISTRIBUTIONS)}")


def layers(directory: Path = MODEL) -> dict[str, Tensor]:
    """The matrices that ``adallm quantize`` quantizes: ``"layers.0.mlp.down_proj"`` -> ``[N, K]``."""
    dense = checkpoint.load_dense(directory, None)
    return {
        name.removeprefix("model.").removesuffix(".weight"): weight
        for name, weight in dense.items()
        if weight.dim() == 2 and name.endswith("_proj.weight")
    }


def from_text() -> dict[str, dict[str, Tensor]]:
    """What each rule of ``FROM_TEXT`` makes of the bundled model: rule -> layer -> values, FP32."""
    found = {}
    for scheme in FROM_TEXT:
        with tempfile.TemporaryDirectory() as folder:
            done = calibrated.convert(MODEL, Path(folder) / "model", scale_rule=scheme.rule)
            found[scheme.rule] = layers(done.path)
    return found


def moments() -> dict[str, Tensor]:
    """``sum x x^T`` of what enters each layer of the bundled model on held-out text."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, document in enumerate(evaluate.documents()):
            files.append(Path(folder) / f"{i}.py")
            files[-1].write_text(document.text, encoding="utf-8")
        found = calibrated.moments(MODEL, text=files)
    return {name.removeprefix("model."): h for name, h in found.items()}


def squares(w: Tensor, quantized: Sequence[Tensor], h: Tensor | None = None) -> list[tuple[float, float]]:
    """``(sum((w - w')^2), sum(w^2))`` for each ``w'``, with ``h`` ``tr(d h d^T)`` in place of each sum, in FP64."""

    def square(d: Tensor) -> float:
        d = d.double()
        return float((d.square() if h is None else d @ h * d).sum())

    w = w.float()
    signal = square(w)
    return [(square(w - q), signal) for q in quantized]


def _all_qdq(w: Tensor, schemes: Sequence[Scheme]) -> list[Tensor]:
    return [scheme.qdq(w.float()) for scheme in schemes]


def measure_source(
    source: str, matrices: Sequence[Tensor], schemes: Sequence[Scheme] = FORMATS
) -> list[dict[str, Any]]:
    """The rows of one source: the errors of its matrices added up, divided by their squares added up.

    Args:
        source: as the record names it.
        matrices: at least one, ``[N, K]``.
        schemes: the first must be NVFP4 with the max rule.
    """
    parts = [squares(w, _all_qdq(w, schemes)) for w in matrices]
    return _rows(source, matrices[0].shape, parts, schemes)


def measure() -> Iterator[dict[str, Any]]:
    """All rows: the distributions, each layer of the bundled model, and all layers together."""
    for name in DISTRIBUTIONS:
        matrices = [distribution(name, seed) for seed in range(SEEDS)]
        yield from measure_source(name, matrices, FORMATS + RULES + SWEEP)
    of_layer, every = FORMATS + RULES + FROM_TEXT, FORMATS + RULES + FROM_TEXT + SWEEP
    weights, made, h = layers(), from_text(), moments()
    errors, outputs = [], []
    for name, weight in weights.items():
        plain = _all_qdq(weight, FORMATS + RULES)
        quantized = [*plain, *(made[scheme.rule][name].float() for scheme in FROM_TEXT), *_all_qdq(weight, SWEEP)]
        errors.append(squares(weight, quantized))
        outputs.append(squares(weight, quantized, h[name]))
        first = len(of_layer)
        yield from _rows(f"tiny.{name}", weight.shape, [errors[-1][:first]], of_layer, [outputs[-1][:first]])
    for row in _rows("tiny", (None, None), errors, every, outputs):
        # All of them were measured: there is no sample to draw a standard error from.
        yield row | {"stderr": None}


def check(w: Tensor) -> None:
    """The sweep in blocks of 16 with E4M3 scales is NVFP4, that in blocks of 32 with E8M0 is MXFP4, to the bit.

    Raises:
        ValueError: it is not.
    """
    for block, scale_format, expected in ((16, "e4m3", nvfp4_qdq(w)), (32, "e8m0", baselines.mxfp4(w.float()))):
        differ = int((e2m1_qdq(w, block=block, scale_format=scale_format) != expected).sum())
        if differ:
            raise ValueError(f"{differ} values of blocks of {block} with {scale_format} scales differ from the format")


def _rows(
    source: str,
    shape: Sequence[int | None],
    parts: Sequence[Sequence[tuple[float, float]]],
    schemes: Sequence[Scheme],
    outputs: Sequence[Sequence[tuple[float, float]]] = (),
) -> list[dict[str, Any]]:
    errors = [_ratio([part[i] for part in parts]) for i in range(len(schemes))]
    of_outputs = [_ratio([part[i] for part in outputs])[0] if outputs else None for i in range(len(schemes))]
    of_max = errors[0][0]
    return [
        {
            "source": source,
            "n": shape[0],
            "k": shape[1],
            "matrices": len(parts),
            "format": scheme.format,
            "rule": scheme.rule,
            "block": scheme.block,
            "scale_format": scheme.scale_format,
            "bits_per_weight": scheme.bits_per_weight,
            "rel_sq_err": _rounded(error),
            "stderr": None if stderr is None else _rounded(stderr),
            "sqnr_db": round(-10 * math.log10(error), 4) if error else None,
            "vs_max": _rounded(error / of_max) if of_max else None,
            "rel_out_err": None if of_output is None else _rounded(of_output),
        }
        for scheme, (error, stderr), of_output in zip(schemes, errors, of_outputs, strict=True)
    ]


def _ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """``sum(errors) / sum(signals)`` and its standard error over the pairs, None for a single one."""
    noise, signal = (sum(part) for part in zip(*pairs, strict=True))
    ratio, n = noise / signal, len(pairs)
    if n < 2:
        return ratio, None
    return ratio, math.sqrt(n / (n - 1) * sum((e - ratio * s) ** 2 for e, s in pairs)) / signal


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """SQNR in dB, and squared error relative to NVFP4 with the max rule, by source, format and rule; the layers of the
    bundled model together, with the relative squared error of their outputs.
    """
    sources = [*DISTRIBUTIONS, "tiny"]
    of = {(row["source"], row["format"], row["rule"]): row for row in rows if row["format"] != "e2m1"}
    lines = []
    for scheme in FORMATS + RULES + FROM_TEXT:
        found = [of.get((source, scheme.format, scheme.rule)) for source in sources]
        cells = [f"{row['sqnr_db']:.2f} {row['vs_max']:.4f}" if row else "-" for row in found]
        lines.append((f"{scheme.format} {scheme.rule or ''}".rstrip(), *cells, f"{found[-1]['rel_out_err']:.6f}"))
    header = ("SQNR, dB, and vs max", *sources, "tiny, outputs")
    return text.table(header, lines, align="l" + "r" * (len(sources) + 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the CPU and write ``results/quantizers/cpu.json``."""
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.accuracy", description=__doc__.partition("\n")[0])
    parser.parse_args(argv)
    start, threads = time.monotonic(), torch.get_num_threads()
    # Such small matrices gain nothing from a second thread, and lose much where another process wants its core.
    torch.set_num_threads(1)
    try:
        for name in DISTRIBUTIONS:
            check(distribution(name, SEEDS))
        rows = list(measure())
    finally:
        torch.set_num_threads(threads)
    path = results.write("quantizers", rows, provenance=results.provenance(seed=0, gpu=False))
    print(summary(rows))
    print(f"{len(rows)} rows in {time.monotonic() - start:.1f} s, wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
