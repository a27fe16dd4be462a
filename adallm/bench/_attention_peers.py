"""Implementations of a decode step over an E4M3 paged cache with scale 1, each ready to run on every copy of the cache.

A builder raises whatever its library raises where that is missing or refuses the step. What can be prepared before a
step, and is the same for every layer of a model, is not part of a call: plans, scheduler metadata, FP8 queries.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adallm import fp8
from adallm.attention import Workspace, paged_decode
from adallm.bench._attention_step import Inputs
from adallm.bench._cases import named

E4M3 = torch.float8_e4m3fn
FLASHINFER_WORKSPACE = 394 << 20  # bytes, as vLLM has it
FA3_SPLITS = 32  # at most, as vLLM has it for CUDA graphs
FP8_QUERIES = "queries and weights are rounded to E4M3"


@dataclass(frozen=True, eq=False)
class Prepared:
    """An implementation, ready to run.

    Attributes:
        calls: one for each copy of the cache.
        out: BF16 ``[B, Hq, D]``, where every call leaves its result.
        itemsize: bytes of a number in the cache.
        path: what runs, in a few words, or None.
        rounds: what makes an error above the limit, for the note in its row.
    """

    calls: Sequence[Callable[[], object]]
    out: Tensor
    itemsize: int = 1
    path: str | None = None
    rounds: str = ""


def ours(inputs: Inputs, *, dtype: torch.dtype = E4M3) -> Prepared:
    """``paged_decode``, through its public interface."""
    step, q = inputs.step, inputs.q
    caches = inputs.caches(dtype)
    out = torch.empty_like(q)
    given = {"scale": step.scale, "window": step.window, "out": out}
    if q.is_cuda:
        given["workspace"] = Workspace.of(q, caches[0][0])
    calls = [partial(paged_decode, q, k, v, inputs.table, inputs.seq_lens, **given) for k, v in caches]
    return Prepared(calls, out, dtype.itemsize)


def flashinfer(inputs: Inputs) -> Prepared:
    """FlashInfer's FA2 decode on tensor cores, which runs from sm_80 on; on Hopper it would choose FA3 by itself.

    Planned for exactly these lengths. A plan that holds in a CUDA graph whatever the lengths are (``use_cuda_graph``)
    always splits and merges, and is slower for large batches.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    step, q = inputs.step, inputs.q
    counts = [-(-length // step.block) for length in step.lengths]
    table = inputs.table.cpu()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _flashinfer_workspace(q.device), "NHD", use_tensor_cores=True, backend="fa2"
    )
    wrapper.plan(
        torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
        torch.cat([row[:count] for row, count in zip(table, counts, strict=True)]),
        torch.tensor([(length - 1) % step.block + 1 for length in step.lengths], dtype=torch.int32),
        step.q_heads,
        step.kv_heads,
        step.head_size,
        step.block,
        window_left=-1 if step.window is None else step.window - 1,
        q_data_type=torch.bfloat16,
        kv_data_type=E4M3,
        sm_scale=step.scale,
    )
    out = torch.empty_like(q)
    calls = [partial(wrapper.run, q, cache, k_scale=1.0, v_scale=1.0, out=out) for cache in inputs.caches()]
    return Prepared(calls, out, path=f"{named('flashinfer-python')} fa2, tensor cores")


@functools.cache
def _flashinfer_workspace(device: torch.device) -> Tensor:
    return torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)


def vllm_triton(inputs: Inputs, *, fp8_queries: bool = False) -> Prepared:
    """vLLM's Triton attention as its backend calls it in a decode step: split among segments for small batches.

    vLLM 0.26 serves an E4M3 cache with queries, and so weights, in E4M3 too, by default.
    """
    from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    step, device = inputs.step, inputs.q.device
    # With CUDA graphs vLLM takes the nearest size of a graph, which 8, 16 and 64 are.
    threshold = MIN_LAUNCH_GRID_SIZE_2D // step.kv_heads
    segments = (threshold, step.q_heads, NUM_PAR_SOFTMAX_SEGMENTS)
    one = torch.ones((), dtype=torch.float32, device=device)
    out = torch.empty_like(inputs.q)
    given = {
        "q": fp8.to_e4m3(inputs.q.float()) if fp8_queries else inputs.q,
        "out": out,
        "cu_seqlens_q": torch.arange(step.batch + 1, dtype=torch.int32, device=device),
        "max_seqlen_q": 1,
        "seqused_k": inputs.seq_lens,
        "max_seqlen_k": max(step.lengths),
        "softmax_scale": step.scale,
        "causal": True,
        "window_size": _window(inputs),
        "block_table": inputs.table,
        "softcap": 0,
        "q_descale": one if fp8_queries else None,
        "k_descale": one.expand(step.batch, step.kv_heads),
        "v_descale": one.expand(step.batch, step.kv_heads),
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": NUM_PAR_SOFTMAX_SEGMENTS,
        "softmax_segm_output": torch.empty(*segments, step.head_size, dtype=torch.float32, device=device),
        "softmax_segm_max": torch.empty(segments, dtype=torch.float32, device=device),
        "softmax_segm_expsum": torch.empty(segments, dtype=torch.float32, device=device),
        "kv_quant_mode": KVQuantMode.FP8_PER_TENSOR,
    }
    calls = [partial(unified_attention, k=k, v=v, **given) for k, v in inputs.caches()]
    how = f"{NUM_PAR_SOFTMAX_SEGMENTS} segments" if step.batch <= threshold else "not split"
    return Prepared(calls, out, path=f"{named('vllm')}, {how}", rounds=FP8_QUERIES if fp8_queries else "")


def fa3_fp8(inputs: Inputs) -> Prepared:
    """FlashAttention 3 of vLLM with FP8 queries, as its backend calls it in a CUDA graph; Hopper only."""
    from vllm.vllm_flash_attn import (
        fa_version_unsupported_reason,
        flash_attn_varlen_func,
        get_scheduler_metadata,
        is_fa_version_supported,
    )

    if not is_fa_version_supported(3):
        raise RuntimeError(fa_version_unsupported_reason(3))
    step, device = inputs.step, inputs.q.device
    ends = torch.arange(step.batch + 1, dtype=torch.int32, device=device)
    longest = max(step.lengths)
    metadata = get_scheduler_metadata(
        batch_size=step.batch,
        max_seqlen_q=1,
        max_seqlen_k=longest,
        num_heads_q=step.q_heads,
        num_heads_kv=step.kv_heads,
        headdim=step.head_size,
        cache_seqlens=inputs.seq_lens,
        qkv_dtype=E4M3,
        cu_seqlens_q=ends,
        page_size=step.block,
        causal=True,
        window_size=_window(inputs),
        num_splits=FA3_SPLITS,
    )
    descale = torch.ones((), dtype=torch.float32, device=device).expand(step.batch, step.kv_heads)
    out = torch.empty_like(inputs.q)
    given = {
        "q": fp8.to_e4m3(inputs.q.float()),
        "out": out,
        "cu_seqlens_q": ends,
        "max_seqlen_q": 1,
        "seqused_k": inputs.seq_lens,
        "max_seqlen_k": longest,
        "softmax_scale": step.scale,
        "causal": True,
        "window_size": list(_window(inputs)),
        "block_table": inputs.table,
        "scheduler_metadata": metadata,
        "fa_version": 3,
        "q_descale": descale,
        "k_descale": descale,
        "v_descale": descale,
        "num_splits": FA3_SPLITS,
    }
    calls = [partial(flash_attn_varlen_func, k=k, v=v, **given) for k, v in inputs.caches()]
    return Prepared(calls, out, path=f"{named('vllm')} FA3, Hopper only", rounds=FP8_QUERIES)


def _window(inputs: Inputs) -> tuple[int, int]:
    """Tokens that are seen to the left and to the right of a query, as FlashAttention counts them."""
    return (-1, -1) if inputs.step.window is None else (inputs.step.window - 1, 0)


BUILDERS: dict[str, Callable[[Inputs], Prepared]] = {
    "adallm": ours,
    "adallm-bf16": partial(ours, dtype=torch.bfloat16),
    "flashinfer": flashinfer,
    "vllm-triton": vllm_triton,
    "vllm-triton-fp8q": partial(vllm_triton, fp8_queries=True),
    "fa3-fp8": fa3_fp8,
}
