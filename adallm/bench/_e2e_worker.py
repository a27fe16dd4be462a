"""One implementation of the end-to-end benchmark, in a process of its own: ``python -m adallm.bench._e2e_worker``.

Lines of JSON come on standard input and are answered on standard output, where nothing else is written. The first is
the job: ``model``, a directory, ``options`` of ``vllm.LLM``, and ``expected`` as in ``_e2e_impls``. Its answer has
``start_s``, ``path`` and ``weights_gib``. Each line behind it is a ``Measure``, answered by ``values``. An answer with
``error`` alone says why there is none. The process ends with its input.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from adallm.bench import _e2e_impls, _e2e_load

SEED = 0
EXTENSION = "adallm.bench._e2e_extension.Extension"


@dataclass(frozen=True)
class Measure:
    """What is generated and what is measured.

    Attributes:
        metric: ``"decode_tok_s"``, ``"long_tok_s"``, ``"prefill_tok_s"``, ``"peak_gib"``, or of ``_e2e_load.METRICS``.
        batch: prompts; of a latency, requests at a time.
        prompt, new: tokens of each prompt, and generated for each; of a latency, on average.
        times: how many values; of a latency, requests, of which there is one value.
    """

    metric: str
    batch: int
    prompt: int
    new: int
    times: int


class Engine:
    """vLLM's, with prompts of random tokens.

    Raises:
        RuntimeError: what runs is not what is expected, or logits that are no numbers.
    """

    def __init__(self, job: dict[str, Any], clock: Callable[[], float] = time.perf_counter) -> None:
        import vllm

        self._clock = clock
        begin = clock()
        self._llm = vllm.LLM(job["model"], worker_extension_cls=EXTENSION, **job["options"])
        self.start_s = clock() - begin
        (self.facts,) = self._llm.collective_rpc("adallm_bench_facts")
        if (reason := _e2e_impls.mismatch(job["expected"], self.facts)) is not None:
            raise RuntimeError(reason)
        self._vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        self._loads: dict[int, dict[str, list[float]]] = {}
        self._check()

    def _params(self, new: int, **options: Any) -> Any:
        import vllm

        return vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **options)

    def _prompts(self, name: str, batch: int, length: int) -> list[Any]:
        """The same for every implementation, and others for every ``name``."""
        draw = random.Random(f"{SEED} {name} {batch} {length}")
        return [{"prompt_token_ids": draw.choices(range(self._vocabulary), k=length)} for _ in range(batch)]

    def _check(self) -> None:
        """The first tokens of a few prompts have log-probabilities that are numbers."""
        for output in self._llm.generate(self._prompts("check", 4, 16), self._params(1, logprobs=5), use_tqdm=False):
            found = [entry.logprob for step in output.outputs[0].logprobs for entry in step.values()]
            if not found or not all(map(math.isfinite, found)):
                raise RuntimeError(f"the first token has the log-probabilities {found}")

    def _seconds(self, prompts: Sequence[Any], new: int) -> float:
        """Of a call that generates."""
        params = self._params(new)
        begin = self._clock()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = self._clock() - begin
        counts = {len(output.outputs[0].token_ids) for output in outputs}
        if len(outputs) != len(prompts) or counts != {new}:
            raise RuntimeError(f"{len(outputs)} of {len(prompts)} prompts have {sorted(counts)} new tokens, not {new}")
        return seconds

    def values(self, what: Measure) -> list[float]:
        """As often as asked for, each time with other prompts."""
        if what.metric in _e2e_load.METRICS:
            kind, percent = _e2e_load.METRICS[what.metric]
            return [_e2e_load.percentile(self._load(what)[kind], percent)]
        return [self._value(what, i) for i in range(what.times)]

    def _value(self, what: Measure, turn: int) -> float:
        prompts = self._prompts(f"{what.metric} {turn}", what.batch, what.prompt)
        if what.metric == "decode_tok_s":
            return what.batch * what.new / self._seconds(prompts, what.new)
        if what.metric == "prefill_tok_s":
            return what.batch * what.prompt / self._seconds(prompts, what.new)
        if what.metric == "long_tok_s":
            others = self._prompts(f"{what.metric} {turn} first", what.batch, what.prompt)
            first = self._seconds(others, 1)
            rest = self._seconds(prompts, what.new + 1) - first
            if rest <= 0:
                raise RuntimeError(f"{what.new + 1} tokens took no longer than the first one, {first:.3f} s")
            return what.batch * what.new / rest
        if what.metric == "peak_gib":
            self._llm.collective_rpc("adallm_bench_reset_peak")
            self._seconds(prompts, what.new)
            return self._llm.collective_rpc("adallm_bench_peak_gib")[0]
        supported = ", ".join(("decode_tok_s", "long_tok_s", "prefill_tok_s", "peak_gib", *_e2e_load.METRICS))
        raise ValueError(f"metric {what.metric!r}; supported: {supported}")

    def _load(self, what: Measure) -> dict[str, list[float]]:
        """Latencies of one run, which all percentiles are of; it is made when the first of them is asked for."""
        if what.batch not in self._loads:
            for name, count in (("warm-up", 2 * what.batch), ("load", what.times)):
                seed = f"{SEED} {name} {what.batch}"
                load = _e2e_load.requests(seed, count, self._vocabulary, prompt=what.prompt, new=what.new)
                of = {"params": self._params, "clock": self._clock, "name": f"{name}-{what.batch}"}
                found = _e2e_load.run(self._llm.llm_engine, load, what.batch, **of)
            self._loads[what.batch] = found
        return self._loads[what.batch]


def serve(lines: TextIO, answers: TextIO, make: Callable[[dict[str, Any]], Any] = Engine) -> None:
    """Answer until the input ends, or the engine does not start."""

    def answer(found: Callable[[], dict[str, Any]]) -> bool:
        try:
            content = found()
        except Exception as error:
            content = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(content) + "\n")
        answers.flush()
        return "error" not in content

    engine = None

    def start() -> dict[str, Any]:
        nonlocal engine
        engine = make(json.loads(lines.readline()))
        facts = engine.facts
        return {"start_s": engine.start_s, "path": _e2e_impls.path(facts), "weights_gib": facts["weights_gib"]}

    if answer(start):
        for line in lines:
            answer(lambda line=line: {"values": engine.values(Measure(**json.loads(line)))})


def answers_alone() -> TextIO:
    """Standard output, where vLLM and its processes write too: from now on that goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main() -> int:
    serve(sys.stdin, answers_alone())
    return 0


if __name__ == "__main__":
    sys.exit(main())
