"""Per-token FP8 activations in one pass: ``scale = max |y| / 448`` (1 where that is 0), ``data = E4M3(y / scale)``.

``y`` is ``x`` itself, ``x * rsqrt(mean(x^2) + eps) * weight`` (RMSNorm), that of ``x + residual``, which is then kept
too, or ``silu(x[:K]) * x[K:]``, in FP32 and never rounded in between. The columns of ``data`` are written in
``FP8_COLUMNS`` order, which the kernels multiply by, and padded with zeros to a multiple of 64. On Hopper the product
behind it may be launched meanwhile (``hopper.py``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from adallm.fp8 import INPUT_DTYPES
from adallm.kernels import choice, norm
from adallm.kernels.dequant import fp8_order, to_dtype, to_e4m3, token_scale
from adallm.kernels.keys import fix_keys
from adallm.kernels.layout import padded
from adallm.kernels.silu import silu
from adallm.kernels.sizes import cdiv, next_power_of_2
from adallm.kernels.start import Launch

# Longest row that a block keeps in registers, and longest piece of a longer one, which it reads again for each pass:
# registers for a whole one would leave a multiprocessor room for one block.
_ONE_PIECE = 4096
_PIECE = 8192


@triton.jit
def _input(x, residual, k, K, INPUT: tl.constexpr):
    y = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if INPUT == "add_rms_norm":
        y += tl.load(residual + k, mask=k < K, other=0.0).to(tl.float32)
    elif INPUT == "silu_and_mul":
        y = silu(y) * tl.load(x + K + k, mask=k < K, other=0.0).to(tl.float32)
    return y


@triton.jit
def _normed(y, weight, k, K, rstd, INPUT: tl.constexpr):
    if INPUT == "rms_norm" or INPUT == "add_rms_norm":
        y = y * rstd * tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    return y


@triton.jit
def _over(y, scale, FAST: tl.constexpr):
    """``y / scale``, correctly rounded where E4M3 does not make it 0."""
    if not FAST:
        return tl.math.div_rn(y, scale)
    # Of the rounded reciprocal it takes three operations (Markstein, IBM J. R&D 34, 1990), within the exponents.
    power = tl.where(scale < 2.0**-60, 2.0**100, tl.where(scale > 2.0**60, 2.0**-60, 1.0))
    y *= power
    scale *= power
    inverse = tl.math.div_rn(1.0, scale)
    q = y * inverse
    return tl.fma(tl.fma(-q, tl.where(inverse == 0.0, 0.0, scale), y), inverse, q)


@triton.jit
def _write(y, scale, data, k, stride, BLOCK: tl.constexpr, ORDERED: tl.constexpr, FAST: tl.constexpr):
    y = to_e4m3(_over(y, scale, FAST), FAST)
    if not ORDERED:
        y = tl.reshape(fp8_order(tl.reshape(y, [1, BLOCK]), 1, BLOCK), [BLOCK])
    tl.store(data + k, y, mask=k < stride)


@triton.jit
def fp8_tokens(
    x,
    weight,
    residual,
    total,
    data,
    scale,
    K,
    x_stride,
    residual_stride,
    data_stride,
    eps,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    INPUT: tl.constexpr,
    ORDERED: tl.constexpr,
    TIMES: tl.constexpr,
    FAST: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    data += row * data_stride
    k = tl.arange(0, BLOCK)
    if INPUT == "add_rms_norm":
        residual += row * residual_stride
        total += row * K
    y = _input(x, residual, k, K, INPUT)
    rstd = 1.0
    if INPUT == "rms_norm" or INPUT == "add_rms_norm":
        if INPUT == "add_rms_norm":
            tl.store(total + k, to_dtype(y, total.dtype.element_ty, FAST), mask=k < K)
        squares = y * y
        for piece in range(1, PIECES):
            at = piece * BLOCK + k
            later = _input(x, residual, at, K, INPUT)
            if INPUT == "add_rms_norm":
                tl.store(total + at, to_dtype(later, total.dtype.element_ty, FAST), mask=at < K)
            squares += later * later
        rstd = tl.math.rsqrt(tl.sum(squares) / K + eps)
    y = _normed(y, weight, k, K, rstd, INPUT)
    amax = tl.abs(y)
    for piece in range(1, PIECES):
        at = piece * BLOCK + k
        amax = tl.maximum(amax, tl.abs(_normed(_input(x, residual, at, K, INPUT), weight, at, K, rstd, INPUT)))
    s = token_scale(tl.max(amax))
    tl.store(scale + row, s * TIMES)
    _write(y, s, data, k, data_stride, BLOCK, ORDERED, FAST)
    for piece in range(1, PIECES):
        at = piece * BLOCK + k
        y = _normed(_input(x, residual, at, K, INPUT), weight, at, K, rstd, INPUT)
        _write(y, s, data, at, data_stride, BLOCK, ORDERED, FAST)


@functools.lru_cache(maxsize=1 << 10)
def _launch(
    kernel: Any,
    numbers: tuple[Any, ...],
    dtype: torch.dtype,
    of_weight: torch.dtype | None,
    kind: str,
    ordered: bool,
    times: float,
    early: bool,
    fast: bool,
) -> Launch:
    """For rows of as many columns; the dtypes tell one from another."""
    k = numbers[0]
    columns = max(next_power_of_2(k), 64)
    block = columns if k <= _ONE_PIECE else min(columns // 4, _PIECE)
    return Launch(
        kernel,
        numbers,
        BLOCK=block,
        PIECES=cdiv(k, block),
        INPUT=kind,
        ORDERED=ordered,
        TIMES=times,
        FAST=fast,
        EARLY=early,
        num_warps=max(block // 512, 1) if k <= block else min(block // 256, 16),
    )


def quantize_tokens(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    gated: bool = False,
    ordered: bool = False,
    times: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """E4M3 data ``[M, K64]`` and float32 scales ``[M]`` of ``x`` ``[M, K]``, of its RMSNorm, or of ``silu(a) * b``; K64
    is K rounded up to a multiple of 64.

    Args:
        x: bfloat16, float16 or float32; ``[M, 2 K]`` where ``gated``. K is a multiple of 16.
        weight: ``[K]`` of the RMSNorm, with ``eps``.
        residual: as ``x``; the RMSNorm is that of the sum.
        total: as ``x``, contiguous; the sum is written to it.
        gated: SiLU of the first half times the second.
        ordered: write the columns in their own order, without padding, as the reference does.
        times: what the scales are multiplied by when they are written, a power of two.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    halves = 2 if gated else 1
    if x.dim() != 2 or x.dtype not in INPUT_DTYPES or x.shape[1] % (16 * halves) or not x.shape[1]:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}; it must be bfloat16, float16 or float32 [M, {'2 K' if gated else 'K'}] "
            "with K a multiple of 16"
        )
    m, k = x.shape[0], x.shape[1] // halves
    if x.stride(1) != 1:
        x = x.contiguous()
    if weight is not None and not gated:
        norm.check(x, weight, residual, total)
    elif weight is not None or residual is not None or total is not None:
        raise ValueError("weight, residual or total is given; they are of an RMSNorm, which has a weight and no gate")
    if residual is not None:
        kind = "add_rms_norm"
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    else:
        kind = "silu_and_mul" if gated else "none" if weight is None else "rms_norm"
    data = torch.empty(m, k if ordered else padded(1, k)[1], dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if not m:
        return data, scale
    early = x.is_cuda and choice.gpu(x.device.index).family == "sm_90"
    numbers = (k, x.stride(0), 0 if residual is None else residual.stride(0), data.shape[1], eps)
    of_weight = None if weight is None else weight.dtype
    again = _launch(fp8_tokens, numbers, x.dtype, of_weight, kind, ordered, times, early, not x.is_cpu)
    again((m,), x, weight, residual, total, data, scale)
    return data, scale


fix_keys(globals())
