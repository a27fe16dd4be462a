"""New keys and values into their slots of a paged cache: one launch, a block for each token (``attention.py``)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adallm.formats import E4M3_MAX
from adallm.kernels.dequant import to_e4m3, token_scale
from adallm.kernels.keys import fix_keys
from adallm.kernels.sizes import next_power_of_2
from adallm.kernels.start import Launch
from adallm.paged import Scale, kind_of

_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def _as_kept(y, scale, SCALES: tl.constexpr, EIGHT: tl.constexpr, FAST: tl.constexpr):
    """Rows ``y``, each of a token's head, as a cache keeps them, and what they were divided by: with scales for each
    token that of each row. ``scale`` is as it is given to ``write_kv``.
    """
    factor = scale
    if EIGHT:
        y = y.to(tl.float32)
        if SCALES == "token":
            factor = token_scale(tl.max(tl.where(y == y, tl.abs(y), 0.0), axis=1))
            y = tl.math.div_rn(y, tl.broadcast_to(factor[:, None], y.shape))
        else:
            if SCALES == "tensor":
                factor = tl.load(scale)
            y = tl.math.div_rn(y, factor)
        if not FAST:
            y = tl.where(y == y, tl.minimum(tl.maximum(y, -_MAX), _MAX), y)
        y = to_e4m3(y, FAST)
    return y, factor


@triton.jit
def _write(
    x,
    x_n,
    x_h,
    cache,
    c_b,
    c_t,
    c_h,
    scale,
    n,
    slot,
    heads,
    BLOCK: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SCALES: tl.constexpr,
    EIGHT: tl.constexpr,
    FAST: tl.constexpr,
):
    h, d = tl.arange(0, HP), tl.arange(0, DP)
    inside = (h < heads)[:, None] & (d < D)[None, :]
    y = tl.load(x + n * x_n + h[:, None] * x_h + d[None, :], mask=inside, other=0.0)
    y, of_head = _as_kept(y, scale, SCALES, EIGHT, FAST)
    if SCALES == "token":
        tl.store(scale + slot * heads + h, of_head, mask=h < heads)
    at = slot // BLOCK * c_b + slot % BLOCK * c_t + h[:, None] * c_h + d[None, :]
    tl.store(cache + at, y, mask=inside)


@triton.jit
def write_head(
    x,
    x_t,
    cache,
    c_b,
    c_t,
    scale,
    h,
    heads,
    slots,
    T: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    EIGHT: tl.constexpr,
    FAST: tl.constexpr,
):
    """Keys, or values, of a sequence's query tokens to their slots; ``x`` and ``cache`` are those of head ``h``."""
    TP: tl.constexpr = T if T <= 2 else (4 if T <= 4 else 8)
    t, d = tl.arange(0, TP), tl.arange(0, DP)
    slot = tl.load(slots + t, mask=t < T, other=-1)
    inside = (slot >= 0)[:, None] & (d < D)[None, :]
    y, factor = _as_kept(tl.load(x + t[:, None] * x_t + d[None, :], mask=inside, other=0.0), scale, SCALES, EIGHT, FAST)
    tl.store(cache + (slot // BLOCK * c_b + slot % BLOCK * c_t)[:, None] + d[None, :], y, mask=inside)
    if SCALES == "token":
        tl.store(scale + slot * heads + h, factor, mask=slot >= 0)


@triton.jit
def write_kv_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_scale,
    v_scale,
    heads,
    k_n,
    k_h,
    v_n,
    v_h,
    kc_b,
    kc_t,
    kc_h,
    vc_b,
    vc_t,
    vc_h,
    BLOCK: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SCALES: tl.constexpr,
    EIGHT: tl.constexpr,
    FAST: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + n)
    if slot >= 0:
        _write(k, k_n, k_h, k_cache, kc_b, kc_t, kc_h, k_scale, n, slot, heads, BLOCK, HP, D, DP, SCALES, EIGHT, FAST)
        _write(v, v_n, v_h, v_cache, vc_b, vc_t, vc_h, v_scale, n, slot, heads, BLOCK, HP, D, DP, SCALES, EIGHT, FAST)


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
    rows, columns = next_power_of_2(numbers[0]), next_power_of_2(d)
    return Launch(
        kernel,
        numbers,
        BLOCK=block,
        HP=rows,
        D=d,
        DP=columns,
        SCALES=scales,
        EIGHT=of_cache.itemsize == 1,
        FAST=fast,
        num_warps=min(max(rows * columns // 256, 1), 8),
    )


def launch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
) -> None:
    """``write_kv`` of arguments that ``check_write`` has seen; stride 1 along D of k and v."""
    tokens, heads, d = k.shape
    if not tokens:
        return
    numbers = (heads, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    again = _launch(
        write_kv_kernel, numbers, d, k_cache.shape[1], k.dtype, k_cache.dtype, kind_of(k_scale), not k.is_cpu
    )
    again((tokens,), k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


fix_keys(globals())
