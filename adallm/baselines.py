"""MXFP4 and INT4 in groups of 128, to compare NVFP4 with: quantize and dequantize in one step (QDQ), nothing is stored.

``FORMATS`` holds them by the names that ``formats.BITS_PER_WEIGHT`` uses.

Sources: OCP Microscaling Formats (MX) v1.0, section 6.3, for MXFP4; the checkpoints of GPTQ and AWQ for INT4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from adallm.formats import E2M1_VALUES, E8M0_BIAS, E8M0_VALUES, INT4_GROUP, MXFP4_BLOCK
from adallm.nvfp4 import INPUT_DTYPES, encode_e2m1
from adallm.rows import finite_amax, row_pieces

# Exponent of the largest E2M1 number, 6 = 1.5 * 2^2.
_E2M1_EMAX = 2
_E8M0_MAX = 127
_FP16_MIN_SUBNORMAL = 2.0**-24


def mxfp4(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """``E2M1(x / scale) * scale`` with ``scale = 2^(floor(log2 amax) - 2)`` for each block of 32 along K.

    The exponent is clamped to what E8M0 holds, -127..127. A block's amax lies between 4 and 8 times its scale, and what
    lies beyond 6 is cut to 6.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32, K a multiple of 32.
        dtype: of the result, that of ``x`` if None.

    Raises:
        ValueError: another dtype or K; a NaN or infinity, with its index; no element.
    """
    return _by_block(x, MXFP4_BLOCK, _mxfp4, dtype)


def int4(x: Tensor, *, group: int = INT4_GROUP, symmetric: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """``(clamp(round(x / scale) + zero, 0, 15) - zero) * scale`` for each group along K.

    Asymmetric: ``scale = (high - low) / 15``, ``zero = round(-low / scale)``, where low and high are the group's
    extremes and 0. Symmetric: ``scale = amax / 7.5``, ``zero = 8``, so that codes less 8 reach from -8 to 7. ``scale``
    is rounded to FP16, which GPTQ and AWQ checkpoints store, before codes and zero are computed from it; it is at least
    2^-24, so a group of zeros stays zero. Everything else is FP32.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32, K a multiple of ``group``.
        group: columns that share a scale.
        dtype: of the result, that of ``x`` if None.

    Raises:
        ValueError: another dtype or K; a NaN or infinity, with its index; no element; a scale beyond FP16.
    """
    return _by_block(x, group, _int4_symmetric if symmetric else _int4, dtype)


FORMATS: Mapping[str, Callable[..., Tensor]] = {
    "mxfp4": mxfp4,
    "int4-g128": int4,
    "int4-g128-sym": partial(int4, symmetric=True),
}


@torch.no_grad()
def _by_block(x: Tensor, size: int, qdq: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> Tensor:
    if x.dtype not in INPUT_DTYPES or x.dim() < 1:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; supported: bfloat16, float16, float32 [..., K]")
    if x.shape[-1] % size:
        raise ValueError(f"x has {x.shape[-1]} columns, not a multiple of {size}")
    finite_amax(x)
    out = torch.empty(x.shape[:-1].numel(), x.shape[-1], dtype=dtype or x.dtype, device=x.device)
    for rows, piece in row_pieces(x):
        out[rows] = qdq(piece.float().unflatten(-1, (-1, size))).flatten(-2)
    return out.view(x.shape)


def _mxfp4(block: Tensor) -> Tensor:
    # frexp gives amax = m * 2^e with m in [0.5, 1), so that floor(log2 amax) is e - 1, without rounding.
    exponent = torch.frexp(block.abs().amax(-1, keepdim=True)).exponent - 1 - _E2M1_EMAX
    exponent = exponent.clamp(-E8M0_BIAS, _E8M0_MAX)
    scale = torch.tensor(E8M0_VALUES, device=block.device)[exponent + E8M0_BIAS]
    return torch.tensor(E2M1_VALUES, device=block.device)[encode_e2m1(block / scale).int()] * scale


def _int4(group: Tensor) -> Tensor:
    low, high = group.amin(-1, keepdim=True).clamp(max=0), group.amax(-1, keepdim=True).clamp(min=0)
    scale = _fp16_scale((high - low) / 15)
    zero = (-low / scale).round().clamp(0, 15)
    return (((group / scale).round() + zero).clamp(0, 15) - zero) * scale


def _int4_symmetric(group: Tensor) -> Tensor:
    scale = _fp16_scale(group.abs().amax(-1, keepdim=True) / 7.5)
    return (group / scale).round().clamp(-8, 7) * scale


def _fp16_scale(scale: Tensor) -> Tensor:
    stored = scale.clamp(min=_FP16_MIN_SUBNORMAL).half().float()
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"a group needs a scale of {float(scale.max()):.4g}, beyond FP16, in which scales are stored")
    return stored
