"""``matmul.py`` for Hopper: the weights of the next step are expanded while this step multiplies.

The same words, tiles and results as ``nvfp4_matmul``, with ``SLICES = 1`` and K a multiple of two steps, in
Gluon. The asynchronous tensor core reads operand A from registers while it multiplies. Plain Triton does not know that,
so that there each product must be finished before the next weights are made. Here two steps make one round of the loop,
each with registers of its own: while one multiplies, the weights of the other are made.

Blocks that share tiles take even parts of the steps of all tiles in a row: ``splits`` times as many blocks as tiles, or
``programs``. Each goes through its part backwards. So what it has of a tile that another block ends comes first, and is
left in the workspace; when it comes to the beginning of its part, which ends a tile, what others have of that tile is
there, and it adds that to its own, in order. It waits for none but blocks that were launched before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from adallm.kernels import dequant, matmul
from adallm.kernels.expand import KINDS
from adallm.kernels.hopper_weights import weights
from adallm.kernels.keys import fix_keys
from adallm.kernels.matmul import Config, blocks, constants, partial, promote, shares
from adallm.kernels.start import Launch

_ASM_PACK = gl.constexpr(matmul._ASM_PACK.value)
_ASM_UNPACK = gl.constexpr(matmul._ASM_UNPACK.value)
_PACKED = gl.constexpr(matmul._PACKED.value)
_POWER = gl.constexpr(dequant.VALUE_POWER.value)
# Triton 3.6 and 3.7 name it differently.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


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


@gluon.jit
def _lines(sums, R: gl.constexpr, BM: gl.constexpr, V: gl.constexpr):
    """``[16 R, BM / 2 * V]`` in the order of registers and lanes: each warp writes and reads whole lines."""
    return sums.reshape([R, 2, 8, BM // 8, 4, V]).permute([0, 3, 2, 4, 1, 5]).reshape([R * BM // 8, 64 * V])


@gluon.jit
def _slot(partial, slot, lines):
    line = gl.arange(0, lines.shape[0], layout=gl.SliceLayout(1, lines.type.layout))[:, None] * lines.shape[1]
    word = gl.arange(0, lines.shape[1], layout=gl.SliceLayout(0, lines.type.layout))[None, :]
    return partial + slot.to(gl.int64) * (lines.shape[0] * lines.shape[1]) + line + word


@gluon.jit
def _leave(acc, partial, slot, R: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr):
    """Sums for another program to add, those of FP8 as pairs of FP16."""
    lines = _lines(_pack(acc), R, BM, 1) if KIND == "fp8" else _lines(acc, R, BM, 2)
    gl.store(_slot(partial, slot, lines), lines)


@gluon.jit
def _left(partial, slot, R: gl.constexpr, BM: gl.constexpr, KIND: gl.constexpr, MMA: gl.constexpr):
    """What ``_leave`` wrote."""
    V: gl.constexpr = 1 if KIND == "fp8" else 2
    acc = gl.zeros([R * 16, BM], gl.float32, MMA)
    like = _pack(acc) if KIND == "fp8" else acc
    lines = gl.load(_slot(partial, slot, _lines(like, R, BM, V)), cache_modifier=".cg")
    sums = lines.reshape([R, BM // 8, 8, 4, 2, V]).permute([0, 4, 2, 1, 3, 5]).reshape([R * 16, BM // 2 * V])
    sums = gl.convert_layout(sums, like.type.layout, assert_trivial=True)
    return _unpack(sums, MMA) if KIND == "fp8" else sums


@gluon.jit
def _sums(
    x,
    words,
    scales,
    M,
    N,
    K,
    x_stride,
    block_n,
    block_m,
    first,
    count,
    R: gl.constexpr,
    BM: gl.constexpr,
    C: gl.constexpr,
    STAGES: gl.constexpr,
    PROMOTE: gl.constexpr,
    KIND: gl.constexpr,
    MMA: gl.constexpr,
):
    """The sums of a tile over ``count`` steps from ``first`` on, both even."""
    W: gl.constexpr = gl.num_warps()
    VECTOR: gl.constexpr = 16 if KIND == "fp8" else 8
    n_tiles = (N + 15) // 16
    chunks = K // 64
    # Without this, and with the sums among what the loop waits for, ptxas would serialize the products.
    gl.assume(count > 0)

    threads_k: gl.constexpr = C * 64 // VECTOR if C * 64 // VECTOR < 32 else 32
    xl: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // threads_k, threads_k], [W, 1], [1, 0])
    wl: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [W, 1], [1, 0])
    sl: gl.constexpr = gl.BlockedLayout([1, 4], [32 // (C * 4), C * 4], [W, 1], [1, 0])
    # Outside the matrix the rows come round again: no load has a mask, all blocks do not wait for one line of L2, and
    # nothing of it is written.
    m = (block_m * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, xl))) % M
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

    acc = gl.zeros([R * 16, BM], gl.float32, MMA)
    if PROMOTE:
        packed: gl.constexpr = _pack(acc).type.layout
        earlier = gl.allocate_shared_memory(gl.int32, [R * 16, BM // 2], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    nothing = gl.zeros([W * 64], gl.int32, gl.BlockedLayout([2], [32], [W], [0]))
    slot = 0
    before = STAGES - 1
    async_copy.wait_group(STAGES - 2)
    for segment in range(0, count, PROMOTE if PROMOTE else count):
        product = warpgroup_mma_init(gl.zeros([R * 16, BM], gl.float32, MMA))
        end = gl.minimum(segment + PROMOTE, count) if PROMOTE else count
        gl.assume(end > segment)
        for i in range(segment, end, 2):
            # Two steps: each has registers for its weights while the tensor core still reads those of the other.
            for half in gl.static_range(2):
                weight = weights(codes.index(slot), steps_of.index(slot), R, C, W, KIND, MMA)
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
                acc += _unpack(earlier.load(packed), MMA)
            if end < count:
                earlier.store(_pack(acc))
    async_copy.wait_group(0)
    return acc


@gluon.jit
def _ask(rows, row_scale, N, block_n):
    """Row scales of a tile on their way to shared memory, with the first step: nobody waits for them in the end."""
    n = block_n * rows.shape[0] + gl.arange(0, rows.shape[0], layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    async_copy.async_copy_global_to_shared(rows, row_scale + n, mask=n < N)


@gluon.jit
def _write(
    acc,
    rows,
    x_scale,
    bias,
    out,
    M,
    N,
    out_stride,
    block_n,
    block_m,
    R: gl.constexpr,
    BM: gl.constexpr,
    KIND: gl.constexpr,
):
    """The tile of ``out`` from its sums."""
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    acc = gl.convert_layout(acc, layout)
    n = block_n * (R * 16) + gl.arange(0, R * 16, layout=gl.SliceLayout(1, layout))
    m = block_m * BM + gl.arange(0, BM, layout=gl.SliceLayout(0, layout))
    in_n = n < N
    acc *= (rows.load(gl.SliceLayout(1, layout)) * _POWER)[:, None]
    if KIND == "fp8":
        acc *= gl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
    if bias is not None:
        acc += gl.load(bias + n, mask=in_n, other=0.0).to(gl.float32)[:, None]
    inside = in_n[:, None] & (m < M)[None, :]
    gl.store(out + m.to(gl.int64)[None, :] * out_stride + n[:, None], acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _place(at, M, N, R: gl.constexpr, BM: gl.constexpr, GROUP: gl.constexpr):
    """Where the tile is: neighbours share tokens, and GROUP neighbours' weights stay in L2 for the next tokens."""
    n_blocks = ((N + 15) // 16 + R - 1) // R
    m_blocks = (M + BM - 1) // BM
    group = at // (GROUP * m_blocks)
    width = gl.minimum(n_blocks - group * GROUP, GROUP)
    within = at - group * GROUP * m_blocks
    return group * GROUP + within % width, within // width


@gluon.jit(do_not_specialize=["M", "programs"])
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
    programs,
    R: gl.constexpr,
    BM: gl.constexpr,
    C: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    PROMOTE: gl.constexpr,
    GROUP: gl.constexpr,
    KIND: gl.constexpr,
):
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BM, 32 if KIND == "fp8" else 16]
    )
    # Launched before the quantizer in front has ended, if a multiprocessor has room for one block only: several might
    # meet on one while others have none.
    if KIND == "fp8" and BM == 256:
        gdc_wait()
    rows = gl.allocate_shared_memory(gl.float32, [R * 16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    pid = gl.program_id(0)
    # Pairs of steps: the tensor core works on one while the other is made.
    pairs = K // 64 // (2 * C)
    if SPLIT:
        # Those of all tiles in a row: a program has them from total * pid // programs on.
        total = (((N + 15) // 16 + R - 1) // R) * ((M + BM - 1) // BM) * pairs
        share = total // programs
        more = total - share * programs
        start = pid * share + pid * more // programs
        stop = (pid + 1) * share + (pid + 1) * more // programs
        last = (stop - 1) // pairs
        for i in range(last - start // pairs + 1):
            at = last - i
            first = gl.maximum(start - at * pairs, 0)
            end = gl.minimum(stop - at * pairs, pairs)
            block_n, block_m = _place(at, M, N, R, BM, GROUP)
            _ask(rows, row_scale, N, block_n)
            acc = _sums(
                x,
                words,
                scales,
                M,
                N,
                K,
                x_stride,
                block_n,
                block_m,
                2 * first,
                2 * (end - first),
                R,
                BM,
                C,
                STAGES,
                PROMOTE,
                KIND,
                mma,
            )
            if end < pairs:
                _leave(acc, partial, pid, R, BM, KIND)
                _barrier()
                gl.atomic_add(arrivals + at, 1, sem="release")
            else:
                if first > 0:
                    lowest = ((((at * pairs + 1).to(gl.int64) * programs) - 1) // total).to(gl.int32)
                    while gl.atomic_add(arrivals + at, 0, sem="acquire") < pid - lowest:
                        pass
                    for j in range(lowest, pid):
                        acc += _left(partial, j, R, BM, KIND, mma)
                    _barrier()
                    gl.store(arrivals + at, 0)
                _write(acc, rows, x_scale, bias, out, M, N, out_stride, block_n, block_m, R, BM, KIND)
    else:
        block_n, block_m = _place(pid, M, N, R, BM, GROUP)
        _ask(rows, row_scale, N, block_n)
        acc = _sums(
            x, words, scales, M, N, K, x_stride, block_n, block_m, 0, pairs * 2, R, BM, C, STAGES, PROMOTE, KIND, mma
        )
        _write(acc, rows, x_scale, bias, out, M, N, out_stride, block_n, block_m, R, BM, KIND)


@functools.lru_cache(maxsize=1 << 12)
def _launch(
    kernel: Any,
    config: Config,
    n: int,
    k: int,
    x_stride: int,
    out_stride: int,
    dtypes: tuple[torch.dtype, ...],
    programs: int,
    split: bool,
) -> Launch:
    """Of a configuration and a weight's size, for numbers of tokens that have as many programs."""
    kind = KINDS[dtypes[0]]
    return Launch(
        kernel,
        (n, k, x_stride, out_stride, programs),
        **constants(config, kind, split=split),
        STAGES=config.stages,
        PROMOTE=promote(config, k) if kind == "fp8" else 0,
        num_warps=config.warps,
        launch_pdl=kind == "fp8" and config.m == 256,
    )


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
        ValueError: K that is no multiple of two steps, or more programs than those of all tiles.
    """
    (m, k), n = x.shape, out.shape[1]
    programs, tiles = shares(config, m, n), blocks(config, m, n)
    if k % config.step or programs > tiles * (k // config.step):
        raise ValueError(
            f"K is {k}; {config} takes a multiple of {config.step}, and has {programs} programs for {tiles} tiles"
        )
    dtypes = (x.dtype, out.dtype, None if bias is None else bias.dtype)
    again = _launch(nvfp4_matmul_hopper, config, n, k, x.stride(0), out.stride(0), dtypes, programs, programs != tiles)
    sums = partial(x, config, m, n, fp8=x_scale is not None)
    again((programs,), x, words, scales, row_scale, x_scale, bias, out, sums, arrivals, m)


fix_keys(globals())
