"""One case of the linear benchmark, a shape and M: every implementation checked against FP32, then timed in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adallm import nvfp4
from adallm.bench import _cases
from adallm.bench._cases import WrongResultError, rel_err
from adallm.bench._linear_summary import OURS
from adallm.bench._peers import NVFP4_BITS, PEERS, Copies, Prepared, Weight
from adallm.bench._timing import REPLAY_US, copies, in_turn, replays
from adallm.linear import NVFP4Linear, fp32_product

SEED = 0
SAMPLE = 512  # rows that are compared, where M is larger
OUTLIERS = 8  # input channels that are 8 times the others
LIMITS = {"adallm-w4a16": 2e-3, "adallm-w4a8": 4e-2}
OPERANDS_LIMIT = 2e-3  # of W4A8, against the same FP8 values
PEER_LIMIT = 1e-2


class Measurer:
    """Measures cases; keeps the copies of a shape's weight until the next shape.

    Args:
        ms: every M that will be asked for.
        repeats: timed replays for each row.
        device, copies, replays: other than the GPU and its timing in tests.
    """

    def __init__(
        self,
        ms: Sequence[int],
        *,
        repeats: int,
        device: str = "cuda",
        copies: Copies = copies,
        replays: Callable[..., Callable[[], float]] = replays,
    ) -> None:
        self.ms, self.repeats, self.device = list(ms), repeats, device
        self._copies, self._replays = copies, replays
        self._shape: str | None = None

    def bandwidth(self) -> list[dict[str, Any]]:
        """The rows "copy" and "read"."""
        from adallm.bench._bandwidth import bandwidth

        return bandwidth(repeats=self.repeats)

    @torch.no_grad()
    def case(
        self, shape: str, n: int, k: int, m: int, impls: Sequence[str]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of one case, and what has none: ``shape``, ``m``, ``impl``, ``reason``.

        Raises:
            WrongResultError: ours is off by more than its limit; nothing of the case is timed then.
        """
        if shape != self._shape:
            self._load(shape, n, k)
        x = self._x[:m]
        ready, absent = {}, []
        for impl in impls:
            try:
                prepared = self._prepare(impl)
                given = prepared.given(x)
                ready[impl] = (prepared, given, self._errors(impl, prepared, given, x))
            except Exception as error:
                absent.append(self._absent(impl, m, error))
        timed: dict[str, list[Callable[[], float]]] = {}
        for impl, (prepared, given, _) in ready.items():
            inputs = [given] if prepared.quantized is None else [given, prepared.quantized(x)]
            try:
                timed[impl] = [
                    self._replays([partial(call, *x_) for call in prepared.calls], at_least_us=REPLAY_US)
                    for x_ in inputs
                ]
            except Exception as error:
                absent.append(self._absent(impl, m, error))
        rows = []
        for impl, times in in_turn(timed, repeats=self.repeats).items():
            prepared, given, errors = ready[impl]
            case = {"shape": shape, "n": n, "k": k, "m": m, "impl": impl}
            figures = _figures(case, *times[0], self.repeats, prepared, given)
            if len(times) > 1:
                figures["us_fp8_input"] = round(times[1][0], 3)
            rows.append(case | figures | errors)
        return rows, absent

    def _load(self, shape: str, n: int, k: int) -> None:
        self._shape, self._weight, self._x, self._operand = None, None, None, None
        self._built: dict[str, Prepared | Exception] = {}
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        generator = torch.Generator(self.device).manual_seed(SEED)
        random = partial(torch.randn, generator=generator, device=self.device)
        w = nvfp4.quantize(random(n, k).mul_(0.02).bfloat16())
        self._weight = Weight(w, nvfp4.dequantize(w))
        self._x = random(max(self.ms), k)
        self._x[:, torch.randperm(k, generator=generator, device=self.device)[:OUTLIERS]] *= 8
        self._x = self._x.bfloat16()
        self._shape = shape

    def _prepare(self, impl: str) -> Prepared:
        if impl not in self._built:
            build = PEERS.get(impl) or partial(ours, activations="fp8" if impl == "adallm-w4a8" else "bf16")
            try:
                self._built[impl] = build(self._weight, self.ms, self._copies)
            except Exception as error:
                if impl in OURS:
                    raise
                # Its frames would keep the copies that were made before it on the GPU.
                self._built[impl] = error.with_traceback(None)
        built = self._built[impl]
        if isinstance(built, Exception):
            raise built
        return built

    def _errors(self, impl: str, prepared: Prepared, given: tuple[Tensor, ...], x: Tensor) -> dict[str, Any]:
        """``rel_err`` of the first and the last copy, the larger, and what belongs to it.

        Every copy runs, so that nothing is compiled or allocated for the first time while a graph records.
        """
        m, n = x.shape[0], self._weight.n
        rows = torch.linspace(0, m - 1, min(m, SAMPLE), device=x.device).round().long()
        outputs = []
        for i, call in enumerate(prepared.calls):
            out = call(*given)
            if out.shape != (m, n) or out.dtype != torch.bfloat16:
                raise WrongResultError(f"the output is {out.dtype} {list(out.shape)}, not bfloat16 {[m, n]}")
            if i in (0, len(prepared.calls) - 1):
                outputs.append(out[rows].float())
        expected = fp32_product(x[rows].float(), self._weight.dense)
        errors = {"rel_err": rel_err((out, expected) for out in outputs)}
        limits = {"rel_err": LIMITS.get(impl, PEER_LIMIT)}
        if impl == "adallm-w4a8":
            if self._operand is None:
                self._operand = fp8_weight(self._weight.nvfp4)
            expected = fp32_product(fp8_tokens(x[rows]), self._operand)
            errors["rel_err_operands"] = rel_err((out, expected) for out in outputs)
            limits["rel_err_operands"] = OPERANDS_LIMIT
        _cases.check_errors(errors, limits, ours=impl in OURS, rounds=prepared.rounds)
        if x.is_cuda:
            torch.cuda.synchronize()
        return errors

    def _absent(self, impl: str, m: int, error: Exception) -> dict[str, Any]:
        case = {"shape": self._shape, "m": m, "impl": impl}
        return _cases.absent(case, f"{self._shape} M={m} {impl}", error, ours=impl in OURS)


def ours(weight: Weight, ms: Sequence[int], copies: Copies, *, activations: str) -> Prepared:
    """``NVFP4Linear``, through its public interface; with FP8 activations it quantizes x in each call."""
    t = weight.nvfp4
    layers = [
        NVFP4Linear.from_tensors(t.packed.clone(), t.scale.clone(), t.global_scale.clone(), activations=activations)
        for _ in range(copies(t.nbytes))
    ]
    quantized = None
    if activations == "fp8" and t.packed.is_cuda:
        from adallm.kernels.quantize import quantize_tokens as quantized
    return Prepared(
        layers,
        t.nbytes,
        NVFP4_BITS,
        activation_quant="included" if activations == "fp8" else None,
        quantized=quantized,
        path=layers[0].path,
    )


def fp8_weight(t: nvfp4.NVFP4Tensor) -> Tensor:
    """The values ``[n, k]`` in FP32 that W4A8 multiplies by, columns in ``FP8_COLUMNS`` order."""
    from adallm.kernels import layout
    from adallm.kernels.expand import fp8_values

    return fp8_values(layout.from_checkpoint(t, fp8=True))


def fp8_tokens(x: Tensor) -> Tensor:
    """``x`` rounded to E4M3 with a scale for each token, in FP32, columns in ``FP8_COLUMNS`` order."""
    from adallm.kernels.quantize import quantize_tokens

    data, scale = quantize_tokens(x)
    return data.float() * scale[:, None]


def _figures(
    case: Mapping[str, Any], us: float, spread: float, repeats: int, prepared: Prepared, given: Sequence[Tensor]
) -> dict[str, Any]:
    m, n, k = case["m"], case["n"], case["k"]
    nbytes = prepared.nbytes + sum(tensor.nbytes for tensor in given) + m * n * 2
    return {
        "us": round(us, 3),
        "us_spread": round(spread, 3),
        "gb_s": round(nbytes / us / 1e3, 2),
        "tflop_s": round(2 * m * n * k / us / 1e6, 3),
        "weight_bits": prepared.bits,
        "repeats": repeats,
        "path": prepared.path(m),
        "activation_quant": prepared.activation_quant,
    }
