"""RMSNorm of ``y = x + residual``, ``y * rsqrt(mean(y^2) + eps) * weight``, in FP32 and rounded once; ``y`` is kept.

In front of a product in FP8 ``quantize.py`` computes it; this kernel writes it for one in 16 bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adallm.fp8 import INPUT_DTYPES
from adallm.kernels.dequant import to_dtype
from adallm.kernels.keys import fix_keys
from adallm.kernels.sizes import next_power_of_2
from adallm.kernels.start import Launch


@triton.jit
def add_rms_norm_kernel(
    x, residual, weight, total, out, K, x_stride, residual_stride, eps, BLOCK: tl.constexpr, FAST: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    y = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    y += tl.load(residual + row * residual_stride + k, mask=k < K, other=0.0).to(tl.float32)
    w = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(total + row * K + k, to_dtype(y, total.dtype.element_ty, FAST), mask=k < K)
    y *= tl.math.rsqrt(tl.sum(y * y) / K + eps) * w
    tl.store(out + row * K + k, to_dtype(y, out.dtype.element_ty, FAST), mask=k < K)


def check(x: Tensor, weight: Tensor, residual: Tensor | None, total: Tensor | None) -> None:
    """Raise a ValueError for what does not fit ``x`` ``[M, K]``, as the arguments of ``add_rms_norm`` must."""
    k = x.shape[1]
    if weight.shape != (k,) or weight.device != x.device or weight.dtype not in INPUT_DTYPES or weight.stride(0) != 1:
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)} on {weight.device}; an RMSNorm's is contiguous bfloat16, "
            f"float16 or float32 [{k}] on {x.device}"
        )
    for name, y in (("residual", residual), ("total", total)):
        if y is not None and (y.shape != x.shape or y.dtype != x.dtype or y.device != x.device):
            raise ValueError(
                f"{name} is {y.dtype} {list(y.shape)} on {y.device}; it must be as x is, {x.dtype} {list(x.shape)} on "
                f"{x.device}"
            )
    if (residual is None) != (total is None) or (total is not None and not total.is_contiguous()):
        raise ValueError("residual and a contiguous total, which the sum is written to, must come together")


@functools.lru_cache(maxsize=1 << 10)
def _launch(kernel: Any, numbers: tuple[Any, ...], dtype: torch.dtype, of_weight: torch.dtype, fast: bool) -> Launch:
    """For rows of as many columns; the dtypes tell one from another."""
    block = max(next_power_of_2(numbers[0]), 64)
    # One load of 16 bytes for a thread, in 16 bits: with few tokens it is waited for.
    return Launch(kernel, numbers, BLOCK=block, FAST=fast, num_warps=min(max(block // 256, 1), 16))


def add_rms_norm(x: Tensor, *, residual: Tensor, total: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of ``x + residual``, ``[M, K]`` in the dtype of ``x``.

    Args:
        x: bfloat16, float16 or float32 ``[M, K]``.
        residual: as ``x``.
        total: as ``x``, contiguous; the sum is written to it.
        weight: bfloat16, float16 or float32 ``[K]``.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    if x.dim() != 2 or x.dtype not in INPUT_DTYPES or not x.shape[1]:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; it must be bfloat16, float16 or float32 [M, K]")
    if x.stride(1) != 1:
        x = x.contiguous()
    check(x, weight, residual, total)
    if residual.stride(1) != 1:
        residual = residual.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        numbers = (x.shape[1], x.stride(0), residual.stride(0), eps)
        again = _launch(add_rms_norm_kernel, numbers, x.dtype, weight.dtype, not x.is_cpu)
        again((x.shape[0],), x, residual, weight, total, out)
    return out


fix_keys(globals())
