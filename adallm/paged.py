"""What a step over a paged KV cache takes: sizes that are supported, and the check of its arguments.

Nothing here looks at values on the device: block numbers, slots and lengths are the caller's word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_SIZES = (64, 96, 128, 192, 256)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_GQA = 16  # query heads of a KV head
MAX_QUERIES = 8  # query tokens of a sequence
DTYPES = (torch.bfloat16, torch.float16)
CACHE_DTYPES = (*DTYPES, torch.float8_e4m3fn)

Scale = float | Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a decode step: ``q [B, T, Hq, D]``, a cache of ``blocks`` blocks with ``block_size`` tokens each."""

    batch: int
    queries: int
    q_heads: int
    kv_heads: int
    head_size: int
    blocks: int
    block_size: int

    @classmethod
    def of(cls, q: Tensor, k_cache: Tensor) -> Shape:
        """Of arguments that fit each other."""
        batch, queries, q_heads, head_size = q.shape if q.dim() == 4 else (q.shape[0], 1, *q.shape[1:])
        return cls(batch, queries, q_heads, k_cache.shape[2], head_size, *k_cache.shape[:2])

    def whole(self, x: Tensor) -> Tensor:
        """``x`` with a dimension for the query tokens."""
        return x if x.dim() == 4 else x[:, None]


def check_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    k_scale: Scale,
    v_scale: Scale,
    window: int | None,
    soft_cap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    fp8_queries: bool = False,
    k: Tensor | None = None,
    v: Tensor | None = None,
    slot_mapping: Tensor | None = None,
) -> Shape:
    """The sizes of a decode step whose arguments fit each other; lengths and block numbers are not looked at.

    Raises:
        ValueError: one does not; it says which and what is supported.
    """
    if q.dim() not in (3, 4) or q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype} {list(q.shape)}; supported: bfloat16, float16 [B, Hq, D] or [B, T, Hq, D]")
    if q.stride(-1) != 1 or not _even(q):
        raise ValueError(
            f"q has strides {q.stride()} and offset {q.storage_offset()}; the last must be 1, "
            "the others and the offset even"
        )
    _check_caches(k_cache, v_cache)
    shape = Shape.of(q, k_cache)
    batch, queries, q_heads = shape.batch, shape.queries, shape.q_heads
    kv_heads, head_size = shape.kv_heads, shape.head_size
    if head_size != k_cache.shape[3] or q_heads % kv_heads or not 1 <= q_heads // kv_heads <= MAX_GQA:
        raise ValueError(
            f"q is {list(q.shape)} and the cache {list(k_cache.shape)}; D must be the same, and Hq a multiple of Hkv, "
            f"up to {MAX_GQA} times it"
        )
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"q has {queries} tokens of each sequence; supported: 1 to {MAX_QUERIES}")
    if k_cache.dtype != torch.float8_e4m3fn and k_cache.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype} and the cache {k_cache.dtype}; it must be the same, or float8_e4m3fn")
    if fp8_queries and k_cache.dtype != torch.float8_e4m3fn:
        raise ValueError(f"fp8_queries with a cache of {k_cache.dtype}; they need float8_e4m3fn")
    for name, tensor, dims in (("block_table", block_table, 2), ("seq_lens", seq_lens, 1)):
        if tensor.dim() != dims or tensor.shape[0] != batch or tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be int32 with {batch} rows")
    for name, tensor in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if tensor is not None and (tensor.shape != (q_heads,) or tensor.dtype != torch.float32):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be float32 [{q_heads}]")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be 1 or more, or None")
    if not 0 <= soft_cap < math.inf:
        raise ValueError(f"soft_cap is {soft_cap}; it must be 0 or positive")
    if any(x is not None for x in (k, v, slot_mapping)):
        _check_new(q, shape, k, v, slot_mapping)
    _check_scales(k_cache, k_scale, v_scale)
    _check_strides(block_table=block_table, seq_lens=seq_lens, sinks=sinks, alibi_slopes=alibi_slopes)
    _same_device(q, k_cache, v_cache, block_table, seq_lens, sinks, alibi_slopes, k_scale, v_scale, k, v, slot_mapping)
    return shape


def _check_new(q: Tensor, shape: Shape, k: Tensor | None, v: Tensor | None, slot_mapping: Tensor | None) -> None:
    wanted = (*q.shape[:-2], shape.kv_heads, shape.head_size)
    slots = (shape.batch * shape.queries,)
    for name, x, size, dtype in (
        ("k", k, wanted, q.dtype),
        ("v", v, wanted, q.dtype),
        ("slot_mapping", slot_mapping, slots, torch.int64),
    ):
        if x is None or x.shape != size or x.dtype != dtype or x.stride(-1) != 1:
            given = None if x is None else f"{x.dtype} {list(x.shape)} with strides {x.stride()}"
            raise ValueError(f"{name} is {given}; it must be {dtype} {list(size)}, the last stride 1")


def check_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Scale, v_scale: Scale
) -> None:
    """As ``check_decode``, for new keys and values; slots are not looked at."""
    _check_caches(k_cache, v_cache)
    kv_heads, head_size = k_cache.shape[2:]
    if k.shape != v.shape or k.dim() != 3 or k.shape[1:] != (kv_heads, head_size) or k.dtype not in DTYPES:
        raise ValueError(
            f"k is {k.dtype} {list(k.shape)}, v {list(v.shape)}; they must be bfloat16 or float16 [N, {kv_heads}, "
            f"{head_size}], as the cache has it"
        )
    if v.dtype != k.dtype or (k_cache.dtype != torch.float8_e4m3fn and k_cache.dtype != k.dtype):
        raise ValueError(f"k is {k.dtype}, v {v.dtype}, the cache {k_cache.dtype}; it must be k's, or float8_e4m3fn")
    if slot_mapping.shape != k.shape[:1] or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"slot_mapping is {slot_mapping.dtype} {list(slot_mapping.shape)}; it must be int64 [{k.shape[0]}]"
        )
    _check_scales(k_cache, k_scale, v_scale)
    _check_strides(slot_mapping=slot_mapping)
    _same_device(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def check_gather(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    starts: Tensor,
    dtype: torch.dtype,
    k_scale: Scale,
    v_scale: Scale,
) -> None:
    """As ``check_decode``, for keys and values that are read back."""
    _check_caches(k_cache, v_cache)
    if dtype not in DTYPES or (k_cache.dtype != torch.float8_e4m3fn and k_cache.dtype != dtype):
        raise ValueError(f"dtype is {dtype} and the cache {k_cache.dtype}; it must be the same, or float8_e4m3fn")
    if starts.dim() != 1 or not starts.numel() or starts.dtype != torch.int32:
        raise ValueError(f"starts is {starts.dtype} {list(starts.shape)}; it must be int32 [B + 1]")
    batch = starts.numel() - 1
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table is {block_table.dtype} {list(block_table.shape)}; it must be int32 [{batch}, ...]"
        )
    _check_scales(k_cache, k_scale, v_scale)
    if kind_of(k_scale) == "token":
        raise ValueError("k_scale is for each token and head; supported: one number for a layer")
    _check_strides(block_table=block_table, starts=starts)
    _same_device(k_cache, v_cache, block_table, starts, k_scale, v_scale)


def _check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache.dim() != 4 or v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype:
        raise ValueError(
            f"the caches are {k_cache.dtype} {list(k_cache.shape)} and {v_cache.dtype} {list(v_cache.shape)}; both "
            "must be [num_blocks, block_size, Hkv, D] of one dtype"
        )
    if k_cache.dtype not in CACHE_DTYPES:
        raise ValueError(f"the cache is {k_cache.dtype}; supported: float8_e4m3fn, bfloat16, float16")
    if k_cache.shape[1] not in BLOCK_SIZES or k_cache.shape[3] not in HEAD_SIZES:
        raise ValueError(
            f"the cache is {list(k_cache.shape)}; supported: blocks of {', '.join(map(str, BLOCK_SIZES))} tokens, "
            f"heads of {', '.join(map(str, HEAD_SIZES))}"
        )
    for cache in (k_cache, v_cache):
        if cache.stride(3) != 1 or not (cache.itemsize == 2 or _even(cache)):
            raise ValueError(
                f"a cache has strides {cache.stride()} and offset {cache.storage_offset()}; the last must be 1, "
                "and with float8_e4m3fn the others and the offset even"
            )


def kind_of(scale: Scale) -> str:
    """``"number"``, ``"tensor"`` for one number on the device, or ``"token"`` for those of each token and head."""
    if not isinstance(scale, Tensor):
        return "number"
    return "token" if scale.dim() else "tensor"


def _even(x: Tensor) -> bool:
    """Whether pairs along the last dimension, as which queries and E4M3 are read, are aligned."""
    return not (x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]))


def _check_strides(**arguments: Tensor | None) -> None:
    for name, tensor in arguments.items():
        if tensor is not None and tensor.dim() and tensor.numel() > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the last must be 1")


def _check_scales(k_cache: Tensor, *scales: Scale) -> None:
    by_token = k_cache.shape[:3]
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if k_cache.dtype != torch.float8_e4m3fn and (isinstance(scale, Tensor) or scale != 1.0):
            raise ValueError(f"{name} is given, and the cache is {k_cache.dtype}; only float8_e4m3fn has scales")
        if isinstance(scale, Tensor):
            if scale.dtype != torch.float32 or scale.shape not in ((), by_token):
                raise ValueError(
                    f"{name} is {scale.dtype} {list(scale.shape)}; it must be float32, [] or {list(by_token)}"
                )
            if not scale.is_contiguous():
                raise ValueError(f"{name} has strides {scale.stride()}; it must be contiguous")
        elif not 0 < scale < math.inf:
            raise ValueError(f"{name} is {scale}; it must be positive and finite")
    if len(set(map(kind_of, scales))) > 1:
        raise ValueError("k_scale and v_scale must be alike: numbers, [], or for each token and head")


def _same_device(*arguments: Scale | Tensor | None) -> None:
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {' and '.join(sorted(map(str, devices)))}; they must be on one device")
