"""``matmul.py`` for Hopper: the weights of the next step are expanded while this step multiplies.

The same words, tiles, splits and epilogue as ``nvfp4_matmul``, with ``SLICES = 1`` and K a multiple of two steps, in
Gluon. The asynchronous tensor core reads operand A from registers while it multiplies. Plain Triton does not know that,
so that there each product must be finished before the next weights are made. Here two steps make one round of the loop,
each with registers of its own: while one multiplies, the weights of the other are made.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from adallm.kernels import dequant, matmul
from adallm.kernels.matmul import Config, arguments, constants, grid, promote

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
_ASM_PACK = gl.constexpr(matmul._ASM_PACK.value)
_ASM_UNPACK = gl.constexpr(matmul._ASM_UNPACK.value)
_PACKED = gl.constexpr(matmul._PACKED.value)
_POWER = gl.constexpr(dequant.VALUE_POWER.value)
# Triton 3.6 and 3.7 name it differently.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


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
def _weights(words, scales, R: gl.constexpr, C: gl.constexpr, W: gl.constexpr, KIND: gl.constexpr, MMA: gl.constexpr):
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


@gluon.jit
def _pack(acc):
    """FP32 ``[n, m]`` as pairs of FP16 in int32 ``[n, m / 2]``: half the registers."""
    low, high = gl.split((acc * _PACKED).reshape([acc.shape[0], acc.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(_ASM_PACK, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(pairs, MMA: gl.constexpr):
    low, high = gl.inline_asm_elementwise(
        _ASM_UNPACK, "=f,=f,r", [pairs], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )
    whole = gl.join(low, high).reshape([pairs.shape[0], pairs.shape[1] * 2])
    return gl.convert_layout(whole, MMA, assert_trivial=True) / _PACKED


@gluon.jit(do_not_specialize=["M", "splits"])
def nvfp4_matmul_hopper(
    x,
    words,
    scales,
    row_scale,
    x_scale,
    bias,
    out,
    partial,
    arrivals,
    M,
    N,
    K,
    x_stride,
    out_stride,
    splits,
    R: gl.constexpr,
    BM: gl.constexpr,
    C: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    PROMOTE: gl.constexpr,
    GROUP: gl.constexpr,
    KIND: gl.constexpr,
):
    W: gl.constexpr = gl.num_warps()
    BITS: gl.constexpr = 8 if KIND == "fp8" else 16
    VECTOR: gl.constexpr = 128 // BITS
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, BM, 256 // BITS]
    )
    n_tiles = (N + 15) // 16
    chunks = K // 64
    n_blocks = (n_tiles + R - 1) // R
    pid = gl.program_id(0)
    split = gl.program_id(1)
    m_blocks = (M + BM - 1) // BM
    group = pid // (GROUP * m_blocks)
    width = gl.minimum(n_blocks - group * GROUP, GROUP)
    within = pid - group * GROUP * m_blocks
    block_n = group * GROUP + within % width
    block_m = within // width
    pairs = chunks // (2 * C)
    first = pairs * split // splits * 2
    count = pairs * (split + 1) // splits * 2 - first
    # Without this, and with the sums among what the loop waits for, ptxas would serialize the products.
    gl.assume(count > 0)

    threads_k: gl.constexpr = C * 64 // VECTOR if C * 64 // VECTOR < 32 else 32
    xl: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // threads_k, threads_k], [W, 1], [1, 0])
    wl: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [W, 1], [1, 0])
    sl: gl.constexpr = gl.BlockedLayout([1, 4], [32 // (C * 4), C * 4], [W, 1], [1, 0])
    # Outside the matrix its last row is read again: no load has a mask, and nothing of it is written.
    m = gl.minimum(block_m * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, xl)), M - 1)
    column = gl.arange(0, C * 64, layout=gl.SliceLayout(0, xl))
    xp = x + first * (C * 64) + m.to(gl.int64)[:, None] * x_stride + column[None, :]
    tile = gl.minimum(block_n * R + gl.arange(0, R, layout=gl.SliceLayout(1, wl)), n_tiles - 1)
    column = gl.arange(0, C * 128, layout=gl.SliceLayout(0, wl))
    wp = words + first * (C * 128) + tile[:, None] * (chunks * 128) + column[None, :]
    tile = gl.minimum(block_n * R + gl.arange(0, R, layout=gl.SliceLayout(1, sl)), n_tiles - 1)
    column = gl.arange(0, C * 16, layout=gl.SliceLayout(0, sl))
    sp = scales + first * (C * 16) + tile[:, None] * (chunks * 16) + column[None, :]

    dtype: gl.constexpr = x.dtype.element_ty
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tokens = gl.allocate_shared_memory(
        dtype, [STAGES, BM, C * 64], gl.NVMMASharedLayout.get_default_for([BM, C * 64], dtype)
    )
    codes = gl.allocate_shared_memory(gl.int32, [STAGES, R, C * 128], plain)
    steps_of = gl.allocate_shared_memory(gl.int32, [STAGES, R, C * 16], plain)

    for s in gl.static_range(STAGES - 1):
        if s < count:
            async_copy.async_copy_global_to_shared(tokens.index(s), xp)
            async_copy.async_copy_global_to_shared(codes.index(s), wp)
            async_copy.async_copy_global_to_shared(steps_of.index(s), sp)
        async_copy.commit_group()
        xp += C * 64
        wp += C * 128
        sp += C * 16

    acc = gl.zeros([R * 16, BM], gl.float32, mma)
    if PROMOTE:
        packed: gl.constexpr = _pack(acc).type.layout
        earlier = gl.allocate_shared_memory(gl.int32, [R * 16, BM // 2], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    nothing = gl.zeros([W * 64], gl.int32, gl.BlockedLayout([2], [32], [W], [0]))
    slot = 0
    before = STAGES - 1
    async_copy.wait_group(STAGES - 2)
    for segment in range(0, count, PROMOTE if PROMOTE else count):
        product = warpgroup_mma_init(gl.zeros([R * 16, BM], gl.float32, mma))
        end = gl.minimum(segment + PROMOTE, count) if PROMOTE else count
        gl.assume(end > segment)
        for i in range(segment, end, 2):
            # Two steps: each has registers for its weights while the tensor core still reads those of the other.
            for half in gl.static_range(2):
                weight = _weights(codes.index(slot), steps_of.index(slot), R, C, W, KIND, mma)
                product = warpgroup_mma(weight, tokens.index(slot).permute((1, 0)), product, is_async=True)
                warpgroup_mma_wait(1, deps=[nothing])
                # The next step is here, and the one before has no more use for its stage.
                async_copy.wait_group(STAGES - 3)
                if i + half + STAGES - 1 < count:
                    async_copy.async_copy_global_to_shared(tokens.index(before), xp)
                    async_copy.async_copy_global_to_shared(codes.index(before), wp)
                    async_copy.async_copy_global_to_shared(steps_of.index(before), sp)
                async_copy.commit_group()
                xp += C * 64
                wp += C * 128
                sp += C * 16
                before = slot
                slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        acc = warpgroup_mma_wait(0, deps=[product])
        # As in ``nvfp4_matmul``: what FP8 sums have reached waits in shared memory.
        if PROMOTE:
            if segment > 0:
                acc += _unpack(earlier.load(packed), mma)
            if end < count:
                earlier.store(_pack(acc))
    async_copy.wait_group(0)

    ol: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, W], [0, 1])
    acc = gl.convert_layout(acc, ol)
    n = block_n * (R * 16) + gl.arange(0, R * 16, layout=gl.SliceLayout(1, ol))
    m = block_m * BM + gl.arange(0, BM, layout=gl.SliceLayout(0, ol))
    in_n = n < N
    inside = in_n[:, None] & (m < M)[None, :]
    done = True
    if SPLIT:
        at = m.to(gl.int64)[None, :] * N + n[:, None]
        gl.store(partial + split * M.to(gl.int64) * N + at, acc, mask=inside)
        _barrier()
        done = gl.atomic_add(arrivals + pid, 1, sem="acq_rel") == splits - 1
        if done:
            acc = gl.zeros([R * 16, BM], gl.float32, ol)
            for j in range(splits):
                acc += gl.load(partial + j * M.to(gl.int64) * N + at, mask=inside, other=0.0, cache_modifier=".cg")
            gl.store(arrivals + pid, 0)
    if done:
        acc *= (gl.load(row_scale + n, mask=in_n, other=0.0) * _POWER)[:, None]
        if KIND == "fp8":
            acc *= gl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
        if bias is not None:
            acc += gl.load(bias + n, mask=in_n, other=0.0).to(gl.float32)[:, None]
        gl.store(out + m.to(gl.int64)[None, :] * out_stride + n[:, None], acc.to(out.dtype.element_ty), mask=inside)


def launch(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    out: Tensor,
    config: Config,
    *,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> None:
    """As ``matmul.launch``, for a configuration with ``overlap``, and rows of x 16 elements or a multiple apart.

    Raises:
        ValueError: K that is not two steps, or a multiple, for each split.
    """
    k = x.shape[1]
    if not config.takes(k, config.splits):
        raise ValueError(f"K is {k}; {config} takes a multiple of {config.step}, from {config.splits} times that up")
    nvfp4_matmul_hopper[grid(config, out)](
        *arguments(x, words, scales, row_scale, out, config, x_scale, bias, arrivals),
        **constants(config, x),
        STAGES=config.stages,
        PROMOTE=promote(config, k) if x_scale is not None else 0,
        num_warps=config.warps,
    )
