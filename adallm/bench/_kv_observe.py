"""Queries, keys and values of every layer of a model, as they are where a cache would take them in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from adallm import evaluate, hf_model, lm
from adallm.bench import divergence
from adallm.tasks import stdlib_ppl

_OBSERVE = "adallm_observe_kv"
Heads = tuple[Tensor, Tensor, Tensor]


def held_out(count: int) -> list[Tensor]:
    """Token ids of as many held-out documents, each the first of the bundled model's context."""
    tokenizer, length = AutoTokenizer.from_pretrained(evaluate.BUNDLED_MODEL), lm.max_length(evaluate.BUNDLED_MODEL)
    # Without the token that would follow.
    return [ids[:length] for ids in divergence.windows(stdlib_ppl.documents(), tokenizer, length, count)]


@torch.no_grad()
def keys_and_values(model: Path, windows: Sequence[Tensor]) -> list[list[Heads]]:
    """For each window and layer q, k and v, FP32 ``[tokens, heads, D]``, behind the rotary embedding.

    The model runs with its stored weights in FP32, so that nothing has rounded them.
    """
    seen: dict[int, Heads] = {}

    def observe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
        seen[module.layer_idx] = tuple(x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    transformers.utils.logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    hf_model.attend(loaded, _OBSERVE, observe)
    found = []
    for window in windows:
        loaded.base_model(window[None], use_cache=False)
        found.append([seen[i] for i in sorted(seen)])
    return found
