"""How the kernels store an NVFP4 weight: the order in which a tensor-core fragment wants it.

``w[n, k] = e2m1 * scale * row_scale[n]``, with the codes of a checkpoint in another order and the row's power of two
moved from its block scales into ``row_scale``. Both are exact, and ``to_checkpoint`` undoes them bit for bit.

**Codes.** ``words`` is int32 ``[N16, K64, 32, 4]``: tiles of 16 rows and 64 columns, 128 words each. Lane ``4 g + t`` of
a warp owns four consecutive words (one 16-byte load), word ``kk`` for the columns ``16 kk ..`` of the tile. Its eight
codes are those that the lane holds of a 16x16 operand A of ``mma.m16n8k16`` and ``wgmma.m64nNk16`` alike::

    row = g + 8 rh        column = 16 kk + 8 kh + 2 t + kl        rh, kh, kl in 0..1

``kl`` picks the half of the word. In each half, the sign and the magnitude of pair ``j = 2 kh + rh`` stand at the bits
of ``SIGN_BIT[j]`` and ``MAGNITUDE_BIT[j] + 2 .. MAGNITUDE_BIT[j]``. A code becomes a 16-bit float by masking these into
the sign, the two low exponent bits and the top mantissa bit, which gives ``e2m1 * 2^-126`` (BF16) or ``e2m1 * 2^-14``
(FP16), subnormals included; the positions are those that need the fewest rotations and masks for BF16: 11
instructions for 8 codes, found by trying all arrangements.

**Scales.** ``scales`` is int32 ``[N16, K64, 8, 2]``, indexed by ``g`` and ``rh``: the four E4M3 bytes of the row's
blocks ``kk = 0..3``, lowest byte first. Each row's scales are multiplied by the largest power of two that keeps them
within E4M3 (its largest scale lands above 224), and ``row_scale`` is divided by it. What E4M3 holds as a subnormal may
become normal; nothing is rounded.

N is padded to a multiple of 16 and K to one of 64, with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adallm.nvfp4 import NVFP4Tensor, pack, unpack

TILE_N = 16
TILE_K = 64

# Of pair j = 2 kh + rh, in each 16-bit half of a word.
SIGN_BIT = (0, 1, 2, 15)
MAGNITUDE_BIT = (3, 12, 9, 6)

# The order of K in E4M3 operands. An FP8 fragment holds four consecutive k, and the words above hold two pairs that are
# eight apart, so that within each 16 columns, position 4 t + 2 kh + kl stands for column 8 kh + 2 t + kl.
FP8_COLUMNS = tuple(8 * kh + 2 * t + kl for t in range(4) for kh in range(2) for kl in range(2))

_MAX_EXPONENT_SHIFT = 17  # from the smallest subnormal, 2^-9, to 256
_E4M3_NAN = 0x7F


def padded(n: int, k: int) -> tuple[int, int]:
    """N and K as stored."""
    return -(-n // TILE_N) * TILE_N, -(-k // TILE_K) * TILE_K


def check(weight: NVFP4Tensor) -> None:
    """Raise a ValueError for a weight that the kernels do not hold.

    Supported: ``[N, K]`` with N and K multiples of 16, block scales that are finite and not negative.
    """
    n, k = weight.shape if weight.packed.dim() == 2 else (0, 0)
    if weight.packed.dim() != 2 or n % 16 or k % 16 or not n or not k:
        raise ValueError(f"the weight is {list(weight.shape)}; supported on a GPU: [N, K], both multiples of 16")
    if int(weight.scale.view(torch.uint8).max()) >= _E4M3_NAN:
        raise ValueError("a block scale is negative or NaN; supported on a GPU: finite block scales that are not negative")


@torch.no_grad()
def from_checkpoint(weight: NVFP4Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``words``, ``scales``, ``row_scale`` float32 ``[N]`` and ``shift`` uint8 ``[N]``, its power of two.

    Works through the rows in pieces; beside input and output it needs some MB.

    Raises:
        ValueError: as ``check``.
    """
    check(weight)
    n, k = weight.shape
    rows, columns = padded(n, k)
    device = weight.packed.device
    words = torch.empty(rows // TILE_N, columns // TILE_K, 32, 4, dtype=torch.int32, device=device)
    scales = torch.empty(rows // TILE_N, columns // TILE_K, 8, 2, dtype=torch.int32, device=device)
    shift = torch.empty(n, dtype=torch.uint8, device=device)
    step = max((1 << 24) // columns // TILE_N, 1) * TILE_N
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        tiles = slice(first // TILE_N, -(-part.stop // TILE_N))
        codes = torch.nn.functional.pad(unpack(weight.packed[part]), (0, columns - k))
        words[tiles] = _words(codes)
        scaled, shift[part] = _shifted(weight.scale[part], weight.global_scale.expand(n)[part])
        scales[tiles] = _scale_words(torch.nn.functional.pad(scaled, (0, (columns - k) // 16)))
    row_scale = torch.ldexp(weight.global_scale.expand(n), -shift.int()).contiguous()
    return words, scales, row_scale, shift


@torch.no_grad()
def to_checkpoint(words: Tensor, scales: Tensor, shift: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """``packed`` uint8 ``[N, K/2]`` and ``scale`` float8_e4m3fn ``[N, K/16]``, the bytes that ``from_checkpoint`` took."""
    half = torch.stack((words & 0xFFFF, words >> 16 & 0xFFFF), -1)
    codes = torch.stack([half >> s & 1 for s in SIGN_BIT], -1) << 3
    codes |= torch.stack([half >> m & 7 for m in MAGNITUDE_BIT], -1)
    # [N16, K64, (g t), kk, kl, (kh rh)] -> [N16, rh, g, K64, kk, kh, t, kl]
    codes = codes.unflatten(-1, (2, 2)).unflatten(2, (8, 4)).permute(0, 7, 2, 1, 4, 6, 3, 5)
    packed = pack(codes.reshape(words.shape[0] * TILE_N, -1).to(torch.uint8)[:n, :k])
    byte = torch.stack([scales >> 8 * kk & 0xFF for kk in range(4)], -1)
    byte = byte.permute(0, 3, 2, 1, 4).reshape(words.shape[0] * TILE_N, -1)[:n, : k // 16]
    value = byte.to(torch.uint8).contiguous().view(torch.float8_e4m3fn).float()
    return packed, torch.ldexp(value, -shift.int()[:, None]).to(torch.float8_e4m3fn)


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


def _scale_words(scale: Tensor) -> Tensor:
    """uint8 E4M3 bytes ``[16 n, 4 k]`` -> int32 ``[n, k, 8, 2]``."""
    byte = scale.view(-1, 2, 8, scale.shape[1] // 4, 4).permute(0, 3, 2, 1, 4).int()
    return byte[..., 0] | byte[..., 1] << 8 | byte[..., 2] << 16 | byte[..., 3] << 24


def _shifted(scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 bytes of ``scale * 2^shift`` and ``shift``, one for a row."""
    value = scale.float()
    largest = value.amax(1)
    # The largest shift with largest * 2^shift <= 448, and 0 for a row of zeros.
    shift = torch.floor(torch.log2(448 / largest.clamp(min=2.0**-9))).clamp(0, _MAX_EXPONENT_SHIFT)
    shift = torch.where(torch.ldexp(largest, shift.int()) > 448, shift - 1, shift)
    # The row's scale must stay a normal FP32 number for the division to be exact.
    room = torch.floor(torch.log2(global_scale.clamp(min=2.0**-126))) + 126
    shift = torch.where(largest > 0, torch.minimum(shift, room.clamp(min=0)), 0).int()
    return torch.ldexp(value, shift[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), shift.to(torch.uint8)
