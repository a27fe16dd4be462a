"""Time GPU work: CUDA-graph replays over rotating inputs, median and spread."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

import torch

L2_TIMES = 3  # copies of what is read cover the L2 cache this often


def copies(nbytes: int) -> int:
    """How many copies of an input of ``nbytes`` keep the cache from serving it again."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(-(-L2_TIMES * cache // max(nbytes, 1)), 2)


def graph_us(runs: Sequence[Callable[[], object]], *, repeats: int = 15, at_least_us: float = 500.0) -> tuple[float, float]:
    """Median and interquartile range in us of one call, over ``repeats`` replays of a graph that holds many.

    Args:
        runs: the same work on different inputs, called in turn.
        at_least_us: a replay holds as many calls as it takes to last this long, so that gaps between replays are small.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs[:3]:
            run()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for run in runs[:3]:
            run()
        end.record()
        end.synchronize()
        estimate = start.elapsed_time(end) * 1e3 / len(runs[:3])
    calls = max(-(-int(at_least_us / max(estimate, 2.0)) // len(runs)), 1) * len(runs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in itertools.islice(itertools.cycle(runs), calls):
            run()
    times = []
    for i in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) * 1e3 / calls)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return median, high - low
