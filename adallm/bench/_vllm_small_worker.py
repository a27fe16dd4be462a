"""Greedy text from a model in vLLM, in a process of its own: ``python -m adallm.bench._vllm_small_worker``.

A line of JSON on standard input is answered by one on standard output, where nothing else is written. The request has
``model``, a directory, ``prompts``, ``new``, the tokens generated behind each, and ``options`` of ``vllm.LLM``. The
answer has ``texts``, ``tok_s``, new tokens a second of a call behind a first one, and ``path``; or ``error`` alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from adallm.bench import _e2e_impls
from adallm.bench._e2e_worker import EXTENSION, answers_alone


def generate(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    import vllm

    llm = vllm.LLM(request["model"], worker_extension_cls=EXTENSION, **request["options"])
    params = vllm.SamplingParams(temperature=0, max_tokens=request["new"], ignore_eos=True)
    prompts = list(request["prompts"])
    llm.generate(prompts, vllm.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)  # warm-up
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    (facts,) = llm.collective_rpc("adallm_bench_facts")
    return {
        "texts": [output.outputs[0].text for output in outputs],
        "tok_s": tokens / seconds,
        "path": _e2e_impls.path(facts),
    }


def main() -> int:
    answers = answers_alone()
    try:
        answer = generate(json.loads(sys.stdin.readline()))
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
