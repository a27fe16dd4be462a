"""From stored words and scales to the operand A of a tensor-core product, in registers.

All shapes here are ``[S, R, C, g 8, t 4, word 4, .., .., ..]``: S slices of K, R tiles of 16 rows, C tiles of 64
columns, and the last three the eight codes of a word (``layout.py``). A word is broadcast over them, and the assembly
turns its eight copies, which share one register, into the eight values. Their order is that of the registers of a
fragment, which spares every exchange between threads: ``(kh, rh, kl)`` for 16 bits and ``(rh, j // 2, j % 2)`` for 8.

``FAST`` off computes the same values with integer and FP32 arithmetic, for Triton's interpreter.
"""

from __future__ import annotations

import re

import triton
import triton.language as tl

from adallm.kernels.keys import fix_keys
from adallm.kernels.layout import MAGNITUDE_BIT, SIGN_BIT
from adallm.kernels.layout import SCALE_BIAS as _BIAS


def check_registers(ttgir: str) -> None:
    """Raise a RuntimeError where the compiler did with registers what the kernels must not have.

    Correctness rests on two choices of the compiler, so that the launchers look at each kernel that was compiled. The
    eight copies of a word in ``operand`` must be eight consecutive values of a thread: the first register bases of the
    assembly's result are its last three dimensions. And no product of Hopper's asynchronous tensor core may still run
    when its step ends, since it reads the weights from registers that the next step fills: each wait is for all.
    """
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = re.findall(r"packed_element = 8 : i32.*?-> tensor<[\w]+, (#\w+)>", ttgir)
    want = "register = [[0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0, 0]"
    if not found or not all(want in layouts.get(name, "") for name in found):
        raise RuntimeError(
            "this version of Triton lays out the registers of an NVFP4 kernel in another order than its conversion "
            f"needs: {[layouts.get(name, name) for name in found]}; supported: Triton 3.6 and 3.7"
        )
    if any(int(pending) for pending in re.findall(r"pendings = (\d+)", ttgir)):
        raise RuntimeError(
            "this version of Triton lets a product of an NVFP4 kernel run while its weights are overwritten; "
            "supported: Triton 3.6 and 3.7"
        )


def _shift(destination: str, left: int) -> str:
    if left < 0:
        return f"shr.u32 {destination}, $w, {-left};"
    return f"shl.b32 {destination}, $w, {left};" if left else f"mov.b32 {destination}, $w;"


def _pair(out: str, j: int, magnitude_bit: int) -> str:
    """``out`` = two 16-bit floats, sign at bit 15, magnitude from ``magnitude_bit`` up, of pair j of the word."""
    sign, magnitude = 15 - SIGN_BIT[j], magnitude_bit - MAGNITUDE_BIT[j]
    mask = 7 << magnitude_bit
    if sign == magnitude:
        return f"{_shift(out, sign)} and.b32 {out}, {out}, {(0x8000 | mask) * 0x10001:#010x};"
    return (
        f"{_shift('a', sign)} and.b32 a, a, 0x80008000; {_shift(out, magnitude)} "
        f"lop3.b32 {out}, {out}, {mask * 0x10001:#010x}, a, 0xEA;"
    )


def _asm_16(kind: str, magnitude_bit: int, scales: tuple[int, int]) -> str:
    """A word in $4 -> four registers of two products, (kh, rh); ``scales``: the operands with those of rh = 0 and 1."""
    body = []
    for j in range(4):
        body.append(_pair(f"${j}", j, magnitude_bit))
        body.append(f"fma.rn.{kind} ${j}, ${j}, ${scales[j % 2]}, z;")
    return "{ .reg .b32 a, z; mov.b32 z, 0x80008000;\n" + "\n".join(body).replace("$w", "$4") + " }"


def _asm_8(*tables: int) -> str:
    """A word in $2 -> the E4M3 values of its two rows, four in a register; ``tables``: the operands with both halves of
    the table of the first row, then of the second.
    """
    low, high, low_8, high_8 = tables
    return (
        f"{{ .reg .b32 s, p; and.b32 s, $2, 0x77777777; prmt.b32 p, ${low}, ${high}, s;\n"
        f"lop3.b32 $0, p, $2, 0x80808080, 0xF8; shr.u32 s, s, 16; prmt.b32 p, ${low_8}, ${high_8}, s;\n"
        "shl.b32 s, $2, 4; lop3.b32 $1, p, s, 0x80808080, 0xF8; }"
    )


def _asm_table() -> str:
    """A word of scales in $2 and which byte of it in $3 -> the E4M3 products of that scale and the eight magnitudes."""
    body = ["prmt.b32 s, $2, 0, $3; shr.u32 s, s, 1;"]
    for half in range(2):
        for pair in range(2):
            first = 4 * half + 2 * pair
            two = (first + 1) << _FP16_BIT + 16 | first << _FP16_BIT
            body.append(f"mov.b32 p, {two:#010x}; mul.rn.f16x2 p, s, p; cvt.rn.satfinite.e4m3x2.f16x2 b{pair}, p;")
        body.append(f"mov.b32 ${half}, {{b0, b1}};")
    return "{ .reg .b32 s, p; .reg .b16 b0, b1;\n" + "\n".join(body) + " }"


# Lowest bit of the magnitude: its top two bits are the lowest of the exponent, 8 mantissa bits in BF16 and 10 in FP16.
_BF16_BIT, _FP16_BIT = 6, 9

# Eight copies of a word and of the scales of its values, in the order (kh, rh, kl).
_INPUTS, _OF_EIGHT = ",r" * 16, (12, 14)
_ASM_BF16 = tl.constexpr(_asm_16("bf16x2", _BF16_BIT, _OF_EIGHT))
_ASM_FP16 = tl.constexpr(_asm_16("f16x2", _FP16_BIT, _OF_EIGHT))
# Eight copies of a word in $2, and of both halves of the tables of its rows, in the order (rh, j).
_ASM_8 = tl.constexpr(_asm_8(10, 18, 14, 22))
_ASM_FOURS = tl.constexpr(_asm_8(3, 4, 5, 6))
_ASM_TABLE = tl.constexpr(_asm_table())
_ASM_E4M3 = tl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;\n"
    "mov.b32 $0, {a, b}; }"
)
_ASM_PAIRS_BF16 = tl.constexpr(_asm_16("bf16x2", _BF16_BIT, (5, 6)))
_ASM_PAIRS_FP16 = tl.constexpr(_asm_16("f16x2", _FP16_BIT, (5, 6)))
_OUT_16 = tl.constexpr("=&r,=&r,=&r,=&r" + _INPUTS)
_OUT_8 = tl.constexpr("=&r,=&r" + _INPUTS + ",r" * 8)

# A scale byte in the exponent and mantissa of a 16-bit float: s * 2^7 in FP16. In BF16, whose exponent has three bits
# more, those are set and give s * 2^119. That meets the 2^-14 or 2^-126 of the codes.
_ASM_SCALE_EVEN = tl.constexpr(
    "{ .reg .b32 a; shl.b32 $0, $1, 4; mov.b32 a, 0x70007000; lop3.b32 $0, $0, 0x0FF00FF0, a, 0xEA; }"
)
_ASM_SCALE_ODD = tl.constexpr(
    "{ .reg .b32 a; shr.u32 $0, $1, 4; mov.b32 a, 0x70007000; lop3.b32 $0, $0, 0x0FF00FF0, a, 0xEA; }"
)
VALUE_POWER = tl.constexpr(2.0**7)  # what the values are too small by

SCALE_BIAS = tl.constexpr(_BIAS)
_SIGN_BITS = tl.constexpr(sum(bit << 4 * j for j, bit in enumerate(SIGN_BIT)))
_MAGNITUDE_BITS = tl.constexpr(sum(bit << 4 * j for j, bit in enumerate(MAGNITUDE_BIT)))


@triton.jit
def _kk():
    """Index of the 16 columns in a tile, along axis 5 of nine."""
    return tl.reshape(tl.arange(0, 4), [1, 1, 1, 1, 1, 4, 1, 1, 1])


@triton.jit
def _kk_scales(words, KIND: tl.constexpr):
    """Scale words ``[.., g, 1, 1, ..]`` -> for each kk, the scale twice in 16-bit floats (``[.., g, 1, kk, ..]``)."""
    if KIND == "bf16":
        even = tl.inline_asm_elementwise(_ASM_SCALE_EVEN, "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
        odd = tl.inline_asm_elementwise(_ASM_SCALE_ODD, "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        even = (words << 7) & 0x7F807F80
        odd = (words >> 1) & 0x7F807F80
    kk = _kk()
    two = tl.where(kk % 2 == 0, even, odd)
    low = tl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $1; mov.b32 $0, {a, a}; }",
        "=r,r",
        [two],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    high = tl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $1; mov.b32 $0, {b, b}; }",
        "=r,r",
        [two],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    return tl.where(kk < 2, low, high)


@triton.jit
def to_e4m3(x, FAST: tl.constexpr):
    """FP32 to E4M3, to nearest, ties to even, saturating at +-448, NaN staying NaN. Triton's own conversion goes by way
    of FP16 on sm_89, which rounds twice; its interpreter truncates and loses NaN.
    """
    if FAST:
        return tl.inline_asm_elementwise(_ASM_E4M3, "=r,r,r,r,r", [x], dtype=tl.float8e4nv, is_pure=True, pack=4)
    byte = round_e4m3(x).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(x == x, byte, 0x7F).to(tl.float8e4nv, bitcast=True)


@triton.jit
def token_scale(amax):
    """``amax / 448``, 1 where that is 0: ``fp8.scale_of``."""
    scale = tl.math.div_rn(amax, 448.0)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def round_e4m3(x):
    """``E4M3(x)`` in FP32, to nearest, ties to even, for ``|x|`` up to 448."""
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    step = ((tl.maximum(exponent, -6) - 3 + 127) << 23).to(tl.float32, bitcast=True)
    # Adding and subtracting 1.5 * 2^23 rounds to an integer, ties to even.
    return ((x / step + 12582912.0) - 12582912.0) * step


@triton.jit
def _of_pair(scales, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Words ``[.., g, t // 2]`` of scales -> ``[.., g, t, 1, rh, 1, 1]``, and which of their bytes belongs to t, rh."""
    scales = tl.broadcast_to(tl.reshape(scales, [S, R, C, 8, 2, 1]), [S, R, C, 8, 2, 2])
    scales = tl.reshape(scales, [S, R, C, 8, 4, 1, 1, 1, 1])
    t = tl.reshape(tl.arange(0, 4), [1, 1, 1, 1, 4, 1, 1, 1, 1])
    rh = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 1, 2, 1, 1])
    return tl.broadcast(scales, 2 * (t % 2) + rh)


@triton.jit
def _table(scales, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The products of each block's scale and the eight magnitudes, in halves of four E4M3 values."""
    scales, byte = _of_pair(scales, S, R, C)
    # prmt: that byte twice, each above a byte of 0.
    return tl.inline_asm_elementwise(
        _ASM_TABLE,
        "=&r,=&r,r,r",
        [scales, 0x0404 + 0x1010 * byte],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def fours(words, scales, R: tl.constexpr, C: tl.constexpr):
    """The values of an FP8 product as int32 ``[16 R, 16 C]``, four E4M3 in each, in ``FP8_COLUMNS`` order and in any
    layout: for what is stored rather than multiplied.
    """
    low, high = _table(scales, 1, R, C)
    low, low_8 = tl.split(tl.reshape(low, [R, C, 8, 4, 1, 2]))
    high, high_8 = tl.split(tl.reshape(high, [R, C, 8, 4, 1, 2]))
    first, second = tl.inline_asm_elementwise(
        _ASM_FOURS,
        "=&r,=&r,r,r,r,r,r",
        [tl.reshape(words, [R, C, 8, 4, 4]), low, high, low_8, high_8],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    # [R, C, g, t, word, rh] -> [R, rh, g, C, word, t]
    return tl.reshape(tl.permute(tl.join(first, second), [0, 5, 2, 1, 4, 3]), [R * 16, C * 16])


@triton.jit
def _slow_8(words, scales, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    scales, byte = _of_pair(scales, S, R, C)
    rh = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 1, 2, 1, 1])
    j = 2 * tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 1, 1, 2, 1])
    j += tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 1, 1, 1, 2])
    sign = (words >> (8 * j + 7 - 4 * rh)) & 1
    return _product(sign, (words >> (16 * rh + 4 * j)) & 7, (scales >> (8 * byte)) & 0xFF)


@triton.jit
def _product(sign, code, byte):
    """``e2m1 * scale * 2^-7`` in FP32."""
    exponent, mantissa = code >> 1, code & 1
    magnitude = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0)).to(tl.float32) * 0.5
    # FP32 has room for the exponent as it is: 2^(e - 22), and 0 for the byte 0.
    scale = ((byte + ((127 - SCALE_BIAS) << 3)) << 20).to(tl.float32, bitcast=True)
    scale = tl.where(byte == 0, 0.0, scale)
    return tl.where(sign == 1, -magnitude, magnitude) * scale * (1.0 / 128)


@triton.jit
def _slow(words, scales, j):
    half = words >> (16 * tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 1, 1, 1, 2]))
    sign = (half >> (((j * 0 + _SIGN_BITS) >> (4 * j)) & 15)) & 1
    code = (half >> (((j * 0 + _MAGNITUDE_BITS) >> (4 * j)) & 15)) & 7
    return _product(sign, code, (scales >> (8 * _kk())) & 0xFF)


@triton.jit
def operand(words, scales, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr):
    """The stored tiles as operand A, ``[S, 16 R, 64 C]``: ``e2m1 * scale * 2^-7``, exact in BF16 and FP16,
    rounded in E4M3; in FP32 if not ``FAST``.

    Args:
        words: int32, ``S R C 128`` elements in stored order.
        scales: int32, ``S R C 16`` elements in stored order.
        KIND: ``"bf16"``, ``"fp16"`` or ``"fp8"``.
    """
    words = tl.broadcast_to(tl.reshape(words, [S, R, C, 8, 4, 4, 1, 1, 1]), [S, R, C, 8, 4, 4, 2, 2, 2])
    if KIND == "fp8":
        if FAST:
            low, high = _table(scales, S, R, C)
            low = tl.broadcast_to(low, [S, R, C, 8, 4, 4, 2, 2, 2])
            high = tl.broadcast_to(high, [S, R, C, 8, 4, 4, 2, 2, 2])
            out = tl.inline_asm_elementwise(_ASM_8, _OUT_8, [words, low, high], tl.float8e4nv, is_pure=True, pack=8)
        else:
            out = round_e4m3(_slow_8(words, scales, S, R, C))
    elif FAST:
        scales = tl.reshape(scales, [S, R, C, 8, 1, 1, 1, 2, 1])
        scales = tl.broadcast_to(_kk_scales(scales, KIND), [S, R, C, 8, 4, 4, 2, 2, 2])
        if KIND == "bf16":
            out = tl.inline_asm_elementwise(_ASM_BF16, _OUT_16, [words, scales], tl.bfloat16, is_pure=True, pack=8)
        else:
            out = tl.inline_asm_elementwise(_ASM_FP16, _OUT_16, [words, scales], tl.float16, is_pure=True, pack=8)
    else:
        scales = tl.reshape(scales, [S, R, C, 8, 1, 1, 1, 2, 1])
        pair = tl.reshape(tl.arange(0, 4), [1, 1, 1, 1, 1, 1, 2, 2, 1])
        out = _slow(words, scales, pair)
    if KIND == "fp8":  # columns (word, t, j): the order of FP8_COLUMNS
        out = tl.permute(out, [0, 1, 6, 3, 2, 5, 4, 7, 8])
    else:  # columns (kk, kh, t, kl)
        out = tl.permute(out, [0, 1, 7, 3, 2, 5, 6, 4, 8])
    return tl.reshape(out, [S, R * 16, C * 64])


@triton.jit
def _halves(pair, dtype: tl.constexpr):
    low = (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = ((pair >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def values(words, scales, R: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr):
    """``e2m1 * scale * 2^-7`` as ``[16 R, 64 C]`` in the order of the columns, in any layout: for what is stored rather
    than multiplied. In FP16 where KIND is "fp16", else in BF16; in FP32 if not ``FAST``.
    """
    if FAST:
        dtype: tl.constexpr = tl.bfloat16 if KIND == "bf16" else tl.float16
        words = tl.reshape(words, [R, C, 8, 4, 4])
        even, odd = tl.split(tl.reshape(scales, [R, C, 8, 1, 1, 2]))
        even = tl.reshape(_kk_scales(tl.reshape(even, [1, R, C, 8, 1, 1, 1, 1, 1]), KIND), [R, C, 8, 1, 4])
        odd = tl.reshape(_kk_scales(tl.reshape(odd, [1, R, C, 8, 1, 1, 1, 1, 1]), KIND), [R, C, 8, 1, 4])
        p00, p01, p10, p11 = tl.inline_asm_elementwise(
            _ASM_PAIRS_BF16 if KIND == "bf16" else _ASM_PAIRS_FP16,
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, even, odd],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        # [R, C, g, t, kk, kl, rh, kh]
        out = tl.join(
            tl.join(_halves(p00, dtype), _halves(p01, dtype)), tl.join(_halves(p10, dtype), _halves(p11, dtype))
        )
        return tl.reshape(tl.permute(out, [0, 6, 2, 1, 4, 7, 3, 5]), [R * 16, C * 64])
    return tl.reshape(operand(words, scales, 1, R, C, KIND, FAST), [R * 16, C * 64])


@triton.jit
def fp8_order(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of ``[ROWS, COLUMNS]`` into ``FP8_COLUMNS`` order."""
    x = tl.reshape(x, [ROWS, COLUMNS // 64, 4, 4, 4])  # t, word, j
    return tl.reshape(tl.permute(x, [0, 1, 3, 2, 4]), [ROWS, COLUMNS])


@triton.jit
def to_dtype(x, dtype: tl.constexpr, FAST: tl.constexpr):
    """FP32 to the output's dtype. The interpreter truncates to BF16, so that there it is rounded by hand."""
    if FAST or dtype != tl.bfloat16:
        return x.to(dtype)
    bits = x.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (tl.where(x == x, rounded, bits | 0x400000) & -65536).to(tl.float32, bitcast=True).to(dtype)


fix_keys(globals())
