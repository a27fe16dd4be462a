"""Latency under a constant load: ``concurrency`` requests are in the engine at any time, one that ends makes room.

=========  ============================================================================================================
``ttft``   seconds from handing a request to the engine to its first token (time to first token)
``itl``    seconds between a request's tokens, behind the first (inter-token latency); of k tokens that come at once,
           k times the k-th part
=========  ============================================================================================================

Lengths are drawn, so that requests do not begin and end together: prompts of a quarter to seven quarters of ``PROMPT``
tokens, half to three halves of ``NEW`` new ones. It is the engine alone, in a process of its own as in a server; there
is no HTTP and no tokenizer.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PROMPT, NEW = 1024, 128  # on average
PERCENTILES = (50, 90, 99)
# Concurrency -> requests that are counted.
REQUESTS = {16: 192, 64: 384}
# "ttft_p50_ms": what, and which percentile.
METRICS = {f"{what}_p{percentile}_ms": (what, percentile) for what in ("ttft", "itl") for percentile in PERCENTILES}


@dataclass(frozen=True)
class Request:
    """Tokens of the prompt, and how many are generated."""

    prompt: list[int]
    new: int


def requests(seed: str, count: int, vocabulary: int, *, prompt: int = PROMPT, new: int = NEW) -> list[Request]:
    """The same for every implementation.

    Args:
        count: of them.
        prompt, new: tokens on average.
    """
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        length = draw.randint(prompt // 4, prompt * 7 // 4)
        found.append(Request(draw.choices(range(vocabulary), k=length), draw.randint(new // 2, new * 3 // 2)))
    return found


def run(
    engine: Any,
    load: Sequence[Request],
    concurrency: int,
    *,
    params: Callable[[int], Any],
    clock: Callable[[], float],
    name: str = "load",
) -> dict[str, list[float]]:
    """Hand all requests to the engine, at most ``concurrency`` at a time, and take its tokens as they come.

    Args:
        engine: ``add_request`` and ``step`` as of ``vllm.LLMEngine``.
        params: from the number of new tokens to the parameters of sampling; outputs may be cumulative.
        name: tells the requests from those of other runs.

    Returns:
        ``ttft``, one for each request, and ``itl``, one for each further token, in seconds.

    Raises:
        RuntimeError: a request with another number of tokens than asked for.
    """
    waiting = list(enumerate(load))[::-1]
    begun: dict[str, float] = {}
    last: dict[str, tuple[float, int]] = {}
    new: dict[str, int] = {}
    found: dict[str, list[float]] = {"ttft": [], "itl": []}
    while waiting or new:
        while waiting and len(new) < concurrency:
            i, request = waiting.pop()
            key = f"{name}-{i}"
            new[key], begun[key] = request.new, clock()
            engine.add_request(key, {"prompt_token_ids": request.prompt}, params(request.new))
        outputs = engine.step()
        now = clock()
        for output in outputs:
            key, tokens = output.request_id, len(output.outputs[0].token_ids)
            if key not in last and tokens:
                found["ttft"].append(now - begun[key])
                # Those beside the first came with it.
                last[key] = (now, tokens)
            elif key in last and (more := tokens - last[key][1]) > 0:
                found["itl"].extend([(now - last[key][0]) / more] * more)
                last[key] = (now, tokens)
            if output.finished:
                if tokens != new[key]:
                    raise RuntimeError(f"a request has {tokens} new tokens, not {new[key]}")
                del new[key]
    return found


def percentile(seconds: Sequence[float], percent: int) -> float:
    """Milliseconds below which ``percent`` of 100 values lie, interpolated."""
    return 1000 * statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]
