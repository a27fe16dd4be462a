"""Decode attention over a paged KV cache, ``adallm/attention.py`` in one launch.

The query heads of a KV head, for the query tokens of a sequence, are the rows of one tile, or of several. Work is
counted in steps of ``N`` tokens of one sequence. A fixed number of groups of programs, one for each tile of a sequence,
shares the steps of all sequences evenly, whatever the lengths are at the time: one long sequence is split among all,
and many short ones are several to each. Sequences that are all as long are shared along their ends, where that fits.
Each program sums up the lengths itself, so that a CUDA graph keeps working when they change.

New keys and values, if there are any, are not in the cache yet: whoever reads a head's last tokens writes them there
first. Programs that share those tokens write the same.

A program goes through its steps backwards. Of a tile that it shares with other groups it leaves maxima and sums in the
workspace. One that joins parts waits for those before it alone, which were launched before it; the order is fixed.

Numerics: with an E4M3 cache, which is exact in FP16, a query row is brought to FP16 by a power of two, exactly but for
values below 2^-14 of the row's largest; 16-bit caches are multiplied as they are. FP8 queries are E4M3 with a scale for
each row, and multiply keys as they are stored. Logits and sums are FP32, the softmax is online (arXiv 1805.02867) and
in base 2. Weights are rounded to 16 bits before they meet the values. Scales enter the logits and, those of each token,
the exponents of the weights, so that both stay below 1.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adallm.kernels.decode_choice import Config, most_sequences, rows
from adallm.kernels.decode_join import LOG2E, TEAM, join, out_scale
from adallm.kernels.dequant import to_e4m3, token_scale
from adallm.kernels.keys import fix_keys
from adallm.kernels.sizes import next_power_of_2
from adallm.kernels.start import Launch
from adallm.kernels.write_kv import write_head
from adallm.paged import Scale, Shape, kind_of

# Numbers of parts that a warp loads at a time.
_NUMBERS = 2048
# Two pairs of E4M3 -> the first of both in FP16, and the second of both.
_ASM_PAIRS = tl.constexpr(
    "{ .reg .b32 p; .reg .b16 a, b; prmt.b32 p, $2, 0, 0x3120; mov.b32 {a, b}, p;\n"
    "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)


@triton.jit
def _pairs(x, FAST: tl.constexpr):
    """int16 that hold two E4M3 each -> the values of even columns and of odd ones, FP16, or FP32 if not ``FAST``.

    16 bits at a time a tile is loaded, kept and transposed as any other; and there is no order to restore, since both
    products sum over columns.
    """
    if FAST:
        even, odd = tl.inline_asm_elementwise(
            _ASM_PAIRS, "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        even = (x & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        odd = ((x >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def _halves(x, dtype: tl.constexpr):
    """int32 that hold two 16-bit numbers each -> the first and the second, FP32."""
    if dtype == tl.bfloat16:
        return (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
    else:  # noqa: RET505, both are compiled without it
        even, odd = (x & 0xFFFF).to(tl.uint16), ((x >> 16) & 0xFFFF).to(tl.uint16)
        return even.to(tl.float16, bitcast=True).to(tl.float32), odd.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _exponent(x):
    return (tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True) >> 23) & 0xFF


@triton.jit
def _weighed(logits, m):
    """The maximum of each row with these logits, what earlier terms are to be multiplied by, and the weights."""
    m_2 = tl.maximum(m, tl.max(logits, axis=1))
    at = tl.where(m_2 == float("-inf"), 0.0, m_2)
    return m_2, tl.exp2(m - at), tl.exp2(logits - at[:, None])


@triton.jit
def _whole(groups, batch, equal, WHOLE: tl.constexpr):
    """How many groups share sequences that are as long: so few that each has sequences of its own, or a part of one, if
    hardly any is left out for it. To begin and to end a tile once more takes longer than to go on for a few steps.
    """
    sequences = (batch + groups - 1) // groups
    fewer = tl.where(sequences == 1, groups // batch * batch, batch // sequences)
    fits = equal & (sequences <= WHOLE) & (batch % sequences == 0) & (fewer * 16 >= groups * 15)
    return tl.where(fits, fewer, groups)


@triton.jit(do_not_specialize=["batch", "parts", "scale", "soft_cap", "window"])
def paged_decode_kernel(
    q,
    new_k,
    new_v,
    slots,
    k_cache,
    v_cache,
    table,
    lengths,
    k_scale,
    v_scale,
    sinks,
    slopes,
    out,
    partial,
    arrivals,
    batch,
    parts,
    heads,
    q_b,
    q_t,
    q_h,
    new_k_b,
    new_k_t,
    new_k_h,
    new_v_b,
    new_v_t,
    new_v_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    table_b,
    out_b,
    out_t,
    out_h,
    scale,
    soft_cap,
    window,
    T: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BATCH: tl.constexpr,
    WHOLE: tl.constexpr,
    EIGHT: tl.constexpr,
    SCALES: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    FP8_QUERIES: tl.constexpr,
    FAST: tl.constexpr,
):
    pid = tl.program_id(0)
    # A tile has the rows of a KV head, or some of them. All tiles of a sequence go through its steps side by side, each
    # by programs of its own, so that the heads of a token, neighbours in memory, are read at about the same time.
    tiles = heads * ((T * G + M - 1) // M)
    group, of_tile = pid // tiles, pid % tiles
    h = of_tile % heads
    i = tl.arange(0, BATCH)
    length = tl.load(lengths + i, mask=i < batch, other=0)
    row = tl.arange(0, M)
    # Columns in pairs where the cache has eight bits, but for an FP8 product, whose operands are eight bits: H of
    # values and E of queries and keys.
    PAIRS: tl.constexpr = EIGHT and not FP8_QUERIES
    H: tl.constexpr = DP // 2 if EIGHT else DP
    E: tl.constexpr = DP // 2 if PAIRS else DP
    d, e = tl.arange(0, H), tl.arange(0, E)
    in_d, in_e = d < (D // 2 if EIGHT else D), e < (D // 2 if PAIRS else D)
    size: tl.constexpr = M * (DP + 3)
    Q: tl.constexpr = q.dtype.element_ty
    kept_k, kept_v = k_cache, v_cache
    if EIGHT:
        v_cache = v_cache.to(tl.pointer_type(tl.int16))
    if PAIRS:
        q, k_cache = q.to(tl.pointer_type(tl.int32)), k_cache.to(tl.pointer_type(tl.int16))
    # Of a single sequence queries are asked for together with its length; more rows would want too many registers.
    EARLY: tl.constexpr = BATCH == 1 and M == 16
    if EARLY:
        of_row = of_tile // heads * M + row
        of_query = of_row // G * q_t + (h * G + of_row % G) * q_h
        loaded = tl.load(q + of_query[:, None] + e[None, :], mask=(of_row < T * G)[:, None] & in_e[None, :], other=0.0)
    # The first step that any query token of a sequence sees, and how many there are; an empty sequence has one.
    skipped = (tl.maximum(length - T - window + 1, 0) // N) if WINDOW else length * 0
    steps = tl.where(i < batch, tl.maximum((length + N - 1) // N - skipped, 1), 0)
    ends = tl.cumsum(steps)
    all_steps = tl.sum(steps)
    # Where there is little to read, more parts take longer to join than they save. And no group has less than a step:
    # those that wait count on each before them.
    worth = tl.maximum(parts * batch, all_steps // 4)
    groups = tl.minimum(tl.minimum(tl.num_programs(0) // tiles, all_steps), worth)
    if BATCH > 1:
        groups = _whole(groups, batch, tl.max(steps) * batch == all_steps, WHOLE)
    share = all_steps // groups
    more = all_steps - share * groups
    start = group * share + group * more // groups
    stop = tl.where(group < groups, (group + 1) * share + (group + 1) * more // groups, start)
    while stop > start:
        b = tl.sum((ends <= stop - 1).to(tl.int32))
        of_b = i == b
        tokens = tl.sum(tl.where(of_b, length, 0))
        first_step = (tl.maximum(tokens - T - window + 1, 0) // N) if WINDOW else 0
        count = tl.maximum((tokens + N - 1) // N - first_step, 1)
        before = tl.sum(tl.where(of_b, ends, 0)) - count
        begin, end = tl.maximum(start - before, 0), stop - before
        # Nothing is added: else what follows from the row is computed before the loop and kept in registers.
        of_row = of_tile // heads * M + row + (stop < 0).to(tl.int32)
        in_row, token, of_head = of_row < T * G, of_row // G, of_row % G

        if not EARLY:
            of_query = b.to(tl.int64) * q_b + token * q_t + (h * G + of_head) * q_h
            loaded = tl.load(q + of_query[:, None] + e[None, :], mask=in_row[:, None] & in_e[None, :], other=0.0)
        if new_k is not None:  # noqa: SIM102 - a constant and a value: the compiler must see the first alone
            if (first_step + end) * N > tokens - T:
                whose = b.to(tl.int64)
                x, x_2 = new_k + whose * new_k_b + h * new_k_h, new_v + whose * new_v_b + h * new_v_h
                to = slots + whose * T
                PK: tl.constexpr = 2 if PAIRS else 1
                PV: tl.constexpr = 2 if EIGHT else 1
                write_head(
                    x,
                    new_k_t,
                    kept_k + h * PK * k_h,
                    PK * k_b,
                    PK * k_t,
                    k_scale,
                    h,
                    heads,
                    to,
                    T,
                    D,
                    DP,
                    BLOCK,
                    SCALES,
                    EIGHT,
                    FAST,
                )
                write_head(
                    x_2,
                    new_v_t,
                    kept_v + h * PV * v_h,
                    PV * v_b,
                    PV * v_t,
                    v_scale,
                    h,
                    heads,
                    to,
                    T,
                    D,
                    DP,
                    BLOCK,
                    SCALES,
                    EIGHT,
                    FAST,
                )
                tl.debug_barrier()
        if FP8_QUERIES:
            rows = loaded.to(tl.float32)
            factor = token_scale(tl.max(tl.abs(rows), axis=1))
            rows = to_e4m3(tl.math.div_rn(rows, factor[:, None]), FAST)
            factor *= scale
            if not FAST:
                rows = rows.to(tl.float32)
        elif PAIRS:
            rows, rows_2 = _halves(loaded, Q)
            exponent = tl.maximum(_exponent(rows), _exponent(rows_2))
            down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
            rows, rows_2 = rows * down, rows_2 * down
            factor = (exponent << 23).to(tl.float32, bitcast=True) * scale
            if FAST:
                rows, rows_2 = rows.to(tl.float16), rows_2.to(tl.float16)
        else:
            rows = loaded
            factor = tl.full([M], 1.0, tl.float32) * scale
            if not FAST:
                rows = rows.to(tl.float32)
        if SCALES == "number":
            factor *= k_scale
        elif SCALES == "tensor":
            factor *= tl.load(k_scale)
        position = tokens - T + token
        if slopes is not None:
            slope = tl.load(slopes + h * G + of_head) * LOG2E
        m = tl.full([M], float("-inf"), tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        # Summed up at the end: a sum of each step would have the warps wait for each other once more.
        sums = tl.zeros([M, N], tl.float32)
        acc = tl.zeros([M, H], tl.float32)
        acc_2 = tl.zeros([M, H], tl.float32)
        for step in range(begin, end):
            j = (first_step + step) * N + tl.arange(0, N)
            there = j < tokens
            if WINDOW:
                there = there & (j > tokens - T - window)
            block = tl.load(table + b.to(tl.int64) * table_b + j // BLOCK, mask=there, other=0).to(tl.int64)
            of_key = k_cache + (block * k_b + (j % BLOCK) * k_t + h * k_h)[:, None] + e[None, :]
            of_value = v_cache + (block * v_b + (j % BLOCK) * v_t + h * v_h)[:, None] + d[None, :]
            keys = tl.load(of_key, mask=there[:, None] & in_e[None, :], other=0.0)
            values = tl.load(of_value, mask=there[:, None] & in_d[None, :], other=0.0)
            if EIGHT:
                values, values_2 = _pairs(values, FAST)
            if FP8_QUERIES:
                if not FAST:
                    keys = keys.to(tl.float32)
                logits = tl.dot(rows, tl.trans(keys), input_precision="ieee") * factor[:, None]
            elif PAIRS:
                keys, keys_2 = _pairs(keys, FAST)
                logits = tl.dot(rows, tl.trans(keys), input_precision="ieee")
                logits = tl.dot(rows_2, tl.trans(keys_2), logits, input_precision="ieee") * factor[:, None]
            else:
                if not FAST:
                    keys, values = keys.to(tl.float32), values.to(tl.float32)
                logits = tl.dot(rows, tl.trans(keys), input_precision="ieee") * factor[:, None]
            if SCALES == "token":
                at = (block * BLOCK + j % BLOCK) * heads + h
                logits *= tl.load(k_scale + at, mask=there, other=1.0)[None, :]
                weight = tl.log2(tl.load(v_scale + at, mask=there, other=1.0))
            if CAP:
                # tanh
                logits = soft_cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2E / soft_cap)) + 1.0))
            logits *= LOG2E
            distance = j[None, :] - position[:, None]
            if slopes is not None:
                logits += slope[:, None] * distance
            seen = there[None, :] & (distance <= 0)
            if WINDOW:
                seen = seen & (distance > -window)
            logits = tl.where(seen, logits, float("-inf"))
            m, shrink, weights = _weighed(logits, m)
            sums = sums * shrink[:, None] + weights
            if SCALES == "token":
                top, shrink, weights = _weighed(logits + weight[None, :], top)
            else:
                top = m
            weights = weights.to(values.dtype)
            acc = tl.dot(weights, values, acc * shrink[:, None], input_precision="ieee")
            if EIGHT:
                acc_2 = tl.dot(weights, values_2, acc_2 * shrink[:, None], input_precision="ieee")

        total = tl.sum(sums, axis=1)
        if (begin == 0) & (end == count):
            sink = None
            if sinks is not None:
                sink = tl.load(sinks + h * G + of_head, mask=in_row, other=0.0) * LOG2E
            last = out_scale(m, total, top, sink, v_scale, SCALES)[:, None]
            result = acc * last
            if EIGHT:
                result = tl.reshape(tl.join(result, acc_2 * last), [M, DP])
            column = tl.arange(0, DP)
            at = b.to(tl.int64) * out_b + token[:, None] * out_t + (h * G + of_head)[:, None] * out_h + column[None, :]
            tl.store(out + at, result.to(out.dtype.element_ty), mask=in_row[:, None] & (column < D)[None, :])
        else:
            mine = partial + (pid + tl.where(end == count, tl.num_programs(0), 0)) * size
            tl.store(mine + row[:, None] * DP + d[None, :], acc, mask=in_row[:, None])
            if EIGHT:
                tl.store(mine + row[:, None] * DP + H + d[None, :], acc_2, mask=in_row[:, None])
            tl.store(mine + M * DP + row, m, mask=in_row)
            tl.store(mine + M * (DP + 1) + row, total, mask=in_row)
            if SCALES == "token":
                tl.store(mine + M * (DP + 2) + row, top, mask=in_row)
            tl.debug_barrier()
            join(
                partial,
                arrivals,
                (((before + 1).to(tl.int64) * groups - 1) // all_steps).to(tl.int32),
                group,
                (((before + count).to(tl.int64) * groups - 1) // all_steps).to(tl.int32),
                tiles,
                of_tile,
                heads,
                sinks,
                v_scale,
                out + b.to(tl.int64) * out_b,
                out_t,
                out_h,
                T,
                G,
                M,
                D,
                DP,
                EIGHT,
                SCALES,
                ROWS,
                PARTS,
            )
        stop = tl.maximum(start, before)


@functools.lru_cache(maxsize=1 << 12)
def _launch(
    kernel: Any,
    shape: Shape,
    config: Config,
    numbers: tuple[Any, ...],
    dtypes: tuple[torch.dtype, ...],
    scales: str,
    windowed: bool,
    fp8_queries: bool,
    fast: bool,
) -> Launch:
    """For steps of these sizes; the dtypes, of queries, cache and output, tell one from another."""
    m, columns = rows(shape), next_power_of_2(shape.head_size)
    joined = min(next_power_of_2(shape.queries * (shape.q_heads // shape.kv_heads)), m)
    return Launch(
        kernel,
        numbers,
        T=shape.queries,
        G=shape.q_heads // shape.kv_heads,
        M=m,
        D=shape.head_size,
        DP=columns,
        BLOCK=shape.block_size,
        N=config.n,
        ROWS=joined,
        PARTS=min(max(_NUMBERS * config.warps // (joined * columns), 1), TEAM.value),
        BATCH=most_sequences(shape.batch),
        WHOLE=config.whole,
        EIGHT=dtypes[1].itemsize == 1,
        SCALES=scales,
        CAP=numbers[-2] > 0,
        WINDOW=windowed,
        FP8_QUERIES=fp8_queries,
        FAST=fast,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )


def launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    shape: Shape,
    config: Config,
    *,
    programs: int,
    partial: Tensor,
    arrivals: Tensor,
    scale: float,
    k: Tensor | None = None,
    v: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    fp8_queries: bool = False,
) -> None:
    """``paged_decode`` of arguments that ``check_decode`` has seen, with ``shape`` from there.

    Args:
        q, out: ``[B, T, Hq, D]``, stride 1 along D.
        k, v, slot_mapping: ``[B, T, Hkv, D]``, stride 1 along D, and contiguous ``[B T]``; or None.
        config, programs, partial, arrivals: of ``decode_choice``: ``choose``, ``programs``, ``workspace_floats``
            numbers, and three int32 zeros for each of ``programs``, which are zeros again after.
    """
    if not shape.batch:
        return
    pair = 2 if k_cache.itemsize == 1 else 1
    key_pair = 1 if fp8_queries else pair
    numbers = (
        config.parts,
        shape.kv_heads,
        *(stride // key_pair for stride in q.stride()[:3]),
        *((0, 0, 0) if k is None else k.stride()[:3]),
        *((0, 0, 0) if v is None else v.stride()[:3]),
        *(stride // key_pair for stride in k_cache.stride()[:3]),
        *(stride // pair for stride in v_cache.stride()[:3]),
        block_table.stride(0),
        *out.stride()[:3],
        scale,
        float(soft_cap),
        window or 0,
    )
    again = _launch(
        paged_decode_kernel,
        shape,
        config,
        numbers,
        (q.dtype, k_cache.dtype, out.dtype),
        kind_of(k_scale),
        window is not None,
        fp8_queries,
        not q.is_cpu,
    )
    tensors = (q, k, v, slot_mapping, k_cache, v_cache, block_table, seq_lens, k_scale, v_scale, sinks, alibi_slopes)
    again((programs,), *tensors, out, partial, arrivals, shape.batch)


fix_keys(globals())
