"""Caches and steps that the tests of attention share."""

import torch

from adallm import fp8
from adallm.attention import write_kv_reference

E4M3 = torch.float8_e4m3fn
OPTIONS = [
    {},
    {"window": 5},
    {"soft_cap": 3.0},
    {"sinks": True},
    {"slopes": True},
    {"window": 20, "soft_cap": 2.0, "sinks": True, "slopes": True},
    {"k_scale": 0.25, "v_scale": 3.0},
]


def caches(blocks, block_size, heads, d, *, dtype=E4M3, order="nhd", fill=float("nan")):
    """Two caches full of NaN, ``[blocks, block_size, heads, d]``, the heads or the tokens outside in memory."""
    shape = (blocks, block_size, heads, d) if order == "nhd" else (blocks, heads, block_size, d)
    made = [torch.full(shape, fill).to(dtype) for _ in range(2)]
    return made if order == "nhd" else [cache.transpose(1, 2) for cache in made]


def step(
    lengths, *, q_heads=4, kv_heads=2, d=64, block_size=16, queries=1, dtype=torch.bfloat16, cache=E4M3, order="nhd"
):
    """A cache with what the lengths say in shuffled blocks, NaN everywhere else, and the keys and values in FP32."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-length // block_size) for length in lengths]
    k_cache, v_cache = caches(sum(needed) + 3, block_size, kv_heads, d, dtype=cache, order=order)
    free = (torch.randperm(sum(needed) + 3, generator=generator)).tolist()
    table = torch.full((len(lengths), max([*needed, 1]) + 1), -7, dtype=torch.int32)
    dense = []
    for b, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        table[b, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        k, v = torch.randn(2, length, kv_heads, d, generator=generator).to(dtype)
        at = torch.arange(length)
        slots = table[b].long()[at // block_size] * block_size + at % block_size
        write_kv_reference(k, v, k_cache, v_cache, slots)
        stored = [fp8.to_e4m3(x.float()).float() if cache == E4M3 else x.float() for x in (k, v)]
        dense.append(stored)
    q = torch.randn(len(lengths), queries, q_heads, d, generator=generator).to(dtype)
    return q, k_cache, v_cache, table, torch.tensor(lengths, dtype=torch.int32), dense


def last_slots(table, lengths, queries, block_size=16):
    """Of the query tokens, as many for each sequence; -1 for those of an empty one."""
    found = [
        int(row[j // block_size]) * block_size + j % block_size if j >= 0 else -1
        for row, length, count in zip(table, lengths, queries, strict=True)
        for j in range(length - count, length)
    ]
    return torch.tensor(found, dtype=torch.int64)
