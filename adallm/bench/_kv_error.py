"""The error that a KV cache adds to attention: its output against FP32 over keys and values that were not rounded.

Queries are rounded to BF16 for both. What enters a cache is BF16, as a model in BF16 gives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adallm import attention, fp8, nvfp4
from adallm.formats import E2M1_MAX, E4M3_MAX

BLOCK = 16
# Smallest E4M3 number with all of its mantissa.
E4M3_NORMAL = 2.0**-6
CACHES = {
    "bf16": "BF16",
    "fp8-one": "FP8, scale 1",
    "fp8-calibrated": "FP8, calibrated",
    "fp8-token": "FP8, per token and head",
    "nvfp4": "NVFP4 (4.5 bits)",
}


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention in FP32, the obvious way: ``softmax(q k / sqrt(D)) v``.

    Args:
        q: ``[B, T, Hq, D]``, the last T tokens of the first ``lengths[b]``.
        k, v: ``[tokens, Hkv, D]``, of one text.

    Returns:
        FP32 ``[B, T, Hq, D]``.
    """
    shared, size = q.shape[2] // k.shape[1], q.shape[3]
    out = []
    for queries, length in zip(q.float(), lengths, strict=True):
        keys, values = (x[:length].float().repeat_interleave(shared, 1) for x in (k, v))
        logits = torch.einsum("thd,jhd->htj", queries, keys) / math.sqrt(size)
        unseen = torch.ones(len(queries), length, dtype=torch.bool).triu(length - len(queries) + 1)
        weights = logits.masked_fill(unseen, -math.inf).softmax(-1)
        out.append(torch.einsum("htj,jhd->thd", weights, values))
    return torch.stack(out)


def cached(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cache: str, k_scale: float, v_scale: float
) -> Tensor:
    """The same by way of a paged cache, which ``write_kv`` fills and ``paged_decode_reference`` reads.

    Args:
        q: ``[B, T, Hq, D]`` bfloat16.
        k, v: ``[tokens, Hkv, D]`` bfloat16, tokens a multiple of 16.
        cache: a key of ``CACHES``.
        k_scale, v_scale: calibrated, ``amax / 448``; for ``nvfp4`` the global scale comes from them.
    """
    blocks = len(k) // BLOCK
    shape = (blocks, BLOCK, *k.shape[1:])
    dtype = torch.float8_e4m3fn if cache.startswith("fp8") else torch.bfloat16
    k_cache, v_cache = (torch.zeros(shape, dtype=dtype) for _ in range(2))
    scales = {"k_scale": 1.0, "v_scale": 1.0}
    if cache == "fp8-calibrated":
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    elif cache == "fp8-token":
        scales = {side: torch.empty(shape[:3]) for side in scales}
    elif cache == "nvfp4":
        k, v = (_nvfp4(x, scale) for x, scale in ((k, k_scale), (v, v_scale)))
    attention.write_kv(k, v, k_cache, v_cache, torch.arange(len(k)), **scales)
    table = torch.arange(blocks, dtype=torch.int32).expand(len(lengths), -1).contiguous()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    scale = q.shape[3] ** -0.5
    return attention.paged_decode_reference(q, k_cache, v_cache, table, seq_lens, scale=scale, **scales)


def _nvfp4(x: Tensor, scale: float) -> Tensor:
    """Blocks of 16 along D; the largest block scale is 448 where ``|x|`` is the calibrated amax."""
    t = nvfp4.quantize(x, global_scale=scale / E2M1_MAX)
    return nvfp4.dequantize(t, torch.bfloat16)


def squares(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], k_scale: float, v_scale: float
) -> dict[str, tuple[float, float]]:
    """For each of ``CACHES``: ``||out - expected||^2`` and ``||expected||^2``; arguments in FP32, as for ``cached``."""
    q, k16, v16 = (x.to(torch.bfloat16) for x in (q, k, v))
    expected = exact(q, k, v, lengths)
    found = {cache: cached(q, k16, v16, lengths, cache, k_scale, v_scale) for cache in CACHES}
    return {
        cache: (float((out - expected).square().sum()), float(expected.square().sum())) for cache, out in found.items()
    }


def pooled(parts: Sequence[tuple[float, float]]) -> float:
    """``sqrt(sum of errors / sum of signals)``, relative error over all parts."""
    return math.sqrt(sum(error for error, _ in parts) / sum(signal for _, signal in parts))


def spread(parts: Sequence[tuple[float, float]]) -> float:
    """Standard error of ``pooled`` by the jackknife over the parts; 0 for one."""
    n = len(parts)
    if n < 2:
        return 0.0
    left = [pooled([*parts[:i], *parts[i + 1 :]]) for i in range(n)]
    mean = sum(left) / n
    return math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in left))


def shares(x: Tensor, scale: float) -> tuple[float, float]:
    """Of the elements of x, how many an E4M3 cache of this scale holds as subnormals, and how many it cuts: 0 to 1."""
    magnitude = x.abs() / scale
    return float((magnitude < E4M3_NORMAL).float().mean()), float((magnitude > E4M3_MAX).float().mean())


def scale_of(x: Tensor) -> float:
    """``amax / 448``, 1 where that is 0."""
    return float(fp8.scale_of(x.abs().amax()))
