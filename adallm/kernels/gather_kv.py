"""``gather_kv``: keys and values of sequences out of a paged cache, one after the other, in 16 bits."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adallm.kernels.dequant import to_dtype
from adallm.kernels.keys import fix_keys
from adallm.kernels.sizes import cdiv, next_power_of_2
from adallm.kernels.start import Launch
from adallm.paged import Scale, kind_of

_TOKENS = 32  # of a block


@triton.jit
def _gather(
    x, cache, c_h, scale, at, row, inside, h, heads, D: tl.constexpr, d, SCALES: tl.constexpr, FAST: tl.constexpr
):
    y = tl.load(cache + at[:, None] + h * c_h + d[None, :], mask=inside, other=0.0)
    if SCALES != "none":
        y = y.to(tl.float32) * (tl.load(scale) if SCALES == "tensor" else scale)
        y = to_dtype(y, x.dtype.element_ty, FAST)
    tl.store(x + (row[:, None] * heads + h) * D + d[None, :], y, mask=inside)


@triton.jit
def gather_kv_kernel(
    k_cache,
    v_cache,
    table,
    starts,
    k,
    v,
    k_scale,
    v_scale,
    heads,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    table_b,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SCALES: tl.constexpr,
    FAST: tl.constexpr,
):
    b, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    start = tl.load(starts + b)
    length = tl.load(starts + b + 1) - start
    j = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DP)
    there = j < length
    inside = there[:, None] & (d < D)[None, :]
    block = tl.load(table + b * table_b + j // BLOCK, mask=there, other=0).to(tl.int64)
    row = (start + j).to(tl.int64)
    _gather(k, k_cache, k_h, k_scale, block * k_b + j % BLOCK * k_t, row, inside, h, heads, D, d, SCALES, FAST)
    _gather(v, v_cache, v_h, v_scale, block * v_b + j % BLOCK * v_t, row, inside, h, heads, D, d, SCALES, FAST)


@functools.lru_cache(maxsize=1 << 10)
def _launch(
    kernel: Any,
    numbers: tuple[int, ...],
    d: int,
    block: int,
    dtype: torch.dtype,
    of_cache: torch.dtype,
    scales: str,
    fast: bool,
) -> Launch:
    """For heads and a cache of these sizes; the dtypes tell one from another."""
    return Launch(
        kernel,
        numbers,
        BLOCK=block,
        TOKENS=_TOKENS,
        D=d,
        DP=next_power_of_2(d),
        SCALES=scales,
        FAST=fast,
        num_warps=4,
    )


def launch(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    starts: Tensor,
    longest: int,
    k: Tensor,
    v: Tensor,
    *,
    k_scale: Scale,
    v_scale: Scale,
) -> None:
    """``gather_kv`` of arguments that ``check_gather`` has seen, into k and v ``[tokens, Hkv, D]``."""
    sequences, (heads, d) = starts.shape[0] - 1, k.shape[1:]
    if not longest or not sequences:
        return
    numbers = (heads, *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0))
    scales = kind_of(k_scale) if k_cache.itemsize == 1 else "none"
    again = _launch(gather_kv_kernel, numbers, d, k_cache.shape[1], k.dtype, k_cache.dtype, scales, not k.is_cpu)
    grid = (cdiv(longest, _TOKENS), sequences, heads)
    again(grid, k_cache, v_cache, block_table, starts, k, v, k_scale, v_scale)


fix_keys(globals())
