"""What the memory of a GPU gives: bytes a second of a copy, and of reading alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adallm.bench._timing import graph_us

NBYTES = 512 << 20
# Elements of a block, loads of a program, warps. The fastest counts: it stands for what the memory can do.
READS = ((1024, 4, 4), (2048, 4, 8), (1024, 8, 4), (2048, 8, 8))


@triton.jit
def block_sums(x, out, BLOCK: tl.constexpr, LOADS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * LOADS)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for i in tl.static_range(LOADS):
        total += tl.load(x + first + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


def read_sums(x: Tensor, out: Tensor, config: tuple[int, int, int]) -> None:
    """``out[i]`` = sum of the i-th ``block * loads`` elements of int32 ``x``, whose size they divide."""
    block, loads, warps = config
    block_sums[(x.numel() // (block * loads),)](x, out, BLOCK=block, LOADS=loads, num_warps=warps)


def bandwidth(*, repeats: int, nbytes: int = NBYTES) -> list[dict[str, Any]]:
    """Two rows: ``impl`` "copy", whose ``tb_s`` counts bytes read and bytes written, and "read".

    Raises:
        ValueError: a copy or a sum that is wrong.
    """
    inputs = [torch.randint(0, 8, (nbytes // 4,), dtype=torch.int32, device="cuda") for _ in range(2)]
    copied = torch.empty_like(inputs[0])
    copied.copy_(inputs[0])
    if not torch.equal(copied, inputs[0]):
        raise ValueError("a copy on the GPU differs from what was copied")
    torch.cuda.synchronize()
    rows = [_row("copy", 2 * nbytes, [lambda x=x: copied.copy_(x) for x in inputs], repeats)]

    reads = []
    for config in READS:
        out = torch.empty(inputs[0].numel() // (config[0] * config[1]), dtype=torch.int32, device="cuda")
        read_sums(inputs[0], out, config)
        if int(out.sum()) != int(inputs[0].sum()):
            raise ValueError(f"the read kernel {config} sums to {int(out.sum())}, not {int(inputs[0].sum())}")
        runs = [lambda x=x, out=out, config=config: read_sums(x, out, config) for x in inputs]
        reads.append(_row("read", nbytes, runs, repeats))
    return [*rows, max(reads, key=lambda row: row["tb_s"])]


def _row(impl: str, nbytes: int, runs: list[Callable[[], object]], repeats: int) -> dict[str, Any]:
    us, spread = graph_us(runs, repeats=repeats)
    return {
        "impl": impl,
        "bytes": nbytes,
        "us": round(us, 2),
        "us_spread": round(spread, 2),
        "tb_s": round(nbytes / us / 1e6, 4),
        "repeats": repeats,
    }
