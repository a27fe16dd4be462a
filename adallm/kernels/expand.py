"""The whole weight in 16 or 8 bits, for a library's matrix product: ``[N, K]`` from stored words and scales.

16 bits: ``e2m1 * scale``, exact; the global scale stays outside. E4M3: ``E4M3(e2m1 * scale * 2^shift * 2^-7)``, to be
multiplied by ``row_scale * 2^7``: the values that ``matmul.py`` multiplies by. Of words for FP8 products its columns
are in ``FP8_COLUMNS`` order; of words for 16-bit ones, of which E4M3 is made too, in their own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adallm.kernels.dequant import VALUE_POWER, fours, operand, to_dtype, to_e4m3, values
from adallm.kernels.keys import fix_keys
from adallm.kernels.layout import Packed, padded
from adallm.kernels.sizes import cdiv
from adallm.kernels.start import Launch

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
_R, _C, _WARPS = 4, 2, 4


@triton.jit
def nvfp4_expand(
    words,
    scales,
    shift,
    out,
    N,
    K,
    R: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
):
    chunks = tl.cdiv(K, 64)
    first = tl.program_id(1) * C
    tile = tl.program_id(0) * R + tl.arange(0, R)
    in_n = (tile < tl.cdiv(N, 16))[:, None]
    i = tl.arange(0, C * 16)
    scale = tl.load(
        scales + (tile.to(tl.int64)[:, None] * chunks + first) * 16 + i[None, :],
        mask=in_n & (first + i // 16 < chunks)[None, :],
        other=0,
    )
    i = tl.arange(0, C * 128)
    word = tl.load(
        words + (tile.to(tl.int64)[:, None] * chunks + first) * 128 + i[None, :],
        mask=in_n & (first + i // 128 < chunks)[None, :],
        other=0,
    )
    n = tl.program_id(0) * (R * 16) + tl.arange(0, R * 16)
    k = first * 64 + tl.arange(0, C * 64)
    if KIND == "fp8" and FAST:
        # Four values at a time: K, which is a multiple of 64 here, and its columns are those of int32.
        out = out.to(tl.pointer_type(tl.int32))
        K //= 4
        k = first * 16 + tl.arange(0, C * 16)
        x = fours(word, scale, R, C)
    elif KIND == "fp8 of 16":
        x = to_e4m3(values(word, scale, R, C, "bf16", FAST).to(tl.float32), FAST)
    elif KIND == "fp8":
        x = to_e4m3(tl.reshape(operand(word, scale, 1, R, C, KIND, FAST), [R * 16, C * 64]), FAST)
    else:
        x = values(word, scale, R, C, KIND, FAST)
        exponent = 7 - tl.load(shift + n, mask=n < N, other=0).to(tl.int32)
        factor = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
        x = to_dtype(x.to(tl.float32) * factor[:, None], out.dtype.element_ty, FAST)
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out + at, x, mask=(n < N)[:, None] & (k < K)[None, :])


def expand(
    words: Tensor, scales: Tensor, shift: Tensor, n: int, k: int, dtype: torch.dtype, *, of_16: bool = False
) -> Tensor:
    """``[n, k]`` of ``dtype``: bfloat16, float16 or float8_e4m3fn.

    Args:
        of_16: float8_e4m3fn of words for 16-bit products; else of words for FP8 products, k a multiple of 64.
    """
    out = torch.empty(n, k, dtype=dtype, device=words.device)
    again = _launch(nvfp4_expand, n, k, dtype, of_16, not words.is_cpu)
    again((cdiv(words.shape[0], _R), cdiv(words.shape[1], _C)), words, scales, shift, out)
    return out


@functools.lru_cache(maxsize=1 << 10)
def _launch(kernel: Any, n: int, k: int, dtype: torch.dtype, of_16: bool, fast: bool) -> Launch:
    kind = KINDS[dtype]
    kind += " of 16" * (of_16 and kind == "fp8")
    return Launch(kernel, (n, k), R=_R, C=_C, KIND=kind, FAST=fast, num_warps=_WARPS)


def fp8_values(p: Packed) -> Tensor:
    """The weight that W4A8 multiplies by, ``E4M3(e2m1 * scale * 2^shift * 2^-7) * row_scale * 2^7``.

    Returns:
        FP32 ``[n, K64]``, its columns in ``FP8_COLUMNS`` order.

    Raises:
        ValueError: a weight that is stored for 16-bit products.
    """
    if not p.fp8:
        raise ValueError("the weight is stored for 16-bit products; its FP8 values need one for FP8 products")
    weight = expand(p.words, p.scales, p.shift, p.n, padded(p.n, p.k)[1], torch.float8_e4m3fn)
    return weight.float().mul_(p.row_scale[:, None] * VALUE_POWER.value)


fix_keys(globals())
