"""The sm_89 PTX of decode attention against the reference, beside the native build, on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from adallm.bench import _timing
from adallm.bench._attention_case import Expected
from adallm.bench._attention_peers import Prepared
from adallm.bench._attention_step import Inputs, Pool, Step, pool_tokens
from adallm.kernels import choice, decode, decode_choice
from adallm.sm89 import driver
from adallm.sm89.cases import DecodeCase
from adallm.sm89.check import Checked


def checked(
    found: Sequence[DecodeCase], *, device: str = "cuda", copies: Callable[[int], int] | None = None
) -> Iterator[tuple[DecodeCase, Checked]]:
    """Each case with ``"sm_89"`` and ``"native"``: the relative error, and what computes it for each copy of the cache.

    Args:
        device, copies: other than the GPU and ``_timing.copies`` in tests.

    Raises:
        WrongResultError: one is off by more than ``_attention_case.LIMIT``.
    """
    copies = copies or _timing.copies
    for _, group in itertools.groupby(found, key=lambda case: case.heads):
        steps = {case: _step(case) for case in group}
        counts = {case: copies(step.nbytes(1)) for case, step in steps.items()}
        of = next(iter(steps.values()))
        pool = Pool(of.kv_heads, of.head_size, pool_tokens([(steps[case], counts[case]) for case in steps]), device)
        for case, step in steps.items():
            inputs = Inputs.of(step, pool, counts[case])
            expected, both = Expected(inputs), {}
            for name, launch in {"sm_89": partial(driver.run, decode.launch), "native": decode.launch}.items():
                prepared = _prepared(case, inputs, launch)
                both[name] = expected.errors(prepared, ours=True)["rel_err"], prepared.calls
            yield case, both


def _step(case: DecodeCase) -> Step:
    shape = case.step.shape
    return Step(shape.q_heads, shape.kv_heads, shape.head_size, shape.block_size, shape.batch, case.step.context)


def _prepared(case: DecodeCase, inputs: Inputs, launch: Callable[..., None]) -> Prepared:
    """With the configuration of an Ada card, on as many SMs as are here."""
    shape, q = case.step.shape, inputs.q
    programs = decode_choice.programs(shape, 1, choice.GPU("sm_89", choice.gpu(q.device.index).sms, ""))
    out = torch.empty_like(q)
    given = {
        "programs": programs,
        "partial": torch.empty(decode_choice.workspace_floats(shape, programs), device=q.device),
        "arrivals": torch.zeros(3 * programs, dtype=torch.int32, device=q.device),
        "scale": inputs.step.scale,
    }
    q, whole = shape.whole(q), shape.whole(out)
    calls = [
        partial(launch, q, k, v, inputs.table, inputs.seq_lens, whole, shape, case.counts.config, **given)
        for k, v in inputs.caches()
    ]
    return Prepared(calls, out)
