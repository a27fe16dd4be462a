"""Tokens per second, start-up and memory of vLLM on one GPU: our plugin, stock vLLM with NVFP4, and BF16.

A model of the shapes of Qwen3-8B with random weights runs in ``vllm.LLM``, each implementation in a process of its own.
Before anything is timed, the first tokens must have log-probabilities that are numbers, and the kernels that were found
in the engine must be those that the name of the implementation promises; ``path`` has them. An implementation that
fails in this has no rows, and its reason is in ``absent``.

=================  ===================================================================================================
``decode_tok_s``   new tokens a second of a whole call that generates 128 after each of ``batch`` prompts of 32
``long_tok_s``     of one prompt of 8192: the 128 tokens behind the first, by the time of a call that ends with that
``prefill_tok_s``  prompt tokens a second of a call with 8 prompts of 2048 that generates one token for each
``start_s``        until the engine is made, with empty caches: what it compiles is part of it
``weights_gib``    what vLLM counts as the model's memory
``peak_gib``       the most that PyTorch allocates during the call of ``prefill_tok_s``, without the KV cache
``ttft_p50_ms``    and ``p90``, ``p99``: time to first token, with ``batch`` requests at any time (``_e2e_load``)
``itl_p50_ms``     and so on: time between the tokens of a request, in the same run
=================  ===================================================================================================

Prompts are random tokens, never the same twice, the same for all. A value is the median of ``repeats``, ``spread``
their interquartile range. On a machine with several GPUs, several runs with ``--append`` may fill one record at the
same time, each on a GPU of its own: ``card`` is ``CUDA_VISIBLE_DEVICES`` of the run, None if it is not set.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adallm import results
from adallm.bench import _e2e_impls, _e2e_load, _e2e_model, _run
from adallm.bench._e2e_impls import IMPLS
from adallm.bench._e2e_process import Process, WorkerError
from adallm.bench._e2e_record import Record
from adallm.bench._e2e_summary import METRICS, named, report, summary
from adallm.bench._e2e_worker import SEED, Measure
from adallm.bench._timing import WARM_UP, median_and_spread

__all__ = ["BATCHES", "IMPLS", "METRICS", "main", "named", "report", "summary"]

BATCHES = (1, 2, 4, 8, 16, 64)
AT_START = ("start_s", "weights_gib")  # known when the engine is
START_S = 200.0  # of an engine, until one has been started


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.vllm_e2e", description=__doc__.partition("\n")[0])
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS), help="default: all")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="default: all")
    parser.add_argument(
        "--batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES), help="of decode_tok_s; default: all"
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="with a config.json (default: that of Qwen3-8B)")
    parser.add_argument("--layers", type=int, metavar="N", help="leave out all layers but the first N")
    _run.add_options(parser, repeats=5, of="timed calls for each row, after a warm-up")
    options = parser.parse_args(argv)
    _run.check_options(parser, options, least=3)
    for name in ("impls", "metrics", "batches"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    try:
        options.name, options.config = _e2e_model.config(options.model, options.layers)
    except ValueError as error:
        parser.error(f"--model, --layers: {error}")
    longest = options.config.get("max_position_embeddings", 0)
    if longest < _e2e_impls.MAX_LEN:
        parser.error(f"--model: {options.name} has {longest} positions; at least {_e2e_impls.MAX_LEN} are needed")
    return options


def measures(options: argparse.Namespace) -> list[Measure]:
    """Of each implementation, in order."""
    times = options.repeats + WARM_UP
    every = (
        *(Measure(metric, 0, 0, 0, 1) for metric in AT_START),
        Measure("prefill_tok_s", 8, 2048, 1, times),
        *(Measure("decode_tok_s", batch, 32, 128, times) for batch in sorted(options.batches)),
        Measure("long_tok_s", 1, 8192, 128, times),
        Measure("peak_gib", 8, 2048, 1, 1),
        *(
            Measure(metric, concurrency, _e2e_load.PROMPT, _e2e_load.NEW, requests)
            for concurrency, requests in _e2e_load.REQUESTS.items()
            for metric in _e2e_load.METRICS
        ),
    )
    return [measure for measure in every if measure.metric in options.metrics]


def cases(options: argparse.Namespace) -> list[_run.Case]:
    """All measures of each implementation."""
    found = []
    for impl in sorted(options.impls, key=list(IMPLS).index):
        for measure in measures(options):
            batch = measure.batch or None
            key = (options.name, options.config["num_hidden_layers"], impl, measure.metric, batch)
            found.append(_run.Case(key, impl, named(measure.metric, batch), (impl, measure), [impl]))
    return found


class Workers:
    """Measures, one implementation after the other, each in a worker that starts with its first case.

    Args:
        model: name of the model, and ``config`` its ``config.json``.
        folder: for models and logs.
        process: makes a worker.
    """

    def __init__(
        self,
        model: str,
        config: Mapping[str, Any],
        folder: Path,
        *,
        process: Callable[..., Any] = Process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._case = {"model": model, "layers": config["num_hidden_layers"]}
        self._config, self._folder, self._make, self._clock = config, folder, process, clock
        self._longest: float | None = None
        self._impl: str | None = None
        self._process: Any = None
        self._started: dict[str, Any] = {}
        self._failed = ""

    def bandwidth(self) -> list[dict[str, Any]]:
        return []

    def needs(self, case: _run.Case) -> float:
        """Seconds that a start takes, where the case has one: the longest so far."""
        return 0.0 if case.group == self._impl else self._longest or START_S

    def case(self, impl: str, measure: Measure, impls: Sequence[str]) -> tuple[list[dict], list[dict]]:
        """A row, or why there is none."""
        case = {**self._case, "impl": impl, "metric": measure.metric, "batch": measure.batch or None}
        if impl != self._impl:
            self._start(impl)
        if self._process is None:
            return [], [{**case, "reason": self._failed}]
        try:
            if measure.metric in AT_START:
                values = [self._started[measure.metric]]
                if values == [None]:
                    raise WorkerError(f"vLLM did not say {measure.metric}")
            else:
                values = self._process.ask(dataclasses.asdict(measure))["values"]
        except WorkerError as error:
            return [], [{**case, "reason": self._failure(f"{impl} {named(measure.metric, case['batch'])}", error)}]
        value, spread = median_and_spread(values) if len(values) > WARM_UP else (values[0], None)
        row = {
            "prompt": measure.prompt or None,
            "new": measure.new or None,
            "value": float(f"{value:.6g}"),
            "spread": None if spread is None else float(f"{spread:.3g}"),
            "repeats": len(values) - WARM_UP if len(values) > WARM_UP else len(values),
            "path": self._started["path"],
            "card": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
        return [case | row], []

    def _start(self, name: str) -> None:
        self.close()
        impl, begin = IMPLS[name], self._clock()
        model = self._folder / name
        _e2e_model.write(model, self._config, quantized=impl.quantized)
        job = {"model": str(model), "options": _e2e_impls.options(impl), "expected": dict(impl.expected)}
        self._impl = name
        print(f"{name}: starting", flush=True)
        environment = _e2e_impls.environment(impl, os.environ, self._folder / f"{name}-caches")
        self._process = self._make(environment, self._folder / f"{name}.log")
        try:
            self._started = self._process.ask(job)
        except WorkerError as error:
            self._failed = self._failure(name, error)
            print(self._process.tail(), file=sys.stderr, flush=True)
            self._process.close()
            self._process = None
        else:
            self._longest = max(self._clock() - begin, self._longest or 0.0)

    @staticmethod
    def _failure(label: str, error: WorkerError) -> str:
        print(f"{label}: no row, {error}", flush=True)
        return str(error)

    def close(self) -> None:
        """End the worker that runs."""
        if self._process is not None:
            self._process.close()
        self._process, self._impl = None, None


def run(
    options: argparse.Namespace,
    provenance: Mapping[str, Any],
    *,
    started: float,
    process: Callable[..., Any] = Process,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure, print and write, as ``_run.run`` does; the record is written after each implementation."""
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(options.name, options.config, Path(folder), process=process, clock=clock)
        try:
            return _run.run(
                options,
                lambda: Record(provenance, root=options.out, append=options.append),
                cases(options),
                impls=list(IMPLS),
                gpu=provenance["gpu"],
                measurer=lambda planned: workers,
                report=report,
                listed=_listed,
                started=started,
                clock=clock,
                needs=workers.needs,
                told=_told,
            )
        finally:
            workers.close()


def _told(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['value']:g} {METRICS[row['metric']][0]}" for row in rows) or "no row"


def _listed(left: Sequence[_run.Case]) -> str:
    names: dict[str, list[str]] = {}
    for case in left:
        names.setdefault(case.group, []).append(case.name)
    return "; ".join(f"{impl}: {', '.join(of_impl)}" for impl, of_impl in names.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the GPU and write ``results/vllm_e2e/<slug>.json``; 2 and one line where there is no GPU."""
    started = time.monotonic()
    options = parse(argv)
    if not torch.cuda.is_available():
        print("the end-to-end benchmark times vLLM on a GPU, and this machine has no CUDA GPU", file=sys.stderr)
        return 2
    return run(options, results.provenance(seed=SEED), started=started)


if __name__ == "__main__":
    sys.exit(main())
