"""The NVFP4 reference: ``w = e2m1 * scale * global_scale``, in plain torch, exact to the byte.

Blocks of 16 run along the last dimension. ``scale`` is E4M3, one for a block; ``global_scale`` is FP32 and a
multiplier, one for a tensor (or one for a row, for layers fused from shards with different scales). Two values share a
byte, the even column in the low nibble.

Two producers of checkpoints compute the same formula in different arithmetic, and both are reproduced byte for byte:

========================  =================================  ================================================
step                      ``layout="modelopt"``              ``layout="compressed-tensors"``
========================  =================================  ================================================
global scale              g = amax / 2688, FP32              d = 2688 / amax in the input's dtype; divides
block scale               E4M3(block amax / (6 g))           E4M3(d * (block amax / 6)), the bracket in the
                                                             input's dtype
block scale that is 0     1 if block amax is 0, else kept    0.125
code                      E2M1(x / (scale * g))              E2M1(x / (scale / d))
========================  =================================  ================================================

Both round -0.0 to code 0 and this reference keeps the sign (code 8): it is the only way that quantizing a dequantized
tensor gives the same bytes again, since code 8 dequantizes to -0.0.

Sources: NVIDIA ModelOpt ``NVFP4QTensor``; compressed-tensors ``calculate_qparams``, ``generate_gparam`` and
``NVFP4PackedCompressor``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adallm.formats import E2M1_MAX, E2M1_VALUES, E4M3_MAX, NVFP4_BLOCK, NVFP4_RANGE

LAYOUTS = ("modelopt", "compressed-tensors")
SCALE_RULES = ("max",)
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Elements converted at a time: small enough for the temporaries to stay in the cache.
_CHUNK = 1 << 18
_COMPRESSED_TENSORS_ZERO_SCALE = 0.125


@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """A tensor ``[..., K]`` in NVFP4.

    Attributes:
        packed: uint8 ``[..., K/2]``, two E2M1 codes a byte, the even column in the low nibble.
        scale: float8_e4m3fn ``[..., K/16]``, one for a block of 16.
        global_scale: float32, ``[]`` or one for a row (``packed.shape[:-1]``), a multiplier.
        divisor: float32 like ``global_scale`` or None: the FP32 number that a compressed-tensors file stores and divides
            by. Its reciprocal is not always an FP32 number, so it is kept, and ``dequantize`` divides by it as
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

    Args:
        x: floating point, any shape. NaN, which only a block scale of 0 can produce, gives code 7.

    Returns:
        uint8 codes 0..15 of the same shape.
    """
    magnitude = x.abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    # Midpoints of the grid; a tie goes up where the upper code is the even one.
    for midpoint, tie_goes_up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code += magnitude >= midpoint if tie_goes_up else magnitude > midpoint
    nan = magnitude.isnan()
    return torch.where(nan, 7, code | (torch.signbit(x) & ~nan).to(torch.uint8) << 3)


def quantize(
    x: Tensor,
    *,
    scale_rule: str = "max",
    global_scale: Tensor | float | None = None,
    layout: str = "modelopt",
    pad: bool = False,
) -> NVFP4Tensor:
    """``scale = E4M3(block amax / 6 / g)``, ``code = E2M1(x / (scale * g))`` with ``g = amax / (6 * 448)``.

    Works through the rows in chunks: beside input and output it needs a few MB.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32, contiguous or not.
        scale_rule: how block scales are chosen; ``"max"`` maps each block's amax to 6.
        global_scale: multiplier to use in place of amax / 2688, a float or a float32 tensor, ``[]`` or one for a row.
        layout: whose arithmetic to reproduce, ``"modelopt"`` or ``"compressed-tensors"`` (the table above).
        pad: append zeros up to a multiple of 16 columns; ``dequantize`` removes them.

    Raises:
        ValueError: a dtype, rule or layout that is not supported; K not a multiple of 16 without ``pad``; a NaN or
            infinity, with its index; all zeros, which leave the global scale undefined unless it is given.
    """
    _check_arguments(x, scale_rule, layout, pad)
    amax = _finite_amax(x)
    divisor = None
    if global_scale is not None:
        global_scale = _given_global_scale(global_scale, x)
        divisor = global_scale.reciprocal() if layout == "compressed-tensors" else None
    elif amax == 0:
        raise ValueError(
            f"x {list(x.shape)} is all zeros: amax is 0 and the global scale undefined; pass global_scale, or leave "
            "the tensor unquantized"
        )
    elif layout == "modelopt":
        global_scale = amax.float() / NVFP4_RANGE
        if global_scale == 0:
            raise ValueError(f"x {list(x.shape)} has amax {float(amax)}: amax / 2688 is not an FP32 number but 0")
    else:
        # compressed-tensors divides in the input's dtype and takes 1 where that overflows.
        divisor = torch.nan_to_num(NVFP4_RANGE / amax, posinf=1.0).float()
        global_scale = divisor.reciprocal()

    columns = x.shape[-1]
    padded = -(-columns // NVFP4_BLOCK) * NVFP4_BLOCK
    rows = x.numel() // columns
    packed = torch.empty(rows, padded // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, padded // NVFP4_BLOCK, dtype=torch.float8_e4m3fn, device=x.device)
    for first, block in _row_chunks(x, columns):
        part = slice(first, first + block.shape[0])
        if padded != columns:
            block = torch.nn.functional.pad(block, (0, padded - columns))
        block = block.unflatten(-1, (-1, NVFP4_BLOCK))
        g = global_scale if global_scale.dim() == 0 else global_scale.reshape(-1, 1)[part]
        d = divisor if divisor is None or divisor.dim() == 0 else divisor.reshape(-1, 1)[part]
        scale[part] = _block_scale(block, g, d)
        codes = encode_e2m1(block / _step(scale[part], g, d).unsqueeze(-1))
        packed[part] = _pack(codes.flatten(-2))
    return NVFP4Tensor(
        packed.view(*x.shape[:-1], -1),
        scale.view(*x.shape[:-1], -1),
        global_scale,
        divisor,
        columns if padded != columns else None,
    )


def dequantize(t: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``e2m1 * (scale * global_scale)`` in FP32 (``e2m1 * (scale / divisor)`` where there is a divisor), then ``dtype``.

    Returns:
        ``[..., K]`` of ``dtype``, without padding columns.
    """
    columns = t.packed.shape[-1] * 2
    rows = t.packed.numel() * 2 // max(columns, 1)
    pairs = torch.tensor(
        [[E2M1_VALUES[byte & 15], E2M1_VALUES[byte >> 4]] for byte in range(256)], device=t.packed.device
    )
    packed, scale = t.packed.reshape(rows, -1), t.scale.reshape(rows, -1)
    out = torch.empty(rows, columns, dtype=dtype, device=t.packed.device)
    step_rows = max(_CHUNK // max(columns, 1), 1)
    for first in range(0, rows, step_rows):
        part = slice(first, first + step_rows)
        g = t.global_scale if t.global_scale.dim() == 0 else t.global_scale.reshape(-1, 1)[part]
        d = t.divisor if t.divisor is None or t.divisor.dim() == 0 else t.divisor.reshape(-1, 1)[part]
        values = pairs[packed[part].int()].flatten(-2).unflatten(-1, (-1, NVFP4_BLOCK))
        values *= _step(scale[part], g, d).unsqueeze(-1)
        out[part] = values.flatten(-2)
    return out.view(*t.packed.shape[:-1], columns)[..., : t.columns or columns].contiguous()


def _block_scale(block: Tensor, global_scale: Tensor, divisor: Tensor | None) -> Tensor:
    amax = block.abs().amax(-1)
    if divisor is None:
        scale = amax.float() / (E2M1_MAX * global_scale)
        scale = torch.where(scale == 0, 1.0, scale).clamp(max=E4M3_MAX)
        return scale.to(torch.float8_e4m3fn)
    scale = ((amax / E2M1_MAX).float() * divisor).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    zero = torch.tensor(_COMPRESSED_TENSORS_ZERO_SCALE, device=block.device).to(torch.float8_e4m3fn)
    return torch.where(scale.float() == 0, zero.view(torch.uint8), scale.view(torch.uint8)).view(torch.float8_e4m3fn)


def _step(scale: Tensor, global_scale: Tensor, divisor: Tensor | None) -> Tensor:
    return scale.float() * global_scale if divisor is None else scale.float() / divisor


def _row_chunks(x: Tensor, columns: int):
    """Yield (first row, rows ``[n, K]``) of ``x`` seen as a matrix, without a contiguous copy of the whole."""
    if x.dim() <= 2:
        x = x.reshape(-1, columns)
        step = max(_CHUNK // max(columns, 1), 1)
        for first in range(0, x.shape[0], step):
            yield first, x[first : first + step]
        return
    rows = x[0].numel() // max(columns, 1)
    for i in range(x.shape[0]):
        for first, block in _row_chunks(x[i], columns):
            yield i * rows + first, block


def _check_arguments(x: Tensor, scale_rule: str, layout: str, pad: bool) -> None:
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x is {x.dtype}; supported: bfloat16, float16, float32")
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"scale_rule {scale_rule!r}; supported: {', '.join(SCALE_RULES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}; supported: {', '.join(LAYOUTS)}")
    if x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [..., K] and not empty")
    if x.shape[-1] % NVFP4_BLOCK and not pad:
        raise ValueError(
            f"x has {x.shape[-1]} columns, not a multiple of {NVFP4_BLOCK}; pass pad=True to append zeros"
        )


def _finite_amax(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    amax = torch.maximum(-low, high)
    if not torch.isfinite(amax):
        for first, block in _row_chunks(x, x.shape[-1]):
            bad = (~torch.isfinite(block)).nonzero()
            if len(bad):
                row, column = int(bad[0, 0]), int(bad[0, 1])
                index = [*map(int, torch.unravel_index(torch.tensor(first + row), x.shape[:-1] or (1,))), column]
                index = index[-x.dim() :]
                raise ValueError(f"x{index} is {float(block[row, column])}; every value must be finite")
    return amax


def _given_global_scale(value: Tensor | float, x: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32, device=x.device)
    if value.shape not in ((), x.shape[:-1]):
        raise ValueError(f"global_scale is {list(value.shape)}; it must be [] or {list(x.shape[:-1])}, one for a row")
    if not bool(torch.isfinite(value).all() and (value > 0).all()):
        raise ValueError("global_scale must be positive and finite")
    return value
