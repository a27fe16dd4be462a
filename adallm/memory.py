"""Weights and KV cache of a model in the memory of a card: what is left for the cache, and what that holds.

``room = 0.9 * memory - 2 GiB - weights``. vLLM takes 0.92 of what CUDA sees, which is a little less than the
``memory_mib`` of ``hardware.GPUS``. The 2 GiB stand for activations
and CUDA graphs, about what Qwen3-8B took beside weights and cache on an H200 (``peak_gib`` in ``results/vllm_e2e``); a
server measures its own. All of this is computed, from data sheets and configurations, and measured on no card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adallm.hardware import GPU, GPUS, kv_cache_bytes
from adallm.models import MODELS

GIB = 1 << 30
SHARE = 0.9
RESERVED = 2 * GIB
WEIGHTS = {"bf16": "BF16", "nvfp4": "NVFP4"}
# Name -> title, and the arguments of kv_cache_bytes.
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("BF16", {"dtype": "bf16"}),
    "fp8": ("FP8", {"dtype": "fp8"}),
    "fp8-token": ("FP8, a scale for each token and head", {"dtype": "fp8", "token_scales": True}),
    "nvfp4": ("NVFP4", {"dtype": "nvfp4"}),
}
BLOCK = 16  # tokens of a block of the cache

# Norms of a layer: of the hidden size, and of the head size.
_NORMS = {"llama": (2, 0), "qwen3": (2, 2), "gemma3_text": (4, 2)}
# Linear layers of a decoder layer: q, k, v, o, gate, up, down.
_LINEARS = 7


def weight_bytes(config: Mapping[str, Any], weights: str) -> int:
    """Bytes of a dense model's tensors, as ``adallm quantize`` writes them.

    ``bf16``: 2 for each parameter. ``nvfp4``: of the linear layers 4.5 bits a weight and an FP32 scale each; embedding,
    norms and ``lm_head``, which may be the embedding, in BF16.

    Args:
        config: a ``config.json`` of ``model_type`` llama, qwen3 or gemma3_text, without biases.
        weights: ``"bf16"`` or ``"nvfp4"``.

    Raises:
        ValueError: weights or a model that are not supported; a width that 16 does not divide with ``"nvfp4"``.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}; supported: {', '.join(WEIGHTS)}")
    if (kind := config.get("model_type")) not in _NORMS or config.get("attention_bias"):
        raise ValueError(f"model_type {kind!r}; supported without biases: {', '.join(_NORMS)}")
    hidden, inner, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    q_heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // q_heads
    q, kv = q_heads * head, config["num_key_value_heads"] * head
    of_hidden, of_head = _NORMS[kind]
    linear = layers * (2 * hidden * (q + kv) + 3 * hidden * inner)
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    dense = 2 * (embeddings + hidden + layers * (of_hidden * hidden + of_head * head))
    if weights == "bf16":
        return dense + 2 * linear
    if any(width % 16 for width in (hidden, q, inner)):
        raise ValueError(
            f"layers of {hidden}, {q} and {inner} columns with weights 'nvfp4'; supported: multiples of 16"
        )
    return dense + linear * 9 // 16 + 4 * _LINEARS * layers


def cache_bytes(config: Mapping[str, Any], tokens: int, cache: str) -> int:
    """``hardware.kv_cache_bytes`` of a sequence for a name in ``CACHES``.

    Raises:
        ValueError: a cache that is not supported.
    """
    if cache not in CACHES:
        raise ValueError(f"cache {cache!r}; supported: {', '.join(CACHES)}")
    return kv_cache_bytes(config, tokens, **CACHES[cache][1], block_size=BLOCK)


@dataclass(frozen=True)
class Fit:
    """What a card holds of a model.

    Attributes:
        weights: bytes.
        room: bytes for the cache; negative where the weights do not fit.
        context: tokens of the longest sequence, one alone: whole blocks, or the model's positions. 0 where none fits.
        bound: what ends it: ``"weights"``, ``"memory"`` or ``"positions"``.
        batch: sequences of ``tokens`` tokens side by side.
        tokens: of each sequence in the batch.
    """

    weights: int
    room: int
    context: int
    bound: str
    batch: int
    tokens: int


def fit(
    config: Mapping[str, Any],
    gpu: GPU,
    *,
    weights: str,
    cache: str,
    tokens: int,
    share: float = SHARE,
    reserved: int = RESERVED,
) -> Fit:
    """``room = share * memory - reserved - weights``, and the longest sequence and the largest batch in it.

    Args:
        config: as for ``weight_bytes``, with ``max_position_embeddings``.
        weights, cache: of ``WEIGHTS`` and ``CACHES``.
        tokens: of a sequence in the batch, at least 1.
        share: of the card's memory.
        reserved: bytes for activations and CUDA graphs.

    Raises:
        ValueError: as ``weight_bytes`` and ``cache_bytes``; no tokens.
    """
    if tokens < 1:
        raise ValueError(f"tokens {tokens}; a sequence has at least 1")
    held = weight_bytes(config, weights)
    room = int(share * gpu.memory_mib * (1 << 20)) - reserved - held
    context, positions = _longest(config, cache, room), config["max_position_embeddings"]
    bound = "weights" if room < 0 else "positions" if context == positions else "memory"
    batch = max(room, 0) // cache_bytes(config, tokens, cache)
    return Fit(held, room, context, bound, batch if tokens <= positions else 0, tokens)


def _longest(config: Mapping[str, Any], cache: str, room: int) -> int:
    """By bisection over blocks: a sequence's bytes do not shrink as it grows."""
    positions = config["max_position_embeddings"]
    if cache_bytes(config, positions, cache) <= room:
        return positions
    low, high = 0, -(-positions // BLOCK)  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = cache_bytes(config, middle * BLOCK, cache) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low * BLOCK


def per_token(models: Sequence[str] = tuple(MODELS), *, tokens: int = BLOCK) -> list[dict[str, Any]]:
    """Rows ``model``, ``cache``, ``title``, ``bytes``: of a token, in a sequence of ``tokens``."""
    return [
        {"model": m, "cache": c, "title": title, "bytes": cache_bytes(MODELS[m], tokens, c) / tokens}
        for m in models
        for c, (title, _) in CACHES.items()
    ]


def by_context(contexts: Sequence[int], models: Sequence[str] = tuple(MODELS)) -> list[dict[str, Any]]:
    """Rows ``model``, ``cache``, ``tokens``, ``bytes`` of a sequence, up to each model's positions."""
    return [
        {"model": m, "cache": c, "tokens": n, "bytes": cache_bytes(MODELS[m], n, c)}
        for m in models
        for c in CACHES
        for n in contexts
        if n <= MODELS[m]["max_position_embeddings"]
    ]


def fits(
    gpus: Sequence[str], *, tokens: int, models: Sequence[str] = tuple(MODELS), caches: Sequence[str] = tuple(CACHES)
) -> Iterator[dict[str, Any]]:
    """A row for each card, model, weights and cache: these names and the fields of ``Fit``."""
    for gpu in gpus:
        for model in models:
            for weights in WEIGHTS:
                for cache in caches:
                    found = fit(MODELS[model], GPUS[gpu], weights=weights, cache=cache, tokens=tokens)
                    row = {"gpu": gpu, "model": model, "weights": weights, "cache": cache}
                    yield row | {"weight_bytes" if k == "weights" else k: v for k, v in vars(found).items()}
