"""New keys and values into their slots of a paged cache: one launch, a block for each token (``attention.py``)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adallm.formats import E4M3_MAX
from adallm.kernels.dequant import to_e4m3
from adallm.paged import Scale

_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def _write(x, cache, scale, slot, heads, h, at, SCALES: tl.constexpr, EIGHT: tl.constexpr, FAST: tl.constexpr, inside):
    y = tl.load(x, mask=inside, other=0.0)
    if EIGHT:
        y = y.to(tl.float32)
        if SCALES == "token":
            amax = tl.max(tl.abs(y), axis=1)
            of_head = tl.where(amax == 0, 1.0, tl.math.div_rn(amax, _MAX))
            tl.store(scale + slot * heads + h, of_head, mask=h < heads)
            y = tl.math.div_rn(y, tl.broadcast_to(of_head[:, None], y.shape))
        elif SCALES == "tensor":
            y = tl.math.div_rn(y, tl.load(scale))
        else:
            y = tl.math.div_rn(y, scale)
        if not FAST:
            y = tl.where(y == y, tl.minimum(tl.maximum(y, -_MAX), _MAX), y)
        y = to_e4m3(y, FAST)
    tl.store(cache + at, y, mask=inside)


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
        block, position = slot // BLOCK, slot % BLOCK
        h, d = tl.arange(0, HP), tl.arange(0, DP)
        inside = (h < heads)[:, None] & (d < D)[None, :]
        at = block * kc_b + position * kc_t + h[:, None] * kc_h + d[None, :]
        _write(
            k + n * k_n + h[:, None] * k_h + d[None, :],
            k_cache,
            k_scale,
            slot,
            heads,
            h,
            at,
            SCALES,
            EIGHT,
            FAST,
            inside,
        )
        at = block * vc_b + position * vc_t + h[:, None] * vc_h + d[None, :]
        _write(
            v + n * v_n + h[:, None] * v_h + d[None, :],
            v_cache,
            v_scale,
            slot,
            heads,
            h,
            at,
            SCALES,
            EIGHT,
            FAST,
            inside,
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
    kind = "number"
    if isinstance(k_scale, Tensor):
        kind = "token" if k_scale.dim() else "tensor"
    tokens, heads, d = k.shape
    if not tokens:
        return
    rows, columns = triton.next_power_of_2(heads), triton.next_power_of_2(d)
    write_kv_kernel[(tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k_scale,
        v_scale,
        heads,
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        BLOCK=k_cache.shape[1],
        HP=rows,
        D=d,
        DP=columns,
        SCALES=kind,
        EIGHT=k_cache.itemsize == 1,
        FAST=k.device.type != "cpu",
        num_warps=min(max(rows * columns // 256, 1), 8),
    )
