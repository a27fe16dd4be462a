"""``dequant.operand`` in Gluon, for ``hopper.py``: the weights of a step from shared memory to registers."""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from adallm.kernels import dequant
from adallm.kernels.keys import fix_keys

_ASM_BF16 = gl.constexpr(dequant._ASM_BF16.value)
_ASM_FP16 = gl.constexpr(dequant._ASM_FP16.value)
_ASM_8 = gl.constexpr(dequant._ASM_8.value)
_ASM_TABLE = gl.constexpr(dequant._ASM_TABLE.value)
_OUT_16 = gl.constexpr(dequant._OUT_16.value)
_OUT_8 = gl.constexpr(dequant._OUT_8.value)
_ASM_EVEN = gl.constexpr(dequant._ASM_SCALE_EVEN.value)
_ASM_ODD = gl.constexpr(dequant._ASM_SCALE_ODD.value)
_LOW = gl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $1; mov.b32 $0, {a, a}; }")
_HIGH = gl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $1; mov.b32 $0, {b, b}; }")


@triton.constexpr_function
def _bits(n):
    return [1 << i for i in range(n.bit_length() - 1)]


@triton.constexpr_function
def _tile_layout(R, C, W):
    """Of ``[R, C, g 8, t 2 x 2, word 4, 2, 2, 2]``: warps share the tiles of 16 rows, lanes are ``4 g + t``."""

    def unit(axis, value):
        return [value if a == axis else 0 for a in range(9)]

    registers = [unit(8, 1), unit(7, 1), unit(6, 1), unit(5, 1), unit(5, 2)]
    registers += [unit(1, b) for b in _bits(C)] + [unit(0, b * W) for b in _bits(max(R // W, 1))]
    lanes = [unit(4, 1), unit(3, 1), unit(2, 1), unit(2, 2), unit(2, 4)]
    shape = [R, C, 8, 2, 2, 4, 2, 2, 2]
    return gl.DistributedLinearLayout(registers, lanes, [unit(0, b) for b in _bits(W)], [], shape)


@triton.constexpr_function
def _word_layout(R, C, W):
    registers = [[0, 1], [0, 2]] + [[0, 128 * b] for b in _bits(C)] + [[b * W, 0] for b in _bits(max(R // W, 1))]
    lanes = [[0, 4 << i] for i in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, [[b, 0] for b in _bits(W)], [], [R, C * 128])


@triton.constexpr_function
def _scale_layout(R, C, W, KIND):
    registers = [] if KIND == "fp8" else [[0, 1]]
    registers += [[0, 16 * b] for b in _bits(C)] + [[b * W, 0] for b in _bits(max(R // W, 1))]
    lanes = [[0, 0], [0, 1] if KIND == "fp8" else [0, 0], [0, 2], [0, 4], [0, 8]]
    return gl.DistributedLinearLayout(registers, lanes, [[b, 0] for b in _bits(W)], [], [R, C * 16])


@triton.constexpr_function
def _along(layout, axis):
    """Of ``_tile_layout``, along one axis."""
    for other in (*range(8, axis, -1), *range(axis - 1, -1, -1)):
        layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def weights(words, scales, R: gl.constexpr, C: gl.constexpr, W: gl.constexpr, KIND: gl.constexpr, MMA: gl.constexpr):
    """``dequant.operand`` of tiles in shared memory. The compiler asserts that no value moves to be a fragment."""
    tile: gl.constexpr = _tile_layout(R, C, W)
    word = gl.convert_layout(words.load(_word_layout(R, C, W)).reshape([R, C, 8, 2, 2, 4, 1, 1, 1]), tile)
    full = gl.zeros([R, C, 8, 2, 2, 4, 2, 2, 2], gl.int32, tile)
    word, _ = gl.broadcast(word, full)
    scale = scales.load(_scale_layout(R, C, W, KIND))
    if KIND == "fp8":
        scale = gl.convert_layout(scale.reshape([R, C, 8, 2, 1, 1, 1, 1, 1]), tile)
        t = gl.arange(0, 2, layout=_along(tile, 4))[None, None, None, None, :, None, None, None, None]
        rh = gl.arange(0, 2, layout=_along(tile, 6))[None, None, None, None, None, None, :, None, None]
        t, rh = gl.broadcast(t, rh)
        scale, byte = gl.broadcast(scale, 2 * t + rh)
        low, high = gl.inline_asm_elementwise(
            _ASM_TABLE,
            "=&r,=&r,r,r",
            [scale, 0x0404 + 0x1010 * byte],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        low, _ = gl.broadcast(low, full)
        high, _ = gl.broadcast(high, full)
        v = gl.inline_asm_elementwise(_ASM_8, _OUT_8, [word, low, high], dtype=gl.float8e4nv, is_pure=True, pack=8)
    else:
        scale = gl.convert_layout(scale.reshape([R, C, 8, 1, 1, 1, 1, 2, 1]), tile)
        if KIND == "bf16":
            even = gl.inline_asm_elementwise(_ASM_EVEN, "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1)
            odd = gl.inline_asm_elementwise(_ASM_ODD, "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1)
        else:
            even = (scale << 7) & 0x7F807F80
            odd = (scale >> 1) & 0x7F807F80
        kk = gl.arange(0, 4, layout=_along(tile, 5))[None, None, None, None, None, :, None, None, None]
        two = gl.where(kk % 2 == 0, even, odd)
        low = gl.inline_asm_elementwise(_LOW, "=r,r", [two], dtype=gl.int32, is_pure=True, pack=1)
        high = gl.inline_asm_elementwise(_HIGH, "=r,r", [two], dtype=gl.int32, is_pure=True, pack=1)
        scale, _ = gl.broadcast(gl.where(kk < 2, low, high), full)
        if KIND == "bf16":
            v = gl.inline_asm_elementwise(_ASM_BF16, _OUT_16, [word, scale], dtype=gl.bfloat16, is_pure=True, pack=8)
        else:
            v = gl.inline_asm_elementwise(_ASM_FP16, _OUT_16, [word, scale], dtype=gl.float16, is_pure=True, pack=8)
    v = v.permute([0, 6, 2, 1, 5, 3, 4, 7, 8] if KIND == "fp8" else [0, 7, 2, 1, 5, 6, 3, 4, 8])
    fragment: gl.constexpr = gl.DotOperandLayout(0, MMA, 4 if KIND == "fp8" else 2)
    return gl.convert_layout(v.reshape([R * 16, C * 64]), fragment, assert_trivial=True)


fix_keys(globals())
