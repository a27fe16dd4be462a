"""How the parts of a tile of decode attention, which several programs have left in the workspace, become its result.

A part is a maximum of logits in base 2, a sum of weights and weighed values for each row: ``m``, ``total`` and ``acc``,
and ``top``, the maximum of logits with the scales of values, where each token has its own. ``M * (DP + 3)`` numbers of
the workspace hold it: ``acc`` ``[M, DP]``, ``m``, ``total`` and ``top``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adallm.kernels.keys import fix_keys

LOG2E = tl.constexpr(1.4426950408889634)
# Parts that one program joins, or less for the last; more are joined in two levels.
TEAM = tl.constexpr(8)


@triton.jit
def _merged(m, total, m_2, total_2):
    """Maximum and sum of two parts of a softmax, and what each part's own terms are to be multiplied by."""
    m_3 = tl.maximum(m, m_2)
    at = tl.where(m_3 == float("-inf"), 0.0, m_3)
    shrink, grow = tl.exp2(m - at), tl.exp2(m_2 - at)
    return m_3, total * shrink + total_2 * grow, shrink, grow


@triton.jit
def out_scale(m, total, top, sink, v_scale, SCALES: tl.constexpr):
    """What sums of weighed values are to be multiplied by."""
    if sink is not None:
        m, total, _, _ = _merged(m, total, sink, 1.0)
    # Nothing seen: an empty sequence.
    some = total > 0
    factor = tl.where(some, tl.exp2(top - tl.where(some, m, 0.0)) / tl.where(some, total, 1.0), 0.0)
    if SCALES == "number":
        factor *= v_scale
    elif SCALES == "tensor":
        factor *= tl.load(v_scale)
    return factor


@triton.jit
def _added(
    m,
    total,
    top,
    acc,
    partial,
    count,
    step,
    own,
    in_row,
    M: tl.constexpr,
    DP: tl.constexpr,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``count`` parts, ``step`` apart, added in order, the last one ``own`` further away; ``PARTS`` loads at a time."""
    row, column = tl.arange(0, ROWS), tl.arange(0, DP)
    for first in range(0, count, PARTS):
        for i in tl.static_range(PARTS):
            part = first + i
            at = partial + part * step + tl.where(part == count - 1, own, 0)
            there = (part < count) & in_row
            m_2 = tl.load(at + M * DP + row, mask=there, other=float("-inf"), cache_modifier=".cg")
            total_2 = tl.load(at + M * (DP + 1) + row, mask=there, other=0.0, cache_modifier=".cg")
            values = at + row[:, None] * DP + column[None, :]
            values = tl.load(values, mask=there[:, None], other=0.0, cache_modifier=".cg")
            m, total, shrink, grow = _merged(m, total, m_2, total_2)
            if SCALES == "token":
                top_2 = tl.load(at + M * (DP + 2) + row, mask=there, other=float("-inf"), cache_modifier=".cg")
                top, _, shrink, grow = _merged(top, total, top_2, total_2)
            else:
                top = m
            acc = acc * shrink[:, None] + values * grow[:, None]
    return m, total, top, acc


@triton.jit
def _wait(counter, count):
    """Until ``count`` programs have counted on ``counter``, which is 0 then."""
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    tl.store(counter, 0)


@triton.jit
def join(
    partial,
    arrivals,
    lowest,
    group,
    last,
    tiles,
    of_tile,
    heads,
    sinks,
    v_scale,
    out,
    out_t,
    out_h,
    T: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    EIGHT: tl.constexpr,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Join the parts of a tile, which groups ``lowest`` to ``last`` have left, and write the result: the last group of
    every team joins their parts, and the last of all what those have joined.
    """
    size: tl.constexpr = M * (DP + 3)
    programs = tl.num_programs(0)
    team = (group - lowest) // TEAM
    first = lowest + team * TEAM
    leader = tl.minimum(first + TEAM - 1, last)
    # Of a program that leads in two tiles the counters and parts of the one that it ends are others.
    counter = arrivals + leader * tiles + of_tile + tl.where(leader == last, programs, 0)
    if group < leader:
        tl.atomic_add(counter, 1, sem="release")
    else:
        _wait(counter, group - first)
        row, column = tl.arange(0, ROWS), tl.arange(0, DP)
        # Nothing is added, as in the caller's loop.
        of_row = of_tile // heads * M + row + (lowest < 0).to(tl.int32)
        in_row = of_row < T * G
        m = tl.full([ROWS], float("-inf"), tl.float32)
        total, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DP], tl.float32)
        parts = partial + (first * tiles + of_tile) * size
        own = tl.where(group == last, programs * size, 0)
        m, total, top, acc = _added(
            m, total, m, acc, parts, group - first + 1, tiles * size, own, in_row, M, DP, SCALES, ROWS, PARTS
        )
        joined = partial + 2 * programs * size
        counter = arrivals + 2 * programs + last * tiles + of_tile
        if group < last:
            mine = joined + (group * tiles + of_tile) * size
            tl.store(mine + row[:, None] * DP + column[None, :], acc, mask=in_row[:, None])
            tl.store(mine + M * DP + row, m, mask=in_row)
            tl.store(mine + M * (DP + 1) + row, total, mask=in_row)
            if SCALES == "token":
                tl.store(mine + M * (DP + 2) + row, top, mask=in_row)
            tl.debug_barrier()
            tl.atomic_add(counter, 1, sem="release")
        else:
            if team > 0:
                _wait(counter, team)
                parts = joined + ((lowest + TEAM - 1) * tiles + of_tile) * size
                m, total, top, acc = _added(
                    m, total, top, acc, parts, team, TEAM * tiles * size, 0, in_row, M, DP, SCALES, ROWS, PARTS
                )
            token, of_head = of_row // G, of_tile % heads * G + of_row % G
            sink = None
            if sinks is not None:
                sink = tl.load(sinks + of_head, mask=in_row, other=0.0) * LOG2E
            acc *= out_scale(m, total, top, sink, v_scale, SCALES)[:, None]
            if EIGHT:
                column = column % (DP // 2) * 2 + column // (DP // 2)
            at = token[:, None] * out_t + of_head[:, None] * out_h + column[None, :]
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_row[:, None] & (column < D)[None, :])


fix_keys(globals())
