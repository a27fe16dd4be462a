"""How the kernels store an NVFP4 weight: the order in which a tensor-core fragment wants it.

``w[n, k] = e2m1 * scale * row_scale[n]``, with the codes of a checkpoint in another order and the row's power of two
moved from its block scales into ``row_scale``. Both are exact, and ``to_checkpoint`` undoes them bit for bit.

**Codes for 16-bit products.** ``words`` is int32 ``[N16, K64, 32, 4]``: tiles of 16 rows and 64 columns, 128 words
each. Lane ``4 g + t`` of a warp owns four consecutive words (one 16-byte load), word ``kk`` for the columns from
``16 kk`` of the tile. Its eight codes are those that the lane holds of a 16x16 operand A of ``mma.m16n8k16`` and
``wgmma.m64nNk16`` alike::

    row = g + 8 rh        column = 16 kk + 8 kh + 2 t + kl        rh, kh, kl in 0..1

``kl`` picks the half of the word. A half is four signs, then four magnitudes of three bits; those of pair ``2 kh + rh``
stand at ``SIGN_BIT`` and from ``MAGNITUDE_BIT`` up. Shifted and masked to the sign, the two low exponent bits and the
top mantissa bit of a 16-bit float, they are ``e2m1 * 2^-126`` in BF16 or ``e2m1 * 2^-14`` in FP16, subnormals included.
The positions ask little of the integer unit, which issues at half rate: six masks and a right shift for eight BF16
values, while the left shifts become multiplications, which another unit does.

**Codes for FP8 products.** The values of a block are 8 magnitudes times its scale: a table of 8 bytes, from which
``prmt`` takes four at a time. So that a lane uses a table often, it holds whole blocks: lane ``4 g + t`` owns blocks
``t`` of rows ``g`` and ``g + 8``, in words ``i = 0..3``. The columns of a tile are permuted for that, activations alike
(``FP8_COLUMNS``), which a sum does not notice::

    row = g + 8 rh        column = 16 t + 4 i + j        rh in 0..1, j in 0..3

Nibble ``4 rh + j`` of a word has the magnitude in its low bits, as ``prmt`` wants it. The sign of row ``rh = 0`` is bit
``8 j + 7`` and that of the other bit ``8 j + 3``: masked, and the second shifted, the sign bits of four bytes.

**Scales.** ``scales`` is int32 ``[N16, K64, 8, 2]``. For 16-bit products it is indexed by ``g`` and ``rh``: the bytes
of the row's blocks ``kk = 0..3``, lowest byte first. For FP8 products it is indexed by ``g`` and ``t // 2``: the bytes
of ``2 (t % 2) + rh``. A byte is five bits of exponent and three of mantissa, ``2^(e - 22) * (1 + m / 8)`` or 0 for
``e = m = 0``: E4M3 without sign and subnormals, its exponents such that the byte, moved to the right place, is the
scale in FP16 (times 2^7) and, with three bits more, in BF16. Before that, each row's scales are multiplied by the
largest power of two that keeps them within E4M3 (the largest lands above 224), and ``row_scale`` is divided by it, so
that FP8 products have the whole range. Nothing is rounded.

A block whose scale is 0 has its codes set to 0, since in BF16 a scale of 0 has no bits of its own; what they were is
kept in ``Packed.lost``. ModelOpt writes such blocks, with codes 7 and 15, where a scale underflows.

N is padded to a multiple of 16 and K to one of 64, with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adallm.formats import E4M3_MAX
from adallm.nvfp4 import NVFP4Tensor, pack, unpack

TILE_N = 16
TILE_K = 64

# Of pair j = 2 kh + rh, in each 16-bit half of a word.
SIGN_BIT = (15, 12, 13, 14)
MAGNITUDE_BIT = (6, 3, 0, 9)

# The order of K in E4M3 operands: within each 64, position 16 i + 4 t + j, which is where FP8 fragments have byte j of
# register i of lane t, stands for column 16 t + 4 i + j.
FP8_COLUMNS = tuple(16 * t + 4 * i + j for i in range(4) for t in range(4) for j in range(4))

# For FP8 products, of nibble 4 rh + j.
SIGN_BIT_8 = (7, 15, 23, 31, 3, 11, 19, 27)

# Weights in a piece that is reordered at a time.
_PIECE = 1 << 24

# Of a scale byte: the exponent field of 2^0.
SCALE_BIAS = 22

_MAX_SHIFT = 17  # from the smallest subnormal, 2^-9, to 2^8
_E4M3_NAN = 0x7F


@dataclass(frozen=True, eq=False)
class Packed:
    """An NVFP4 weight ``[n, k]`` as the kernels read it.

    Attributes:
        words: int32 ``[N16, K64, 32, 4]``.
        scales: int32 ``[N16, K64, 8, 2]``.
        row_scale: float32 ``[n]``, the global scale over ``2^shift``.
        shift: uint8 ``[n]``.
        lost: int64 ``[z, 9]``: index of a block of scale 0 among the ``n * k / 16``, and its eight packed bytes.
        n, k: rows and columns, without padding.
        fp8: for FP8 products, not 16-bit ones.
    """

    words: Tensor
    scales: Tensor
    row_scale: Tensor
    shift: Tensor
    lost: Tensor
    n: int
    k: int
    fp8: bool = False


def padded(n: int, k: int) -> tuple[int, int]:
    """N and K as stored."""
    return -(-n // TILE_N) * TILE_N, -(-k // TILE_K) * TILE_K


def check(weight: NVFP4Tensor) -> None:
    """Raise a ValueError for a weight that the kernels do not hold.

    Supported: ``[N, K]`` with N and K multiples of 16, block scales that are finite and not negative.
    """
    n, k = weight.packed.shape if weight.packed.dim() == 2 else (0, 0)
    if not n or not k or n % 16:
        raise ValueError(f"the weight is {list(weight.shape)}; supported on a GPU: [N, K], both multiples of 16")
    if int(weight.scale.view(torch.uint8).max()) >= _E4M3_NAN:
        raise ValueError(
            "a block scale is negative or NaN; supported on a GPU: finite block scales that are not negative"
        )


@torch.no_grad()
def from_checkpoint(weight: NVFP4Tensor, *, fp8: bool = False) -> Packed:
    """Reorder a checkpoint's tensors, for 16-bit or for FP8 products. Works through the rows in pieces; beside input
    and output it needs some MB.

    Raises:
        ValueError: as ``check``.
    """
    check(weight)
    n, k = weight.packed.shape[0], weight.packed.shape[1] * 2
    rows, columns = padded(n, k)
    device = weight.packed.device
    words = torch.empty(rows // TILE_N, columns // TILE_K, 32, 4, dtype=torch.int32, device=device)
    scales = torch.empty(rows // TILE_N, columns // TILE_K, 8, 2, dtype=torch.int32, device=device)
    shift = torch.empty(n, dtype=torch.uint8, device=device)
    lost = []
    step = max(_PIECE // columns // TILE_N, 1) * TILE_N
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        tiles = slice(first // TILE_N, -(-part.stop // TILE_N))
        packed, scale = weight.packed[part], weight.scale[part].float()
        bytes_ = packed.unflatten(1, (-1, 8))
        zero = ((scale == 0) & (bytes_ & 0x77).any(-1)).nonzero()
        if len(zero):
            index = (first + zero[:, :1]) * (k // 16) + zero[:, 1:]
            lost.append(torch.cat((index, bytes_[zero[:, 0], zero[:, 1]].long()), 1))
            packed = torch.where(scale.unsqueeze(-1) == 0, 0, bytes_).flatten(1)
        words[tiles] = (_words_8 if fp8 else _words)(torch.nn.functional.pad(unpack(packed), (0, columns - k)))
        shift[part] = _shift(scale, weight.global_scale.expand(n)[part])
        codes = _scale_byte(torch.ldexp(scale, shift[part].int()[:, None]))
        scales[tiles] = _scale_words(torch.nn.functional.pad(codes, (0, (columns - k) // 16)), fp8)
    row_scale = torch.ldexp(weight.global_scale.expand(n), -shift.int()).contiguous()
    empty = torch.empty(0, 9, dtype=torch.int64, device=device)
    return Packed(words, scales, row_scale, shift, torch.cat(lost) if lost else empty, n, k, fp8)


@torch.no_grad()
def to_checkpoint(p: Packed) -> tuple[Tensor, Tensor]:
    """``packed`` uint8 ``[N, K/2]`` and ``scale`` float8_e4m3fn ``[N, K/16]``, byte for byte as they were."""
    if p.fp8:
        codes = torch.stack([p.words >> bit & 1 for bit in SIGN_BIT_8], -1) << 3
        codes |= torch.stack([p.words >> 4 * nibble & 7 for nibble in range(8)], -1)
        # [N16, K64, (g t), i, (rh j)] -> [N16, rh, g, K64, t, i, j]
        codes = codes.unflatten(-1, (2, 4)).unflatten(2, (8, 4)).permute(0, 5, 2, 1, 3, 4, 6)
    else:
        half = torch.stack((p.words & 0xFFFF, p.words >> 16 & 0xFFFF), -1)
        codes = torch.stack([half >> s & 1 for s in SIGN_BIT], -1) << 3
        codes |= torch.stack([half >> m & 7 for m in MAGNITUDE_BIT], -1)
        # [N16, K64, (g t), kk, kl, (kh rh)] -> [N16, rh, g, K64, kk, kh, t, kl]
        codes = codes.unflatten(-1, (2, 2)).unflatten(2, (8, 4)).permute(0, 7, 2, 1, 4, 6, 3, 5)
    packed = pack(codes.reshape(p.words.shape[0] * TILE_N, -1).to(torch.uint8)[: p.n, : p.k])
    packed.view(-1, 8)[p.lost[:, 0]] = p.lost[:, 1:].to(torch.uint8)
    byte = torch.stack([p.scales >> 8 * i & 0xFF for i in range(4)], -1)
    # [N16, K64, g, t // 2, (t % 2 rh)] or [N16, K64, g, rh, kk] -> [N16, rh, g, K64, block]
    byte = byte.unflatten(-1, (2, 2)).permute(0, 5, 2, 1, 3, 4) if p.fp8 else byte.permute(0, 3, 2, 1, 4)
    byte = byte.reshape(p.words.shape[0] * TILE_N, -1)[: p.n, : p.k // 16]
    value = torch.where(byte == 0, 0.0, torch.ldexp(8.0 + (byte & 7), (byte >> 3) - SCALE_BIAS - 3))
    return packed, torch.ldexp(value, -p.shift.int()[:, None]).to(torch.float8_e4m3fn)


def _words(codes: Tensor) -> Tensor:
    """uint8 codes ``[16 n, 64 k]`` -> int32 ``[n, k, 32, 4]``."""
    # rows (N16, rh, g), columns (K64, kk, kh, t, kl)
    codes = codes.view(-1, 2, 8, codes.shape[1] // TILE_K, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 7, 5, 1).int()
    half = torch.zeros(codes.shape[:-2], dtype=torch.int32, device=codes.device)
    for j in range(4):
        code = codes[..., j // 2, j % 2]
        half |= (code >> 3) << SIGN_BIT[j] | (code & 7) << MAGNITUDE_BIT[j]
    words = half[..., 0] | half[..., 1] << 16
    return words.reshape(*words.shape[:2], 32, 4)


def _words_8(codes: Tensor) -> Tensor:
    """uint8 codes ``[16 n, 64 k]`` -> int32 ``[n, k, 32, 4]``, for FP8 products."""
    # rows (N16, rh, g), columns (K64, t, i, j)
    codes = codes.view(-1, 2, 8, codes.shape[1] // TILE_K, 4, 4, 4).permute(0, 3, 2, 4, 5, 1, 6).flatten(-2).int()
    words = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for nibble in range(8):
        words |= (codes[..., nibble] >> 3) << SIGN_BIT_8[nibble] | (codes[..., nibble] & 7) << 4 * nibble
    return words.reshape(*words.shape[:2], 32, 4)


def _scale_byte(scale: Tensor) -> Tensor:
    """FP32 values that E4M3 holds, times a power of two -> int32 bytes."""
    mantissa, exponent = torch.frexp(scale)
    return torch.where(scale == 0, 0, (mantissa * 16).int() - 8 + ((exponent - 1 + SCALE_BIAS) << 3))


def _scale_words(byte: Tensor, fp8: bool) -> Tensor:
    """int32 bytes ``[16 n, 4 k]`` -> int32 ``[n, k, 8, 2]``."""
    byte = byte.view(-1, 2, 8, byte.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)  # [N16, K64, g, rh, kk]
    if fp8:  # [N16, K64, g, kk // 2, (kk % 2 rh)]
        byte = byte.unflatten(-1, (2, 2)).permute(0, 1, 2, 4, 5, 3).flatten(-2)
    return byte[..., 0] | byte[..., 1] << 8 | byte[..., 2] << 16 | byte[..., 3] << 24


def _shift(scale: Tensor, global_scale: Tensor) -> Tensor:
    """The largest power of two for each row that keeps its scales within E4M3; 0 for a row of zeros."""
    largest = scale.amax(1)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, mantissa in [0.5, 1)
    shift = torch.where(mantissa <= E4M3_MAX / 512, 9, 8) - exponent
    # The row's scale must stay a normal FP32 number, or the division by 2^shift would round.
    room = torch.frexp(global_scale)[1] + 125
    return torch.where(largest > 0, torch.minimum(shift, room).clamp(0, _MAX_SHIFT), 0).to(torch.uint8)
