"""Time GPU work: CUDA-graph replays over rotating inputs, median and spread."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

WARM_UP = 2  # replays that do not count
L2_TIMES = 3  # copies of what is read cover the L2 cache this often
REPLAY_US = 2000  # of one graph, so that its launch, some us, is nothing beside it


def copies(nbytes: int) -> int:
    """How many copies of an input of ``nbytes`` keep the cache from serving it again."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(-(-L2_TIMES * cache // max(nbytes, 1)), 2)


def graph_us(
    runs: Sequence[Callable[[], object]], *, repeats: int = 15, at_least_us: float = 500.0
) -> tuple[float, float]:
    """Median and interquartile range in us of one call, over ``repeats`` of ``replays``."""
    one = replays(runs, at_least_us=at_least_us)
    return median_and_spread([one() for _ in range(repeats + WARM_UP)])


def in_turn(
    timed: Mapping[str, Sequence[Callable[[], float]]], *, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """``median_and_spread`` of each, one replay of each before the next of any: the clock of a GPU that has become hot
    is the same for all.
    """
    rounds = [{name: [one() for one in ones] for name, ones in timed.items()} for _ in range(repeats + WARM_UP)]
    return {name: [median_and_spread(of) for of in zip(*(r[name] for r in rounds), strict=True)] for name in timed}


def median_and_spread(times: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range, the first ``WARM_UP`` left out."""
    low, median, high = statistics.quantiles(times[WARM_UP:], n=4, method="inclusive")
    return median, high - low


def replays(runs: Sequence[Callable[[], object]], *, at_least_us: float) -> Callable[[], float]:
    """What replays a graph of many calls once, and returns the time of one call in us.

    Args:
        runs: the same work on different inputs, called in turn.
        at_least_us: a replay holds as many calls as it takes to last this long, so that gaps between replays are small.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be filling the inputs
    with torch.cuda.stream(stream):
        for run in runs[:3]:
            run()
    torch.cuda.synchronize()
    # Timed as a graph too: launched from Python, a short kernel would seem longer than it is.
    first = _graph(runs[:8])
    estimate = statistics.median(_replay_us(first) for _ in range(3)) / len(runs[:8])
    turns = max(-(-int(at_least_us / max(estimate, 1.0)) // len(runs)), 1)
    graph = _graph(list(itertools.chain.from_iterable(itertools.repeat(runs, turns))))
    # What is returned keeps ``runs``: a graph does not keep the inputs that it reads.
    return lambda: _replay_us(graph) / (turns * len(runs))


def _graph(runs: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
