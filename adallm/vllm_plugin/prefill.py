"""Attention of prompts: FlashAttention as vLLM has it, which does not read a cache in E4M3 beside queries of 16 bits.

All that a prompt attends to that begins in a step is in the step: its own keys and values, before they are rounded. A
prompt that goes on, behind a chunk of its own or a cached prefix, needs the cache: its keys and values are copied out,
a layer at a time, if they do not take more than ``MOST_BYTES``; else vLLM's Triton kernel reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.platforms import current_platform

from adallm.attention import gather_kv

MOST_BYTES = 128 << 20


@dataclass(frozen=True)
class Beginning:
    """The last sequences of a step, whose prompts begin in it.

    Attributes:
        first: of them, in the step.
        first_token: where its tokens begin.
        tokens: of all.
        starts: int32 ``[sequences + 1]`` on the device, where the tokens of each begin, from 0.
        longest: tokens of one, at the most.
    """

    first: int
    first_token: int
    tokens: int
    starts: Tensor
    longest: int


def beginning(step: Any, decodes: int) -> Beginning | None:
    """Those of a step; None if there are none, or if vLLM does not say how long sequences are.

    Args:
        step: ``CommonAttentionMetadata``, whose upper bounds of lengths are exact for prompts.
        decodes: sequences in front that are none of them.
    """
    lengths, starts = step.seq_lens_cpu_upper_bound, step.query_start_loc_cpu
    if lengths is None:
        return None
    queries = starts[1:] - starts[:-1]
    first = step.num_reqs
    for begins in reversed((lengths[decodes:first] == queries[decodes:first]).tolist()):
        if not begins:
            break
        first -= 1
    if first == step.num_reqs:
        return None
    token, longest = int(starts[first]), int(queries[first:].max())
    return Beginning(first, token, step.num_actual_tokens - token, step.query_start_loc[first:] - token, longest)


@dataclass(frozen=True)
class Continued:
    """Sequences of a step whose prompts have begun before it.

    Attributes:
        step: vLLM's metadata of these alone.
        starts: int32 ``[sequences + 1]`` on the device, where each begins if all of their tokens lie side by side.
        tokens: of all, those in the cache included; 0 if vLLM does not say how long sequences are.
        longest: tokens of one, at the most.
    """

    step: Any
    starts: Tensor
    tokens: int
    longest: int


def continued(step: Any, part: Any, first: int, end: int) -> Continued:
    """Those from ``first`` to ``end`` of a step, of which ``part`` is vLLM's metadata.

    Args:
        step: ``CommonAttentionMetadata``.
    """
    starts = functional.pad(part.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    lengths = step.seq_lens_cpu_upper_bound
    if lengths is None:
        return Continued(part, starts, 0, 0)
    return Continued(part, starts, int(lengths[first:end].sum()), int(lengths[first:end].max()))


def most_tokens(kv_heads: int, head_size: int) -> int:
    """Of prompts that go on in a step, so that FlashAttention does them."""
    return MOST_BYTES // (2 * 2 * kv_heads * head_size)


def version(head_size: int, *, alibi: bool, sinks: bool) -> int | None:
    """Of the FlashAttention that runs a layer; None on a CPU, where there is none, and for what it does not compute:
    version 3 takes no ALiBi slopes, and 2 no sinks.
    """
    if not current_platform.is_cuda():
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    found = get_flash_attn_version(requires_alibi=alibi, head_size=head_size)
    return None if found not in (2, 3) or (sinks and found == 2) else found


class FlashAttention:
    """Of one layer.

    Args:
        version: 2 or 3.
        scale, window, soft_cap: of ``TritonAttentionImpl``.
        alibi: slopes, FP32 ``[Hq]``, or None.
        sinks: ``[Hq]``, or None.
    """

    def __init__(
        self,
        version: int,
        scale: float,
        window: tuple[int, int],
        soft_cap: float,
        *,
        alibi: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        from vllm.v1.attention.backends import fa_utils

        self._run = fa_utils.flash_attn_varlen_func
        self._options: dict[str, Any] = {"softmax_scale": scale, "window_size": list(window), "softcap": soft_cap}
        self._options |= {"causal": True, "fa_version": version, "alibi_slopes": alibi}
        self._options["s_aux"] = None if sinks is None else sinks.to(torch.bfloat16)

    def begin(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, prompts: Beginning) -> None:
        """Attention of ``[tokens, heads, D]`` in 16 bits, each tensor of the whole step."""
        starts, longest = prompts.starts, prompts.longest
        if prompts.tokens < len(q):
            tokens = slice(prompts.first_token, prompts.first_token + prompts.tokens)
            q, k, v, out = q[tokens], k[tokens], v[tokens], out[tokens]
        self._attend(q, k, v, out, starts, starts, longest, longest)

    def go_on(
        self, q: Tensor, caches: Sequence[Tensor], out: Tensor, prompts: Continued, scales: Mapping[str, Any]
    ) -> bool:
        """Attention of ``[tokens, heads, D]``, tensors of these sequences; False if there is too much to copy."""
        if not 0 < prompts.tokens <= most_tokens(*caches[0].shape[2:]):
            return False
        given = {"tokens": prompts.tokens, "longest": prompts.longest, "dtype": q.dtype}
        k, v = gather_kv(*caches, prompts.step.block_table, prompts.starts, **given, **scales)
        of_queries = (prompts.step.query_start_loc, prompts.starts, prompts.step.max_query_len)
        self._attend(q, k, v, out, *of_queries, prompts.longest)
        return True

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        of_queries: Tensor,
        of_keys: Tensor,
        most_queries: int,
        most_keys: int,
    ) -> None:
        self._run(
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=of_queries,
            cu_seqlens_k=of_keys,
            max_seqlen_q=most_queries,
            max_seqlen_k=most_keys,
            **self._options,
        )
