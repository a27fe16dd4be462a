"""Attention of prompts that begin in a step: FlashAttention, as vLLM has it, over the step's own keys and values.

All that such a prompt attends to is in the step, so that neither the cache is read nor what E4M3 rounds off is lost.
A prompt that goes on, behind a chunk of its own or a cached prefix, needs the cache, which FlashAttention does not read
in E4M3 beside queries of 16 bits: vLLM's Triton kernel does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform


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

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, prompts: Beginning) -> None:
        """Attention of ``[tokens, heads, D]`` in 16 bits, each tensor of the whole step."""
        tokens = slice(prompts.first_token, prompts.first_token + prompts.tokens)
        self._run(
            q=q[tokens],
            k=k[tokens],
            v=v[tokens],
            out=out[tokens],
            cu_seqlens_q=prompts.starts,
            cu_seqlens_k=prompts.starts,
            max_seqlen_q=prompts.longest,
            max_seqlen_k=prompts.longest,
            **self._options,
        )
