"""``silu(x[:K]) * x[K:]``, with ``silu(a) = a / (1 + exp(-a))``, in FP32 and rounded once: what a gated MLP multiplies.

In front of a product in FP8 ``quantize.py`` computes it; this kernel writes it for one in 16 bits. A row is that of
several blocks, since few tokens would leave most multiprocessors without one.
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
from adallm.kernels.sizes import cdiv
from adallm.kernels.start import Launch

# 16 bytes of each half for a thread, in 16 bits.
_BLOCK, _WARPS = 1024, 4


@triton.jit
def silu(a):
    return a / (1 + tl.exp(-a))


@triton.jit
def silu_and_mul_kernel(x, out, K, x_stride, BLOCK: tl.constexpr, FAST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += row * x_stride
    a = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    b = tl.load(x + K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, to_dtype(silu(a) * b, out.dtype.element_ty, FAST), mask=k < K)


@functools.lru_cache(maxsize=1 << 10)
def _launch(kernel: Any, k: int, x_stride: int, dtype: torch.dtype, fast: bool) -> Launch:
    """For rows of as many columns; the dtype tells one from another."""
    return Launch(kernel, (k, x_stride), BLOCK=_BLOCK, FAST=fast, num_warps=_WARPS)


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(x[:, :K]) * x[:, K:]``, ``[M, K]`` in the dtype of ``x``.

    Args:
        x: bfloat16, float16 or float32 ``[M, 2 K]``.

    Raises:
        ValueError: another shape or dtype.
    """
    if x.dim() != 2 or x.dtype not in INPUT_DTYPES or x.shape[1] % 2 or not x.shape[1]:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; it must be bfloat16, float16 or float32 [M, 2 K]")
    if x.stride(1) != 1:
        x = x.contiguous()
    m, k = x.shape[0], x.shape[1] // 2
    out = torch.empty(m, k, dtype=x.dtype, device=x.device)
    if m:
        again = _launch(silu_and_mul_kernel, k, x.stride(0), x.dtype, not x.is_cpu)
        again((m, cdiv(k, _BLOCK)), x, out)
    return out


fix_keys(globals())
