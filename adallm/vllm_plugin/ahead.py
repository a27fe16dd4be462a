"""Kernels compiled ahead: in processes of their own, into Triton's cache on disk, while vLLM compiles the model.

Triton compiles a kernel where it is launched first. Of ours that is while CUDA graphs are captured, one size after the
other, so that a first start would take longer by all of them. These processes have no context on the GPU, which vLLM
measures the memory of. What they have not compiled by then, or for other arguments, is compiled as ever.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from adallm.linear import NVFP4Linear
from adallm.paged import BLOCK_SIZES, MAX_QUERIES
from adallm.vllm_plugin import compat

PROCESSES = 8  # at the most
_MANY = 1024  # tokens up to which each number may have a kernel of its own

logger = logging.getLogger("vllm.adallm")


@dataclasses.dataclass(frozen=True)
class Linear:
    """A size of ``NVFP4Linear``, on this rank.

    Attributes:
        gated: it may be given both halves of a gated MLP, by ``fuse.py``.
        normed: it may be given what an RMSNorm is, likewise.
    """

    n: int
    k: int
    activations: str
    bias: bool
    gated: bool = False
    normed: bool = False


@dataclasses.dataclass(frozen=True)
class Attention:
    """Decode attention of a kind of layer, on this rank.

    Attributes:
        fp8: the cache is E4M3.
        queries: query tokens of a sequence in a step.
        width: blocks of a sequence in the block table.
    """

    q_heads: int
    kv_heads: int
    head_size: int
    block: int
    fp8: bool
    queries: int
    width: int
    window: bool
    soft_cap: bool
    sinks: bool


@dataclasses.dataclass(frozen=True)
class Job:
    """What a model launches.

    Attributes:
        capability: of the GPU.
        family, sms, slug: of ``choice.GPU``.
        dtype: ``"bfloat16"`` or ``"float16"``.
        tokens, sequences: of a step, at the most.
    """

    capability: tuple[int, int]
    family: str
    sms: int
    slug: str
    dtype: str
    tokens: int
    sequences: int
    linear: tuple[Linear, ...]
    attention: tuple[Attention, ...]

    @property
    def gpu(self) -> Any:
        from adallm.kernels.choice import GPU

        return GPU(self.family, self.sms, self.slug)


def start(config: Any, linear: Iterable[NVFP4Linear]) -> None:
    """Begin with what the model of an engine launches; on a GPU, and for the first of its ranks.

    Args:
        config: ``VllmConfig``, or None.
    """
    capability = compat.capability()
    if config is None or capability is None or config.parallel_config.rank:
        return
    from adallm.kernels import choice

    gpu = choice.gpu(torch.cuda.current_device())
    scheduler = config.scheduler_config
    job = Job(
        capability,
        gpu.family,
        gpu.sms,
        gpu.slug,
        str(config.model_config.dtype).removeprefix("torch."),
        scheduler.max_num_batched_tokens,
        scheduler.max_num_seqs,
        tuple(dict.fromkeys(_linear(linear, config.model_config.get_hidden_size()))),
        tuple(dict.fromkeys(_attention(config))),
    )
    if run(job) is not None:
        logger.info("adallm: compiles kernels ahead, in processes of their own")


def _linear(linear: Iterable[NVFP4Linear], hidden: int) -> Iterator[Linear]:
    from adallm.vllm_plugin import fuse  # here: it imports much of torch, which the other processes do not need

    linear, norms = list(linear), fuse.norms()
    widths = {x.out_features for x in linear} if fuse.used() else set()
    for x in linear:
        gated, normed = 2 * x.in_features in widths, norms and x.in_features == hidden
        yield Linear(x.out_features, x.in_features, x.activations, x.bias is not None, gated, normed)


def _attention(config: Any) -> Iterator[Attention]:
    block, model = config.cache_config.block_size, config.model_config
    queries = 1 + (getattr(config, "num_speculative_tokens", 0) or 0)
    for layer in config.compilation_config.static_forward_context.values():
        backend, impl = getattr(layer, "attn_backend", None), getattr(layer, "impl", None)
        if backend is None or not backend.__module__.startswith("adallm.") or block not in BLOCK_SIZES:
            continue
        yield Attention(
            impl.num_heads,
            impl.num_kv_heads,
            impl.head_size,
            block,
            impl.kv_cache_dtype.startswith("fp8"),
            queries if queries <= MAX_QUERIES else 1,
            -(-model.max_model_len // block),
            impl.sliding_window[0] >= 0,
            impl.logits_soft_cap > 0,
            impl.sinks is not None,
        )


def run(job: Job) -> subprocess.Popen[str] | None:
    """Compile beside this process, and end with it; None where there is no core to spare."""
    if len(os.sched_getaffinity(0)) < 2:
        return None
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
    process.stdin.flush()
    threading.Thread(target=process.wait, name="adallm-ahead", daemon=True).start()
    return process


class _Driver:
    """In the place of Triton's: a GPU to compile for, which need not be there."""

    def __init__(self, capability: tuple[int, int]) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


Launch = tuple[Callable[..., Any], dict[str, Any]]


def launches(job: Job) -> Iterator[Launch]:
    """Launchers and their arguments, on ``meta`` tensors, each kernel once."""
    from adallm.sm89 import build

    seen = set()
    for part in (
        *(_of_linear(job, size) for size in job.linear),
        *(_of_attention(job, kind) for kind in job.attention),
    ):
        for launch in part:
            if (key := build.noted(*launch)) not in seen:
                seen.add(key)
                yield launch


def _of_linear(job: Job, size: Linear) -> Iterator[Launch]:
    from adallm.kernels import ops
    from adallm.kernels.dequant import VALUE_POWER
    from adallm.kernels.expand import KINDS, expand
    from adallm.kernels.layout import padded
    from adallm.kernels.norm import add_rms_norm
    from adallm.kernels.quantize import quantize_tokens
    from adallm.kernels.silu import silu_and_mul
    from adallm.sm89 import build

    dtype, fp8 = getattr(torch, job.dtype), size.activations == "fp8"
    of_tokens = torch.float8_e4m3fn if fp8 else dtype
    k = padded(1, size.k)[1] if fp8 else size.k
    seen = set()
    for m in _tokens(job.tokens):
        auto = size.activations == "auto" and ops.in_fp8(m, dtype, size.bias, job.gpu)
        config = None if auto else ops.chosen(m, size.n, k, KINDS[of_tokens], dtype, size.bias, job.gpu)
        if (auto, config) in seen:
            continue
        seen.add((auto, config))
        x = build.meta(16, size.k, dtype=dtype)
        gated = {"x": build.meta(16, 2 * size.k, dtype=dtype)}
        normed = {"x": x, "residual": x, "total": x, "weight": build.meta(size.k, dtype=dtype), "eps": 1e-6}
        if fp8 or auto:
            given = {"ordered": auto, "times": VALUE_POWER.value if auto else 1.0}
            yield quantize_tokens, given | {"x": x}
            if size.gated:
                yield quantize_tokens, given | gated | {"gated": True}
            if size.normed:
                yield quantize_tokens, given | normed
        else:
            if size.gated:
                yield silu_and_mul, gated
            if size.normed:
                yield add_rms_norm, normed
        if config is None:
            of_weight = torch.float8_e4m3fn if auto else of_tokens
            yield expand, build.expanded(size.n, k, of_weight, of_16=auto)
            continue
        # A number of programs that a few tiles suffice for; it is no constant of the kernel.
        config = dataclasses.replace(config, programs=min(config.programs, 1))
        given = build.product(KINDS[of_tokens], config, k)
        rows = given["out"].shape[1]
        given |= {"out": given["out"].to(dtype), "arrivals": build.meta(16, dtype=torch.int32)}
        yield ops.launcher(config), given | {"bias": build.meta(rows, dtype=dtype) if size.bias else None}


def _tokens(most: int) -> Iterable[int]:
    yield from range(1, min(most, _MANY) + 1)
    m = 2 * _MANY
    while m <= most:
        yield m
        m *= 2


def _of_attention(job: Job, kind: Attention) -> Iterator[Launch]:
    from adallm.kernels import decode, decode_choice, gather_kv, write_kv
    from adallm.kernels.expand import KINDS
    from adallm.paged import Shape
    from adallm.sm89 import build

    dtype = getattr(torch, job.dtype)
    cache = "fp8" if kind.fp8 else KINDS[dtype]
    one = Shape(1, kind.queries, kind.q_heads, kind.kv_heads, kind.head_size, kind.width, kind.block)
    options = {
        "window": 1024 if kind.window else None,
        "soft_cap": 30.0 if kind.soft_cap else 0.0,
        "sinks": build.meta(kind.q_heads, dtype=torch.float32) if kind.sinks else None,
    }
    batch, batches = 1, {1, job.sequences, *(size for size in (2, decode_choice.FEW + 1) if size <= job.sequences)}
    while (batch := 4 * batch) < job.sequences:
        batches.add(batch)
    for batch in sorted(batches):
        shape = dataclasses.replace(one, batch=batch)
        what = build.NEW_TOKENS if batch <= decode_choice.WRITES_UP_TO else ""
        yield decode.launch, build.attention(shape, cache, what, dtype=dtype, family=job.family) | options
    yield write_kv.launch, build.written(one, cache, dtype=dtype)
    yield gather_kv.launch, build.gathered(one, cache, dtype=dtype)


def read(line: str) -> Job:
    """A job from the JSON of its fields."""
    fields = json.loads(line)
    fields["capability"] = tuple(fields["capability"])
    fields["linear"] = tuple(Linear(**entry) for entry in fields["linear"])
    fields["attention"] = tuple(Attention(**entry) for entry in fields["attention"])
    return Job(**fields)


def _end_with(stream: Any) -> None:
    stream.read()
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Of a job on standard input, whose end is the end of this process and of those that it has started."""
    job = read(sys.stdin.readline())
    from triton.runtime import driver

    driver.set_active(_Driver(job.capability))
    waiting = list(launches(job))
    processes = min(PROCESSES, len(os.sched_getaffinity(0)) // 2, len(waiting))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    for index in [*range(len(waiting)), *[None] * processes]:
        queue.put(index)
    workers = [context.Process(target=_work, args=(job, waiting, queue)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    for worker in workers:
        worker.join()
    return 0


def _work(job: Job, waiting: list[Launch], queue: Any) -> None:
    from adallm.sm89 import build

    for index in iter(queue.get, None):
        try:
            build.warm_up(*waiting[index], early=job.family == "sm_90")
        except Exception as error:
            print(
                f"adallm: {waiting[index][0].__module__} was not compiled ahead: {error}", file=sys.stderr, flush=True
            )


if __name__ == "__main__":
    sys.exit(main())
