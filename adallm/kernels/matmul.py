"""``out[m, n] = row_scale[n] * x_scale[m] * sum_k x[m, k] * w[n, k] + bias[n]`` from 4-bit weights.

The product is computed transposed: the weight is operand A of the tensor core, expanded in registers, so that one
thread's loads and its fragment are the same 16 bytes and nothing is exchanged between threads; ``x`` is operand B.

One kernel, two shapes. With ``SLICES`` above 1 each warp has its own slice of K and the warps' sums meet once, at the
end: for few tokens, when a block should read much of few rows. With ``SLICES = 1`` the warps share a tile: for many
tokens. Several blocks (``splits``) can share an output tile along K; each writes FP32 sums to a workspace, and the one
that comes last adds them in order, so that the result does not depend on who that was. ``hopper.py`` shares otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adallm.kernels.dequant import VALUE_POWER, check_registers, operand, to_dtype
from adallm.kernels.expand import KINDS
from adallm.kernels.keys import fix_keys
from adallm.kernels.layout import TILE_K, TILE_N
from adallm.kernels.sizes import cdiv
from adallm.kernels.start import Launch


@dataclass(frozen=True)
class Config:
    """A launch: tile and parallelism.

    Attributes:
        n: rows of the weight in a block, a multiple of 16.
        m: tokens in a block, a power of two from 8 up.
        k: columns in a step of a slice, a multiple of 64.
        slices: slices of K in a block, one for each warp, or 1.
        splits: blocks that share an output tile along K.
        warps: warps in a block; equal to ``slices`` where that is above 1.
        stages: steps in flight.
        programs: with ``overlap``, blocks that share the steps of all tiles evenly, in place of ``splits`` for each
            tile; in a table, for each multiprocessor. 0: ``splits`` says it.
        overlap: ``hopper.py`` in place of this module's kernel: sm_90, ``slices`` 1, K a multiple of ``2 k``.
    """

    n: int
    m: int
    k: int
    slices: int
    splits: int
    warps: int
    stages: int
    overlap: bool = False
    programs: int = 0

    @property
    def step(self) -> int:
        """Columns that a split has a multiple of."""
        return self.slices * self.k * (2 if self.overlap else 1)

    @property
    def label(self) -> str:
        """``"n64 m8 k64 slices4 splits1 warps4 stages3"``, and ``overlap`` and ``programs`` where they are."""
        numbers = {name: value for name, value in vars(self).items() if name not in ("overlap", "programs")}
        tile = " ".join(f"{name}{value}" for name, value in numbers.items()) + " overlap" * self.overlap
        return tile + f" programs{self.programs}" * bool(self.programs)

    def takes(self, k: int) -> bool:
        """Whether the kernel handles K columns."""
        return not self.overlap or k % self.step == 0


# A sum of E4M3 products is at most 448 * 21 * K, and times this within FP16 up to K of 400,000.
_PACKED = tl.constexpr(2.0**-16)
_ASM_PACK = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
_ASM_UNPACK = tl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")


@triton.jit
def _unpack(total, R: tl.constexpr, BM: tl.constexpr):
    """FP32 ``[16 R, BM]`` from pairs of FP16 in int32 ``[16 R, BM / 2]``."""
    low, high = tl.inline_asm_elementwise(
        _ASM_UNPACK, "=f,=f,r", [total], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
    )
    return tl.reshape(tl.join(low, high), [R * 16, BM]) / _PACKED


@triton.jit
def _pack(acc, R: tl.constexpr, BM: tl.constexpr):
    low, high = tl.split(tl.reshape(acc * _PACKED, [R * 16, BM // 2, 2]))
    return tl.inline_asm_elementwise(_ASM_PACK, "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _finished(acc):
    """``acc``, in a way that makes the compiler wait for the product. Otherwise Hopper's asynchronous one still reads
    the weights of one step from registers that the next step fills: wrong sums, now and then.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["M", "splits"])
def nvfp4_matmul(
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
    R: tl.constexpr,
    BM: tl.constexpr,
    C: tl.constexpr,
    SLICES: tl.constexpr,
    SPLIT: tl.constexpr,
    PROMOTE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
):
    n_tiles = tl.cdiv(N, 16)
    chunks = tl.cdiv(K, 64)
    n_blocks = tl.cdiv(n_tiles, R)
    pid, split = tl.program_id(0), tl.program_id(1)
    # Neighbours share tokens, and GROUP neighbours' weights stay in L2 for the next tokens.
    m_blocks = tl.cdiv(M, BM)
    group = pid // (GROUP * m_blocks)
    width = tl.minimum(n_blocks - group * GROUP, GROUP)
    inside = pid - group * GROUP * m_blocks
    block_n = group * GROUP + inside % width
    block_m = inside // width

    tile = block_n * R + tl.arange(0, R)
    m = block_m * BM + tl.arange(0, BM)
    steps = tl.cdiv(chunks, SLICES * C)
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)

    if SLICES == 1:
        chunk = (tl.arange(0, C * 128) // 128)[None, :]
        chunk_s = (tl.arange(0, C * 16) // 16)[None, :]
        column = tl.arange(0, C * 64)[:, None]
        words += tile[:, None] * (chunks * 128) + tl.arange(0, C * 128)[None, :]
        scales += tile[:, None] * (chunks * 16) + tl.arange(0, C * 16)[None, :]
        x += m[None, :].to(tl.int64) * x_stride + column
        in_tiles = (tile < n_tiles)[:, None]
        in_m = (m < M)[None, :]
    else:
        slice_ = tl.arange(0, SLICES)
        chunk = (slice_[:, None] * C + (tl.arange(0, C * 128) // 128)[None, :])[:, None, :]
        chunk_s = (slice_[:, None] * C + (tl.arange(0, C * 16) // 16)[None, :])[:, None, :]
        column = (slice_[:, None] * (C * 64) + tl.arange(0, C * 64)[None, :])[:, :, None]
        words += (tile[None, :, None] * chunks + slice_[:, None, None] * C) * 128 + tl.arange(0, C * 128)[None, None, :]
        scales += (tile[None, :, None] * chunks + slice_[:, None, None] * C) * 16 + tl.arange(0, C * 16)[None, None, :]
        x += m[None, None, :].to(tl.int64) * x_stride + column
        in_tiles = (tile < n_tiles)[None, :, None]
        in_m = (m < M)[None, None, :]
    words += first * (SLICES * C * 128)
    scales += first * (SLICES * C * 16)
    x += first * (SLICES * C * 64)
    n = block_n * (R * 16) + tl.arange(0, R * 16)
    in_n = n < N
    # Few tokens: early, since after the sums their way from memory would be waited for. Many: there are no registers.
    if BM <= 16:
        row = tl.load(row_scale + n, mask=in_n, other=0.0) * VALUE_POWER
    acc = tl.zeros([R * 16, BM] if SLICES == 1 else [SLICES, R * 16, BM], dtype=tl.float32)
    if PROMOTE:
        earlier = tl.zeros([R * 16, BM // 2], dtype=tl.int32)
    for step in range(first, last):
        # The words are loaded last: of the layouts that the loads ask for, the compiler takes that of the last.
        if EVEN_K:
            tokens = tl.load(x, mask=in_m, other=0.0)
            scale = tl.load(scales, mask=in_tiles, other=0)
            word = tl.load(words, mask=in_tiles, other=0)
        else:
            left = chunks - step * (SLICES * C)
            tokens = tl.load(x, mask=in_m & (column < K - step * (SLICES * C * 64)), other=0.0)
            scale = tl.load(scales, mask=in_tiles & (chunk_s < left), other=0)
            word = tl.load(words, mask=in_tiles & (chunk < left), other=0)
        words += SLICES * C * 128
        scales += SLICES * C * 16
        x += SLICES * C * 64
        weight = operand(word, scale, SLICES, R, C, KIND, FAST)
        if SLICES == 1:
            weight = tl.reshape(weight, [R * 16, C * 64])
        if FAST:
            acc = tl.dot(weight, tokens, acc)
            if SLICES == 1:
                acc = _finished(acc)
        else:
            acc = tl.dot(weight, tokens.to(tl.float32), acc, input_precision="ieee")
        # The FP8 tensor core of Hopper keeps about 14 bits of a running sum (arXiv 2412.19437, 3.3.2): from time to
        # time it begins anew. What it had waits as pairs of FP16, since FP32 would not fit the registers.
        if PROMOTE:  # noqa: SIM102 - a constant and a value: the compiler must see the first alone
            if (step - first) % PROMOTE == PROMOTE - 1:
                earlier = _pack(acc + _unpack(earlier, R, BM), R, BM)
                acc = tl.zeros([R * 16, BM], dtype=tl.float32)
    if PROMOTE:
        acc += _unpack(earlier, R, BM)
    if SLICES > 1:
        acc = tl.sum(acc, axis=0)

    inside = in_n[:, None] & (m < M)[None, :]
    done = True
    if SPLIT:
        at = m[None, :].to(tl.int64) * N + n[:, None]
        tl.store(partial + split * M.to(tl.int64) * N + at, acc, mask=inside)
        tl.debug_barrier()
        before = tl.atomic_add(arrivals + pid, 1, sem="acq_rel")
        done = before == splits - 1
        if done:
            acc = tl.zeros([R * 16, BM], dtype=tl.float32)
            for i in range(splits):
                acc += tl.load(partial + i * M.to(tl.int64) * N + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(arrivals + pid, 0)
    if done:
        if BM > 16:
            row = tl.load(row_scale + n, mask=in_n, other=0.0) * VALUE_POWER
        acc *= row[:, None]
        if KIND == "fp8":
            acc *= tl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
        if bias is not None:
            acc += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
        at = m[None, :].to(tl.int64) * out_stride + n[:, None]
        tl.store(out + at, to_dtype(acc, out.dtype.element_ty, FAST), mask=inside)


GROUP = 8
PROMOTE_COLUMNS = 2048
_CHECKED: set[str] = set()


def blocks(config: Config, m: int, n: int) -> int:
    """Output tiles, each with a counter of its own where blocks share them."""
    return cdiv(cdiv(n, TILE_N), config.n // TILE_N) * cdiv(m, config.m)


def shares(config: Config, m: int, n: int) -> int:
    """Blocks of a launch: of each split of each tile, or of ``programs``."""
    return config.programs or blocks(config, m, n) * config.splits


def workspace(config: Config, m: int, n: int, *, fp8: bool) -> int:
    """4-byte words for the sums that blocks leave to each other: FP32, or pairs of FP16 with ``overlap`` and FP8."""
    if shares(config, m, n) == blocks(config, m, n):
        return 0
    if config.overlap:
        return shares(config, m, n) * config.n * config.m // (2 if fp8 else 1)
    return config.splits * m * n


def promote(config: Config, k: int) -> int:
    """Steps after which FP8 sums leave the tensor core, or 0 where K is too short for that."""
    splits = 1 if config.programs else config.splits
    columns = cdiv(cdiv(k, config.step), splits) * config.step
    return PROMOTE_COLUMNS // (config.slices * config.k) if columns > PROMOTE_COLUMNS else 0


def partial(x: Tensor, config: Config, m: int, n: int, *, fp8: bool) -> Tensor | None:
    """The workspace on the device of ``x``, or None if there is nothing to leave."""
    if not (sums := workspace(config, m, n, fp8=fp8)):
        return None
    return torch.empty(sums, dtype=torch.int32 if config.overlap and fp8 else torch.float32, device=x.device)


def constants(config: Config, kind: str, *, split: bool) -> dict[str, Any]:
    """Those that this module's kernel and ``hopper.py``'s have.

    Args:
        split: blocks share output tiles.
    """
    tile = {"R": config.n // TILE_N, "BM": config.m, "C": config.k // TILE_K}
    return tile | {"SPLIT": split, "GROUP": GROUP, "KIND": kind}


@functools.lru_cache(maxsize=1 << 12)
def _launch(
    kernel: Any,
    config: Config,
    n: int,
    k: int,
    x_stride: int,
    out_stride: int,
    dtypes: tuple[torch.dtype, ...],
    *,
    split: bool,
    fast: bool,
) -> Launch:
    """Of a configuration and a weight's size, for any number of tokens."""
    kind = KINDS[dtypes[0]]
    return Launch(
        kernel,
        (n, k, x_stride, out_stride, config.splits),
        **constants(config, kind, split=split),
        SLICES=config.slices,
        PROMOTE=promote(config, k) if fast and kind == "fp8" else 0,
        EVEN_K=k % (config.slices * config.k) == 0,
        FAST=fast,
        # As many blocks as fit the shared memory, which the compiler does not know of: eight at most.
        maxnreg=64 if config.m == 8 and config.slices == 1 else None,
        num_warps=config.warps,
        num_stages=config.stages,
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
    """``out = x @ w.T`` (+ bias), with the arguments checked by the caller.

    Args:
        x: ``[M, K]``, stride 1 along K: bfloat16, float16, or float8_e4m3fn as ``quantize_tokens`` makes it.
        words, scales, row_scale: as ``layout.from_checkpoint`` makes them for 16-bit or FP8 products.
        out: ``[M, N]`` bfloat16 or float16, stride 1 along N.
        x_scale: float32 ``[M]``, with float8_e4m3fn.
        arrivals: int32, at least ``blocks(config, M, N)`` zeros, where blocks share tiles; zero again after.
    """
    (m, k), n, tiles = x.shape, out.shape[1], blocks(config, *out.shape)
    dtypes = (x.dtype, out.dtype, None if bias is None else bias.dtype)
    again = _launch(
        nvfp4_matmul,
        config,
        n,
        k,
        x.stride(0),
        out.stride(0),
        dtypes,
        split=config.splits > 1,
        fast=not x.is_cpu,
    )
    sums = partial(x, config, m, n, fp8=x_scale is not None)
    kernel = again((tiles, config.splits), x, words, scales, row_scale, x_scale, bias, out, sums, arrivals, m)
    if x.is_cuda and kernel is not None and kernel.hash not in _CHECKED:
        check_registers(kernel.asm["ttgir"])
        _CHECKED.add(kernel.hash)


fix_keys(globals())
