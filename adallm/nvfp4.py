"""The NVFP4 reference: ``w = e2m1 * scale * global_scale``, in plain torch, exact to the byte.

Blocks of 16 run along the last dimension. ``scale`` is E4M3, one for a block; ``global_scale`` is FP32 and a
multiplier, one for a tensor (or one for a row, for layers fused from shards with different scales). Two values share a
byte, the even column in the low nibble.

Two producers of checkpoints compute the same formula in different arithmetic, and both are reproduced byte for byte:

========================  =================================  ================================================
step                      ``layout="modelopt"``              ``layout="compressed-tensors"``
========================  =================================  ================================================
global scale              g = amax / 2688, FP32              d = (1 / amax) * 2688 in the input's dtype, 1 if
                                                             that overflows; divides
block scale               E4M3(block amax / (6 g))           E4M3(d * (block amax / 6)), the bracket in the
                                                             input's dtype
block scale that is 0     1 if it is 0 in FP32, else kept    0.125
code                      E2M1(x / (scale * g))              E2M1(x / (scale / d))
========================  =================================  ================================================

A kept block scale of 0 makes the quotients infinite, or NaN where x is 0: codes 7 and 15, which dequantize to 0.

Both round -0.0 to code 0 and this reference keeps the sign (code 8): it is the only way that quantizing a dequantized
tensor gives the same bytes again, since code 8 dequantizes to -0.0.

The bytes are those that the producer writes on the same device. Torch divides by a Python number exactly on a CPU and
by way of the reciprocal on CUDA, so ``amax / 2688`` and ``block amax / 6`` can differ between the two by one step.

Sources: NVIDIA ModelOpt ``NVFP4QTensor``; compressed-tensors ``calculate_qparams``, ``generate_gparam`` and
``NVFP4PackedCompressor``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adallm import quantizers
from adallm.formats import E2M1_MAX, E2M1_VALUES, E4M3_MAX, NVFP4_BLOCK, NVFP4_RANGE
from adallm.rows import finite_amax, row_pieces, row_slices

LAYOUTS = ("modelopt", "compressed-tensors")
SCALE_RULES = quantizers.RULES
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# 0.125 in E4M3.
_COMPRESSED_TENSORS_ZERO_SCALE = 0x20


@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """A tensor ``[..., K]`` in NVFP4.

    Attributes:
        packed: uint8 ``[..., K/2]``, two E2M1 codes a byte, the even column in the low nibble.
        scale: float8_e4m3fn ``[..., K/16]``, one for a block of 16.
        global_scale: float32, ``[]`` or one for a row (``packed.shape[:-1]``), a multiplier.
        divisor: float32 like ``global_scale`` or None: the number that a compressed-tensors file stores and divides by.
            Its reciprocal is not always an FP32 number, so it is kept, and ``dequantize`` divides by it as
            compressed-tensors does; ``global_scale`` is its rounded reciprocal.
        columns: K before padding, None when K was a multiple of 16.
    """

    packed: Tensor
    scale: Tensor
    global_scale: Tensor
    divisor: Tensor | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        packed, scale = self.packed, self.scale
        if packed.dtype != torch.uint8 or packed.dim() < 1:
            raise ValueError(f"packed is {packed.dtype} {list(packed.shape)}; it must be uint8 [..., K/2]")
        if scale.dtype != torch.float8_e4m3fn:
            raise ValueError(f"scale is {scale.dtype}; it must be float8_e4m3fn")
        columns = packed.shape[-1] * 2
        if columns % NVFP4_BLOCK or scale.shape != (*packed.shape[:-1], columns // NVFP4_BLOCK):
            raise ValueError(
                f"packed {list(packed.shape)} needs a scale of {[*packed.shape[:-1], columns / NVFP4_BLOCK]}, "
                f"one for 16 columns, but scale is {list(scale.shape)}"
            )
        for name, value in (("global_scale", self.global_scale), ("divisor", self.divisor)):
            if value is None and name == "divisor":
                continue
            if value.dtype != torch.float32 or value.shape not in ((), packed.shape[:-1]):
                raise ValueError(
                    f"{name} is {value.dtype} {list(value.shape)}; it must be float32, [] or {list(packed.shape[:-1])}"
                )
        if self.columns is not None and not columns - NVFP4_BLOCK < self.columns <= columns:
            raise ValueError(f"columns {self.columns} does not fit {columns} stored columns")

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that it stands for, ``[..., K]``."""
        return torch.Size((*self.packed.shape[:-1], self.columns or self.packed.shape[-1] * 2))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, block scales and global scales."""
        return self.packed.nbytes + self.scale.nbytes + self.global_scale.nbytes

    def to(self, device: torch.device | str) -> NVFP4Tensor:
        """The same tensor on another device."""
        divisor = None if self.divisor is None else self.divisor.to(device)
        return NVFP4Tensor(
            self.packed.to(device), self.scale.to(device), self.global_scale.to(device), divisor, self.columns
        )


def pack(codes: Tensor) -> Tensor:
    """``byte = codes[2i] | codes[2i+1] << 4``: uint8 ``[..., K]`` of 0..15 to uint8 ``[..., K/2]``.

    Raises:
        ValueError: not uint8, K odd, or a code above 15.
    """
    if codes.dtype != torch.uint8 or codes.dim() < 1 or codes.shape[-1] % 2:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}; they must be uint8 [..., K] with K even")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"a code is {int(codes.max())}; E2M1 codes are 0..15")
    return _pack(codes)


def _pack(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of ``pack``: uint8 ``[..., K/2]`` to uint8 codes ``[..., K]``.

    Raises:
        ValueError: not uint8.
    """
    if packed.dtype != torch.uint8 or packed.dim() < 1:
        raise ValueError(f"packed is {packed.dtype} {list(packed.shape)}; it must be uint8 [..., K/2]")
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode_e2m1(x: Tensor) -> Tensor:
    """The E2M1 code nearest to each value, ties to the even code, saturating at +-6; the sign of zero is kept.

    ``code = round(min(2a, a + 2, a / 2 + 4)) + 8 * signbit`` with ``a = min(|x|, 6)``: the three lines are the grid
    below 2, from 2 to 4 and from 4 to 6, and rounding to even in codes is what the format asks for.

    Args:
        x: bfloat16, float16 or float32, any shape. NaN, which only a block scale of 0 produces, gives code 7.

    Returns:
        uint8 codes 0..15 of the same shape.
    """
    x = x.float().nan_to_num(nan=E2M1_MAX).clamp_(-E2M1_MAX, E2M1_MAX)
    magnitude = x.abs()
    # Rounded before the (even) offset is added: the sum itself could round to a tie.
    code = torch.minimum((magnitude * 2).round_(), magnitude.round().add_(2))
    code = torch.minimum(code, (magnitude / 2).round_().add_(4))
    return code.add_(4).sub_(torch.copysign(torch.tensor(4.0, device=x.device), x)).to(torch.uint8)


@torch.no_grad()
def quantize(
    x: Tensor,
    *,
    scale_rule: str = "max",
    global_scale: Tensor | float | None = None,
    layout: str = "modelopt",
    pad: bool = False,
    importance: Tensor | None = None,
) -> NVFP4Tensor:
    """``scale = E4M3(block amax / 6 / g)``, ``code = E2M1(x / (scale * g))`` with ``g = amax / (6 * 448)``.

    Works through the rows in pieces: beside input and output it needs a few MB.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32, contiguous or not.
        scale_rule: how scales are chosen, of ``quantizers.RULES``; ``"max"``, the formula above, maps each block's amax
            to 6.
        global_scale: multiplier to use in place of the rule's, a float or a float32 tensor, ``[]`` or one for a row.
            Blocks beyond 2688 times it saturate.
        layout: whose arithmetic to reproduce, ``"modelopt"`` or ``"compressed-tensors"`` (the table above).
        pad: append zeros up to a multiple of 16 columns; ``dequantize`` removes them.
        importance: ``[K]``, of each column, for ``"imatrix"``.

    Raises:
        ValueError: a dtype, rule or layout that is not supported; K not a multiple of 16 without ``pad``; a NaN or
            infinity, with its index; no element or all zeros, which leave the global scale undefined unless it is
            given; a global scale that is not a positive FP32 number; an importance that does not fit.
    """
    _check_arguments(x, scale_rule, layout, pad)
    quantizers.check_importance(scale_rule, importance, x.shape[-1])
    columns = x.shape[-1]
    padding = -columns % NVFP4_BLOCK
    if importance is not None:
        importance = torch.nn.functional.pad(importance, (0, padding))
    amax = finite_amax(x) if x.numel() else None
    searched = global_scale is None and scale_rule in quantizers.SEARCHED
    if searched and amax is not None and amax.float() / NVFP4_RANGE > 0:
        global_scale = quantizers.best_global_scale([x], amax, scale_rule, importance)
    global_scale, divisor = resolve_global_scale(
        x, amax, global_scale, layout, quantizers.RANGES.get(scale_rule, NVFP4_RANGE)
    )

    blocks = (columns + padding) // NVFP4_BLOCK
    rows = x.shape[:-1].numel()
    packed = torch.empty(rows, blocks * NVFP4_BLOCK // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, blocks, dtype=torch.float8_e4m3fn, device=x.device)
    for part, piece in row_pieces(x):
        piece = piece.float()
        if padding:
            piece = torch.nn.functional.pad(piece, (0, padding))
        g, d = _of_rows(global_scale, part), _of_rows(divisor, part)
        if scale_rule == "max":
            scale[part] = _block_scale(piece, x.dtype, g, d)
        else:
            scale[part] = quantizers.block_scales(piece, scale_rule, g, importance)[0]
        if scale_rule == "mse_fp8":
            codes = quantizers.codes_for_products(piece, scale[part], g)
        else:
            codes = _codes(piece.unflatten(-1, (blocks, NVFP4_BLOCK)), block_step(scale[part], g, d)).flatten(-2)
        packed[part] = _pack(codes)
    return NVFP4Tensor(
        packed.view(*x.shape[:-1], packed.shape[-1]),
        scale.view(*x.shape[:-1], blocks),
        global_scale,
        divisor,
        columns if padding else None,
    )


def dequantize(t: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``e2m1 * (scale * global_scale)`` in FP32, or ``e2m1 * (scale / divisor)`` with a divisor, rounded to ``dtype``.

    Returns:
        ``[..., K]`` of ``dtype``, without padding columns.

    Raises:
        ValueError: ``dtype`` is not floating point.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be floating point")
    *batch, columns = t.shape
    packed, scale = (part.reshape(-1, max(part.shape[-1], 1)) for part in (t.packed, t.scale))
    pairs = torch.tensor([[E2M1_VALUES[byte & 15], E2M1_VALUES[byte >> 4]] for byte in range(256)]).to(packed.device)
    out = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    for part in row_slices(packed.shape[0], columns, packed.device):
        values = pairs.index_select(0, packed[part].flatten().int()).view(-1, scale.shape[-1], NVFP4_BLOCK)
        values *= block_step(scale[part], _of_rows(t.global_scale, part), _of_rows(t.divisor, part)).unsqueeze(-1)
        out[part] = values.flatten(-2)[:, :columns]
    return out.view(*batch, columns)


def _block_scale(piece: Tensor, dtype: torch.dtype, global_scale: Tensor, divisor: Tensor | None) -> Tensor:
    # The pooling is a maximum over each block, several times faster here than amax over a short last dimension.
    amax = torch.nn.functional.max_pool1d(piece.abs(), NVFP4_BLOCK)
    if divisor is None:
        scale = amax / (E2M1_MAX * global_scale)
        return torch.where(scale == 0, 1.0, scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    scale = ((amax.to(dtype) / E2M1_MAX).float() * divisor).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    # Not torch.where on E4M3: that dtype has few operations.
    scale.view(torch.uint8)[scale.view(torch.uint8) == 0] = _COMPRESSED_TENSORS_ZERO_SCALE
    return scale


def _codes(block: Tensor, step: Tensor) -> Tensor:
    quotient = block / step.unsqueeze(-1)
    if bool((step >= 2).any()):
        # Only such a step takes a subnormal number to -0.0. The producers code that 0; a -0.0 in the input stays 8.
        quotient = torch.where((quotient == 0) & (block != 0), 0.0, quotient)
    return encode_e2m1(quotient)


def block_step(scale: Tensor, global_scale: Tensor, divisor: Tensor | None) -> Tensor:
    return scale.float() * global_scale if divisor is None else scale.float() / divisor


def _of_rows(value: Tensor | None, rows: slice) -> Tensor | None:
    """The part of a scale, ``[]`` or one for a row, that belongs to ``rows``, so that it broadcasts over blocks."""
    return value if value is None or value.dim() == 0 else value.reshape(-1, 1)[rows]


def _check_arguments(x: Tensor, scale_rule: str, layout: str, pad: bool) -> None:
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x is {x.dtype}; supported: bfloat16, float16, float32")
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"scale_rule {scale_rule!r}; supported: {', '.join(SCALE_RULES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}; supported: {', '.join(LAYOUTS)}")
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [..., K] with K at least 1")
    if x.shape[-1] % NVFP4_BLOCK and not pad:
        raise ValueError(f"x has {x.shape[-1]} columns, not a multiple of {NVFP4_BLOCK}; pass pad=True to append zeros")


def resolve_global_scale(
    x: Tensor, amax: Tensor | None, given: Tensor | float | None, layout: str, range_: float
) -> tuple[Tensor, Tensor | None]:
    """The multiplier and, for compressed-tensors, the divisor; amax is ``range_`` multipliers if none is given."""
    if given is not None:
        value = torch.as_tensor(given, dtype=torch.float32, device=x.device)
        if value.shape not in ((), x.shape[:-1]):
            raise ValueError(
                f"global_scale is {list(value.shape)}; it must be [] or {list(x.shape[:-1])}, one for a row"
            )
        divisor = value.reciprocal() if layout == "compressed-tensors" else None
        if not all(bool((torch.isfinite(v) & (v > 0)).all()) for v in (value, divisor) if v is not None):
            raise ValueError("global_scale, and its reciprocal for compressed-tensors, must be positive and finite")
        return (value, None) if divisor is None else (divisor.reciprocal(), divisor)
    if amax is None or amax == 0:
        what = "is all zeros: amax is 0" if x.numel() else "has no element: amax is undefined"
        raise ValueError(
            f"x {list(x.shape)} {what} and so is the global scale; pass global_scale, or leave the tensor unquantized"
        )
    if layout == "compressed-tensors":
        # Its division is in the dtype of the input, and 1 stands in where that overflows.
        divisor = torch.nan_to_num(range_ / amax, posinf=1.0).float()
        return divisor.reciprocal(), divisor
    value = amax.float() / range_
    if value == 0:
        raise ValueError(f"x {list(x.shape)} has amax {float(amax)}: amax / {range_:g} underflows to 0 in FP32")
    return value, None
