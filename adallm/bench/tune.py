"""Measure this GPU's own table: the fastest configuration for each layer and number of tokens.

Every configuration that a built-in table names, with each of its splits, and the library's product of the expanded
weight are compared with FP32 first and timed by CUDA graphs over rotating weights. The winners go into the user's cache
directory (``kernels/choice.py``), where they come before the built-in table; ``--forget`` deletes them. ``--record``
writes all times to ``results/tune/<slug>.json``, which is what the built-in tables are made of.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adallm import results
from adallm.bench._timing import copies, graph_us
from adallm.kernels import choice, matmul, ops
from adallm.kernels.choice import GPU, Row
from adallm.kernels.matmul import Config
from adallm.sm89 import build
from adallm.sm89.check import LIMIT, SEED, Operands

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_PROCESSES = 8
QWEN3_8B = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))


def candidates(kind: str, gpu: GPU, m: int, n: int, k: int) -> list[Config | None]:
    """Configurations of all tables that suit ``m`` tokens, with every split, and None for the library."""
    found: list[Config | None] = [None] if m > 256 else []
    for family, table in choice.TABLES.items():
        if family == "sm_90" and gpu.family != "sm_90":
            continue
        suited = (c for row in table.get(kind, ()) for c in row.configs if min(m, 512) // 16 <= c.m <= max(2 * m, 8))
        for config in suited:
            for programs in (1, 2, 3) if config.overlap else (0,):
                found += choice.shared(dataclasses.replace(config, programs=programs), m, n, k, gpu.sms)
    return list(dict.fromkeys(found))


def call(operands: Operands, index: int, config: Config | None, out: torch.Tensor) -> Callable[[], None]:
    """What runs the product with one copy of the weight."""
    p, x_scale = operands.packed[index], operands.x_scale
    if config is None:
        alpha = float(torch.ldexp(p.row_scale[0], p.shift[0].int()))  # the global scale
        whole = {"x_scale": x_scale, "alphas": [alpha], "stops": [p.n]}
        return partial(ops.library, operands.x, p.words, p.scales, p.row_scale, p.shift, out, **whole)
    arrivals = torch.zeros(choice.MAX_SPLIT_TILES, dtype=torch.int32, device=out.device)
    given = {"x_scale": x_scale, "arrivals": arrivals}
    return partial(ops.launcher(config), operands.x, p.words, p.scales, p.row_scale, out, config, **given)


def compile_all(cases: Iterable[tuple[str, Config | None, int]]) -> int:
    """Compile the kernels of (kind, configuration, K), in several processes, which take some memory of the GPU each;
    Triton keeps them on disk. Returns how many.
    """
    different = {}
    for kind, config, k in cases:
        if config is not None:
            config = dataclasses.replace(config, programs=min(config.programs, 1))
            one = dataclasses.replace(config, splits=min(config.splits, 2))
            whole = k % (config.slices * config.k) == 0
            different[kind, one, whole, matmul.promote(config, k) if kind == "fp8" else 0] = kind, config, k
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, _PROCESSES)) as pool:
        pool.map(_compile, different.values(), chunksize=1)
    return len(different)


def _compile(case: tuple[str, Config, int]) -> None:
    kind, config, k = case
    build.warm_up(ops.launcher(config), build.product(kind, config, k))


def timed(
    operands: Operands, configs: Iterable[Config | None], *, repeats: int, time: Callable[..., tuple[float, float]]
) -> list[tuple[Config | None, float, float]]:
    """Each configuration with its time in us and its relative error. One that does not fit the GPU is passed over.

    Raises:
        ValueError: a result that is off by more than ``sm89.check.LIMIT``, or no configuration at all runs.
    """
    m, n = len(operands.x), operands.packed[0].n
    found = []
    for config in configs:
        out = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=operands.x.device)
        calls = [call(operands, i, config, out) for i in range(len(operands.packed))]
        try:
            calls[0]()
        except Exception as error:
            if "out of resource" not in str(error):
                raise
            continue
        if not (error := operands.relative_error(out)) <= LIMIT:
            raise ValueError(
                f"{config or 'expand + library'}: relative error {error:.3g} with M={m} N={n}, above {LIMIT}"
            )
        found.append((config, time(calls, repeats=repeats)[0], error))
    if not found:
        raise ValueError(f"no configuration fits this GPU for M={m} N={n}")
    return found


def shapes_of(directory: Path) -> list[tuple[int, int]]:
    """(N, K) of the fused layers that a Hugging Face ``config.json`` describes: qkv, o, gate_up, down.

    Raises:
        ValueError: no readable config there, or one that lacks the sizes.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
        config = config.get("text_config", config)
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        kv = config.get("num_key_value_heads") or heads
        inner = config["intermediate_size"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: no sizes of a language model ({type(error).__name__}: {error})") from None
    return [((heads + 2 * kv) * head, hidden), (hidden, heads * head), (2 * inner, hidden), (hidden, inner)]


def _shape(value: str) -> tuple[int, int]:
    n, _, k = value.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) % 16 == int(k) % 16 == 0 and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{value!r} is not NxK with multiples of 16, such as 4096x12288")
    return int(n), int(k)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and store; returns 2 where that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, action="append", default=[], help="a directory with a config.json")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[], metavar="NxK", help="default: Qwen3-8B's")
    parser.add_argument("--m", nargs="+", type=int, default=list(TOKENS), help="tokens to measure at")
    parser.add_argument("--kinds", nargs="+", choices=("bf16", "fp8"), help="default: what the GPU has")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="root of the records to write all times to")
    parser.add_argument("--forget", action="store_true", help="delete this GPU's table instead")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("adallm bench tune measures a GPU, and there is none here", file=sys.stderr)
        return 2
    gpu = choice.gpu(torch.cuda.current_device())
    if options.forget:
        choice.cache_file(gpu.slug).unlink(missing_ok=True)
        choice.reload()
        return 0
    shapes = [*options.shapes, *itertools.chain.from_iterable(map(shapes_of, options.model))]
    kinds = options.kinds or [kind for kind in ("bf16", "fp8") if kind in choice.TABLES[gpu.family]]
    table = dict(choice.tuned(gpu.slug))
    products = list(itertools.product(kinds, dict.fromkeys(shapes or QWEN3_8B)))
    tokens = sorted(set(options.m))
    tried = {(kind, m, n, k): candidates(kind, gpu, m, n, k) for kind, (n, k) in products for m in tokens}
    every = [(kind, config, k) for (kind, _, _, k), configs in tried.items() for config in configs]
    print(f"{compile_all(every)} kernels for {len(every)} times", flush=True)
    record = []
    for kind, (n, k) in products:
        operands = Operands.random(kind, max(options.m), n, k, copies=copies)
        rows = []
        for m in tokens:
            found = timed(operands.first(m), tried[kind, m, n, k], repeats=options.repeats, time=graph_us)
            record += [_row(kind, m, n, k, *of_one) for of_one in found]
            config, us, _ = min(found, key=lambda of_one: of_one[1])
            rows.append(Row(m, () if config is None else (config,)))
            print(f"{n}x{k} {kind} M={m}: {us:.1f} us, {config or 'expand + library'}", flush=True)
        table[kind, n, k] = tuple(rows)
        print(f"wrote {choice.write_tuned(gpu.slug, table)}")
    if options.record:
        print(f"wrote {results.write('tune', record, provenance=results.provenance(seed=SEED), root=options.record)}")
    return 0


def _row(kind: str, m: int, n: int, k: int, config: Config | None, us: float, error: float) -> dict[str, Any]:
    """Of the record; without a configuration, the library's."""
    impl, label = ("expand + library", None) if config is None else ("kernel", config.label)
    row = {"kind": kind, "m": m, "n": n, "k": k, "impl": impl, "config": label}
    return row | {"us": round(us, 3), "rel_err": error}


if __name__ == "__main__":
    sys.exit(main())
