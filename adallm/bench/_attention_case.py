"""One case of the attention benchmark: every implementation checked against FP32, then timed in turn."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adallm.attention import paged_decode_reference, write_kv, write_kv_reference
from adallm.bench import _cases
from adallm.bench._attention_peers import BUILDERS, E4M3, Prepared
from adallm.bench._attention_step import SEED, Inputs, Pool, Step, pool_tokens
from adallm.bench._attention_summary import OURS, WRITE, key_of, named
from adallm.bench._cases import WrongResultError, rel_err
from adallm.bench._timing import REPLAY_US, copies, in_turn, replays

SAMPLE = 4  # sequences that are compared, from the shortest to the longest
LIMIT = 5e-3  # of ours; above it a peer has a note
WRONG = 0.1  # a peer above it is not timed
WRITTEN = (1, 64, 1024, 8192)  # tokens
WRITE_COPIES = 32  # at most: for few tokens the launch counts, not the memory


@dataclasses.dataclass(frozen=True)
class Writes:
    """Steps of ``write_kv``, of ``WRITTEN`` tokens each."""

    q_heads: int
    kv_heads: int
    head_size: int
    block: int

    @property
    def heads(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}/{self.head_size}"


class Measurer:
    """Measures cases; keeps keys and values until steps with other heads come.

    Args:
        planned: what will be asked for, with its implementations.
        repeats: timed replays for each row.
        device, copies, replays: other than the GPU and its timing in tests.
    """

    def __init__(
        self,
        planned: Sequence[tuple[Step | Writes, Sequence[str]]],
        *,
        repeats: int,
        device: str = "cuda",
        copies: Callable[[int], int] = copies,
        replays: Callable[..., Callable[[], float]] = replays,
    ) -> None:
        self.repeats, self.device = repeats, device
        self._copies, self._replays = copies, replays
        self._steps = [(step, impls) for step, impls in planned if isinstance(step, Step)]
        self._pool: Pool | None = None
        if device == "cuda":
            from adallm.bench._attention_compile import compile_all

            begun = time.monotonic()
            count = compile_all(self._steps)
            print(f"compiled {count} kernels ahead in {time.monotonic() - begun:.0f} s", flush=True)

    def bandwidth(self) -> list[dict[str, Any]]:
        """The rows "copy" and "read"."""
        from adallm.bench._bandwidth import bandwidth

        return bandwidth(repeats=self.repeats)

    @torch.no_grad()
    def case(self, what: Step | Writes, impls: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of one case, and what has none: the fields of the case, ``impl``, ``reason``.

        Raises:
            WrongResultError: ours is off by more than ``LIMIT``; nothing of the case is timed then.
        """
        return (self._writes(what), []) if isinstance(what, Writes) else self._step(what, impls)

    def _step(self, step: Step, impls: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        inputs = Inputs.of(step, self._pool_for(step), self._copies(step.nbytes(1)))
        case = {name: getattr(step, name) for name in ("heads", "block", "batch", "context", "ragged", "window")}
        expected = Expected(inputs)
        ready: dict[str, tuple[Prepared, dict[str, Any]]] = {}
        timed: dict[str, list[Callable[[], float]]] = {}
        absent = []

        def gone(impl: str, error: Exception) -> None:
            label = f"{named(key_of(case))} {impl}"
            absent.append(_cases.absent(case | {"impl": impl}, label, error, ours=impl in OURS))

        for impl in impls:
            try:
                prepared = BUILDERS[impl](inputs)
                ready[impl] = prepared, expected.errors(prepared, ours=impl in OURS)
            except Exception as error:
                gone(impl, error)
        for impl, (prepared, _) in ready.items():
            try:
                timed[impl] = [self._replays(prepared.calls, at_least_us=REPLAY_US)]
            except Exception as error:
                gone(impl, error)
        rows = []
        for impl, ((us, spread),) in in_turn(timed, repeats=self.repeats).items():
            prepared, errors = ready[impl]
            figures = {
                "us": round(us, 3),
                "us_spread": round(spread, 3),
                "tb_s": round(step.nbytes(prepared.itemsize) / us / 1e6, 4),
                "tokens_read": step.tokens_read,
                "repeats": self.repeats,
                "path": prepared.path,
            }
            rows.append(case | {"impl": impl} | figures | errors)
        return rows, absent

    def _pool_for(self, step: Step) -> Pool:
        shape = (step.kv_heads, step.head_size)
        if self._pool is None or self._pool.shape != shape:
            self._pool = None
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            same = [other for other, _ in self._steps if (other.kv_heads, other.head_size) == shape] or [step]
            tokens = pool_tokens([(other, self._copies(other.nbytes(1))) for other in same])
            self._pool = Pool(*shape, tokens, self.device)
        return self._pool

    def _writes(self, what: Writes) -> list[dict[str, Any]]:
        rows = []
        for tokens in WRITTEN:
            nbytes = tokens * (2 * what.kv_heads * what.head_size * (2 + 1) + 8)  # k and v, read and written, and slots
            calls = self._write_calls(what, tokens, min(self._copies(nbytes), WRITE_COPIES))
            timed = {WRITE: [self._replays(calls, at_least_us=REPLAY_US)]}
            ((us, spread),) = in_turn(timed, repeats=self.repeats)[WRITE]
            case = {"heads": what.heads, "block": what.block, "tokens": tokens, "impl": WRITE}
            figures = {"us": round(us, 3), "us_spread": round(spread, 3), "tb_s": round(nbytes / us / 1e6, 4)}
            rows.append(case | figures | {"repeats": self.repeats})
        return rows

    def _write_calls(self, what: Writes, tokens: int, count: int) -> list[Callable[[], None]]:
        """Writes of new tokens into caches of their own, to random slots, checked bit for bit."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        blocks = -(-tokens // what.block)
        calls = []
        for _ in range(count):
            k, v = torch.randn(
                2, tokens, what.kv_heads, what.head_size, generator=generator, device=self.device
            ).bfloat16()
            slots = torch.randperm(blocks * what.block, generator=generator, device=self.device)[:tokens]
            shape = (blocks, what.block, what.kv_heads, what.head_size)
            got, expected = ([torch.zeros(shape, device=self.device).to(E4M3) for _ in range(2)] for _ in range(2))
            call = partial(write_kv, k, v, *got, slots)
            call()
            write_kv_reference(k, v, *expected, slots)
            for name, cache, wanted in zip(("k", "v"), got, expected, strict=True):
                if not torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8)):
                    raise WrongResultError(
                        f"{what.heads} block {what.block} {WRITE}: {tokens} tokens leave other bits of {name} than the "
                        "reference"
                    )
            calls.append(call)
        return calls


class Expected:
    """Results in FP32 for a sample of the sequences, of the first copy of the cache and the last."""

    def __init__(self, inputs: Inputs) -> None:
        step = inputs.step
        by_length = sorted(range(step.batch), key=step.lengths.__getitem__)
        at = torch.linspace(0, step.batch - 1, min(step.batch, SAMPLE)).round().int().tolist()
        self._rows = torch.tensor([by_length[i] for i in at], device=inputs.q.device)
        caches = inputs.caches()
        self._of = {i: self._expected(inputs, *caches[i]) for i in {0, len(caches) - 1}}

    def _expected(self, inputs: Inputs, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """A KV head at a time, which takes little memory."""
        step, rows = inputs.step, self._rows
        group = step.q_heads // step.kv_heads
        found = [
            paged_decode_reference(
                inputs.q[rows, h * group : (h + 1) * group],
                k_cache[:, :, h : h + 1],
                v_cache[:, :, h : h + 1],
                inputs.table[rows],
                inputs.seq_lens[rows],
                scale=step.scale,
                window=step.window,
            )
            for h in range(step.kv_heads)
        ]
        return torch.cat(found, 1)

    def errors(self, prepared: Prepared, *, ours: bool) -> dict[str, Any]:
        """``rel_err``, and the note of a peer.

        Every copy runs, so that nothing is compiled or allocated for the first time while a graph records.

        Raises:
            WrongResultError: ours above ``LIMIT``, a peer above ``WRONG``, or NaN.
        """
        pairs = []
        for i, call in enumerate(prepared.calls):
            prepared.out.fill_(torch.nan)
            call()
            if i in self._of:
                pairs.append((prepared.out[self._rows].float(), self._of[i]))
        errors: dict[str, Any] = {"rel_err": rel_err(pairs)}
        if errors["rel_err"] > WRONG:
            raise WrongResultError(f"rel_err is {errors['rel_err']:.3g}")
        _cases.check_errors(errors, {"rel_err": LIMIT}, ours=ours, rounds=prepared.rounds)
        return errors
