"""Decode attention over a paged KV cache: on a CUDA GPU the Triton kernels, elsewhere the reference in FP32.

A cache holds the keys, or the values, of one layer: ``[num_blocks, block_size, Hkv, D]`` with any strides, so that
block-major NHD and HND are both views of this shape. Slot ``s`` is block ``s // block_size``, position
``s % block_size``. A sequence's token ``i`` lies in block ``block_table[b, i // block_size]``.

An E4M3 cache stands for ``cache * k_scale`` (and ``v_scale``). A scale is one number for a layer, or
``[num_blocks, block_size, Hkv]`` for each token and head, kept beside the cache. Keys' scales enter the logits and
values' scales the weights, which is the same in exact arithmetic and spares a product for each element.

For query token ``t`` of ``T``, at position ``p = seq_len - T + t``, and query head h, which reads KV head
``h // (Hq / Hkv)``, over the keys ``j <= p``, within a window W over ``j > p - W``::

    logit_j = cap(scale * k_scale * q . k_j) + slope_h * (j - p),   cap(x) = soft_cap * tanh(x / soft_cap)
    out = sum_j softmax(logit, sink_h)_j * v_scale * v_j

A sink takes part in the softmax and has no value. A sequence of length 0, whose table is not read, gives zeros.

Sources: PagedAttention (arXiv 2309.06180), sliding windows (2310.06825), soft caps (Gemma 2, 2408.00118), sinks
(gpt-oss, 2508.10925), ALiBi (2108.12409).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adallm import fp8
from adallm.paged import Scale, Shape, check_decode, check_gather, check_write


@dataclass(frozen=True, eq=False)
class Workspace:
    """What blocks of a decode step leave to each other; one for each stream, used again from step to step.

    Attributes:
        partial: float32.
        arrivals: int32, zeros between steps.
    """

    partial: Tensor
    arrivals: Tensor

    @classmethod
    def of(cls, q: Tensor, k_cache: Tensor) -> Workspace:
        """Large enough for steps of these sizes, of any number of sequences, and with fewer query tokens.

        Args:
            q: ``[B, Hq, D]`` or ``[B, T, Hq, D]``, on a CUDA GPU.
            k_cache: ``[num_blocks, block_size, Hkv, D]``.
        """
        from adallm.kernels import choice, decode_choice

        shape = Shape.of(q, k_cache)
        programs = decode_choice.most_programs(shape, k_cache.itemsize, choice.gpu(q.device.index))
        return cls(
            torch.empty(decode_choice.workspace_floats(shape, programs), dtype=torch.float32, device=q.device),
            torch.zeros(3 * programs, dtype=torch.int32, device=q.device),
        )


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    checked: bool = False,
) -> None:
    """``write_kv_reference``, by one kernel on a CUDA GPU, where no slot is looked at: it must be -1 or in the cache.

    Args:
        checked: on a CUDA GPU, do not look at the arguments, which are those of a call that passed but for the number
            of tokens and what the tensors hold.

    Raises:
        ValueError: as ``write_kv_reference``; on a CUDA GPU k or v with a stride other than 1 along D, or an E4M3 cache
            before sm_89.
    """
    if not k.is_cuda:
        write_kv_reference(k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
        return
    if not checked:
        check_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        _check_gpu(k_cache)
        if k.stride(2) != 1 or v.stride(2) != 1:
            raise ValueError(f"k and v have strides {k.stride()} and {v.stride()}; the last must be 1")
    from adallm.kernels import write_kv as kernel

    with torch.cuda.device_of(k):
        kernel.launch(k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)


def gather_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    starts: Tensor,
    *,
    tokens: int,
    longest: int,
    dtype: torch.dtype,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
) -> tuple[Tensor, Tensor]:
    """Keys and values of sequences, ``cache * scale``, one after the other, for attention that knows no pages.

    Args:
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``.
        block_table: int32 ``[B, width]``.
        starts: int32 ``[B + 1]``, where each sequence begins in the result; their differences are the lengths, which
            nobody looks at: the table must hold them.
        tokens: rows of the result, at least ``starts[-1]``; what lies behind that is not written.
        longest: tokens of a sequence, at the most.
        dtype: bfloat16 or float16.

    Returns:
        Keys and values ``[tokens, Hkv, D]``.

    Raises:
        ValueError: a shape, dtype, scale or device that does not fit.
    """
    check_gather(k_cache, v_cache, block_table, starts, dtype, k_scale, v_scale)
    k, v = (k_cache.new_empty((tokens, *k_cache.shape[2:]), dtype=dtype) for _ in range(2))
    if k_cache.is_cuda:
        _check_gpu(k_cache)
        from adallm.kernels import gather_kv as kernel

        with torch.cuda.device_of(k):
            kernel.launch(k_cache, v_cache, block_table, starts, longest, k, v, k_scale=k_scale, v_scale=v_scale)
        return k, v
    for row, (start, stop) in zip(block_table.long(), itertools.pairwise(starts.tolist()), strict=True):
        blocks = row[: -(-(stop - start) // k_cache.shape[1])]
        for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            x[start:stop] = _gathered(cache, scale, blocks, stop - start).to(dtype)
    return k, v


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    fp8_queries: bool = False,
    k: Tensor | None = None,
    v: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    checked: Shape | None = None,
) -> Tensor:
    """``paged_decode_reference`` in the dtype of q, by one kernel on a CUDA GPU. It does not look at lengths and
    blocks: each length must be 0, or from T to what the table holds.

    Args:
        out: with the shape and dtype of q, stride 1 along D, to write to.
        workspace: ``Workspace.of`` a step as large; without one, memory is allocated in the call.
        checked: ``Shape.of`` these arguments, on a CUDA GPU, with ``out`` and ``workspace``: do not look at the
            arguments, which are those of a call that passed but for what the tensors hold.

    Raises:
        ValueError: as ``paged_decode_reference``, but for lengths on a CUDA GPU; ``out`` or a ``workspace`` that does
            not fit; an E4M3 cache before sm_89.
    """
    options = {"window": window, "soft_cap": soft_cap, "sinks": sinks, "alibi_slopes": alibi_slopes}
    options["fp8_queries"] = fp8_queries
    if checked is None or not q.is_cuda:
        new = {"k": k, "v": v, "slot_mapping": slot_mapping}
        shape = check_decode(q, k_cache, v_cache, block_table, seq_lens, k_scale, v_scale, **options, **new)
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        elif out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or out.stride(-1) != 1:
            raise ValueError(
                f"out is {out.dtype} {list(out.shape)} on {out.device}; it must be {q.dtype} {list(q.shape)} on "
                f"{q.device}, stride 1 along D"
            )
        if not q.is_cuda:
            given = options | new | {"scale": scale, "k_scale": k_scale, "v_scale": v_scale}
            return out.copy_(paged_decode_reference(q, k_cache, v_cache, block_table, seq_lens, **given))
    from adallm.kernels import choice, decode, decode_choice

    gpu = choice.gpu(q.device.index)
    if checked is None:
        _check_gpu(k_cache)
        workspace = workspace or Workspace.of(q, k_cache)
        needed = decode_choice.workspace_sizes(shape, k_cache.itemsize, gpu)
        had = (workspace.partial.numel(), workspace.arrivals.numel())
        if had[0] < needed[0] or had[1] < needed[1] or workspace.partial.device != q.device:
            raise ValueError(
                f"the workspace has room for {had} numbers on {workspace.partial.device}; it needs {needed}"
            )
    else:
        shape = checked
    config, programs = decode_choice.chosen(shape, k_cache.itemsize, gpu)
    with torch.cuda.device_of(q):
        decode.launch(
            shape.whole(q),
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            shape.whole(out),
            shape,
            config,
            programs=programs,
            partial=workspace.partial,
            arrivals=workspace.arrivals,
            scale=scale,
            k=None if k is None else shape.whole(k),
            v=None if v is None else shape.whole(v),
            slot_mapping=slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
            **options,
        )
    return out


def _check_gpu(cache: Tensor) -> None:
    from adallm.kernels import choice

    gpu = choice.gpu(cache.device.index)
    if cache.dtype == torch.float8_e4m3fn and gpu.family == "sm_80":
        raise ValueError(f"{gpu.slug} has no E4M3; supported there: a bfloat16 or float16 cache")


@torch.no_grad()
def write_kv_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
) -> None:
    """``k_cache[slot] = k / k_scale`` and the same for v, in the dtype of the cache; a slot of -1 is skipped.

    E4M3 is to nearest, ties to even, saturating. Scales for each token and head are written, not read: ``amax / 448``
    of the token's head, 1 where that is 0. A NaN stays NaN and is passed over by amax.

    Args:
        k, v: ``[N, Hkv, D]``, bfloat16 or float16.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``: E4M3, or the dtype of k without scales.
        slot_mapping: ``[N]`` int64, -1 or a slot that no other token has.
        k_scale, v_scale: a number, a float32 ``[]``, or float32 ``[num_blocks, block_size, Hkv]``.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    check_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    taken = slot_mapping >= 0
    blocks, positions = slot_mapping[taken] // k_cache.shape[1], slot_mapping[taken] % k_cache.shape[1]
    for x, cache, scale in ((k[taken], k_cache, k_scale), (v[taken], v_cache, v_scale)):
        if cache.dtype != torch.float8_e4m3fn:
            cache[blocks, positions] = x
            continue
        if isinstance(scale, Tensor) and scale.dim():
            of_token = fp8.scale_of(x.float().abs().nan_to_num(0.0, posinf=math.inf).amax(-1))
            scale[blocks, positions] = of_token
            data = fp8.to_e4m3(x.float() / of_token[..., None])
        else:
            data = fp8.to_e4m3(x.float() / scale)
        # Eight bits have no indexed writing.
        cache.view(torch.uint8)[blocks, positions] = data.view(torch.uint8)


@torch.no_grad()
def paged_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    fp8_queries: bool = False,
    k: Tensor | None = None,
    v: Tensor | None = None,
    slot_mapping: Tensor | None = None,
) -> Tensor:
    """Attention of the last tokens of each sequence over all of its tokens, as at the head of this module.

    Args:
        q: ``[B, Hq, D]``, or ``[B, T, Hq, D]`` for up to 8 tokens of each sequence; bfloat16 or float16.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``: E4M3, bfloat16 or float16.
        block_table: ``[B, any]`` int32; what lies behind a sequence's last block is not read.
        seq_lens: ``[B]`` int32: tokens in the cache, those of q included; 0, or T at least.
        scale: of the logits, ``D ** -0.5`` as a rule.
        k_scale, v_scale: a number, a float32 ``[]``, or float32 ``[num_blocks, block_size, Hkv]``.
        window: keys that a token sees, itself included; None for all.
        soft_cap: 0 for none.
        sinks, alibi_slopes: float32 ``[Hq]``.
        fp8_queries: round q to E4M3, with a scale of ``amax / 448`` for each token and head. With an E4M3 cache alone.
        k, v, slot_mapping: keys and values of the tokens of q that are not in the cache yet, ``[B, Hkv, D]`` or
            ``[B, T, Hkv, D]`` as q is, stride 1 along D, and their slots ``[B T]``: they are written there first, as
            ``write_kv_reference`` does. A slot is that of the token in the block table, or -1.

    Returns:
        FP32, with the shape of q.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a length that is no length.
    """
    shape = check_decode(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        k_scale,
        v_scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        fp8_queries=fp8_queries,
        k=k,
        v=v,
        slot_mapping=slot_mapping,
    )
    lengths = seq_lens.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= block_table.shape[1] * shape.block_size or 0 < length < shape.queries:
            raise ValueError(
                f"seq_lens[{b}] is {length}; it must be 0, or from {shape.queries} to what {block_table.shape[1]} "
                f"blocks of {shape.block_size} hold"
            )
    if k is not None:
        k, v = (shape.whole(x).flatten(0, 1) for x in (k, v))
        write_kv_reference(k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
    tokens = shape.whole(q).float()
    if fp8_queries:
        tokens = fp8.qdq(tokens)
    out = torch.zeros_like(tokens)
    for b, length in enumerate(lengths):
        if not length:
            continue
        blocks = block_table[b, : -(-length // shape.block_size)].long()
        keys = _gathered(k_cache, k_scale, blocks, length).repeat_interleave(shape.q_heads // shape.kv_heads, 1)
        values = _gathered(v_cache, v_scale, blocks, length).repeat_interleave(shape.q_heads // shape.kv_heads, 1)
        logits = torch.einsum("thd,jhd->thj", tokens[b], keys) * scale
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        position = torch.arange(length - shape.queries, length, device=q.device)[:, None]
        distance = torch.arange(length, device=q.device) - position  # [T, j]
        if alibi_slopes is not None:
            logits = logits + alibi_slopes[:, None] * distance[:, None, :]
        hidden = distance > 0 if window is None else (distance > 0) | (distance <= -window)
        logits = logits.masked_fill(hidden[:, None, :], -math.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None].expand(shape.queries, -1, 1)], -1)
        weights = torch.softmax(logits, -1)[..., :length]
        out[b] = torch.einsum("thj,jhd->thd", weights, values)
    return out.view(q.shape)


def _gathered(cache: Tensor, scale: Scale, blocks: Tensor, length: int) -> Tensor:
    """A sequence's keys or values, FP32 ``[length, Hkv, D]``."""
    # Eight bits have no indexing either.
    bits = cache.view(torch.uint8)[blocks].view(cache.dtype) if cache.itemsize == 1 else cache[blocks]
    found = bits.float().flatten(0, 1)[:length]
    if isinstance(scale, Tensor) and scale.dim():
        return found * scale[blocks].flatten(0, 1)[:length, :, None]
    return found * scale
