"""The sm_89 PTX against the reference, and against the native build, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from adallm import nvfp4
from adallm.kernels import layout, matmul
from adallm.kernels.expand import fp8_values
from adallm.kernels.matmul import Config
from adallm.kernels.quantize import quantize_tokens
from adallm.linear import fp32_product
from adallm.sm89 import driver

LIMIT = 2e-3  # relative error of a product
SEED = 0
_SAMPLE = 512  # rows that are compared, where M is larger
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


# A relative error, and what computes the result for each copy of an input: by the sm_89 PTX, and natively.
Checked = dict[str, tuple[float, Sequence[Callable[[], object]]]]


@dataclass(frozen=True, eq=False)
class Operands:
    """A random product ``[m, k] x [n, k]``, as the kernel takes it and in FP32.

    Attributes:
        kind: ``"bf16"``, ``"fp16"`` or ``"fp8"``.
        x, x_scale: tokens, and their scales where they are E4M3.
        packed: the weight, in one copy or several.
        dense: the values that the kernel multiplies by, FP32 ``[n, k]``.
    """

    kind: str
    x: Tensor
    x_scale: Tensor | None
    packed: list[layout.Packed]
    dense: Tensor

    @classmethod
    def random(
        cls,
        kind: str,
        m: int,
        n: int,
        k: int,
        *,
        copies: Callable[[int], int] = lambda nbytes: 1,
        device: str = "cuda",
    ) -> Operands:
        """Normal values; ``copies`` says how many of a weight of so many bytes."""
        generator = torch.Generator(device).manual_seed(SEED)
        weight = nvfp4.quantize(torch.randn(n, k, generator=generator, device=device).mul_(0.02).bfloat16())
        x = torch.randn(m, k, generator=generator, device=device).to(_DTYPES[kind])
        packed = layout.from_checkpoint(weight, fp8=kind == "fp8")
        dense, x_scale = nvfp4.dequantize(weight), None
        if kind == "fp8":
            x, x_scale = quantize_tokens(x)
            dense = fp8_values(packed)
        more = copies(packed.words.nbytes + packed.scales.nbytes) - 1
        clones = [replace(packed, words=packed.words.clone(), scales=packed.scales.clone()) for _ in range(more)]
        return cls(kind, x, x_scale, [packed, *clones], dense)

    def first(self, m: int) -> Operands:
        """The first ``m`` tokens."""
        return replace(self, x=self.x[:m], x_scale=None if self.x_scale is None else self.x_scale[:m])

    def relative_error(self, out: Tensor) -> float:
        """``|out - x w^T| / |x w^T|``, with the product in FP32, never TF32."""
        m = len(self.x)
        rows = torch.linspace(0, m - 1, min(m, _SAMPLE), device=out.device).round().long()
        # Eight bits have no indexing.
        x = self.x.float()[rows]
        expected = fp32_product(x if self.x_scale is None else x * self.x_scale[rows, None], self.dense)
        return float((out[rows].float() - expected).norm() / expected.norm())


def runs(operands: Operands, config: Config) -> dict[str, tuple[Tensor, list[Callable[[], None]]]]:
    """``"sm_89"`` and ``"native"``: an output full of NaN, and what fills it, for each copy of the weight."""
    m, n = len(operands.x), operands.packed[0].n
    found = {}
    for name, launch in {"sm_89": partial(driver.run, matmul.launch), "native": matmul.launch}.items():
        out = torch.full((m, n), torch.nan, dtype=_DTYPES[operands.kind], device=operands.x.device)
        arrivals = torch.zeros(matmul.blocks(config, m, n), dtype=torch.int32, device=out.device)
        given = {"x_scale": operands.x_scale, "arrivals": arrivals if config.splits > 1 else None}
        calls = [
            partial(launch, operands.x, w.words, w.scales, w.row_scale, out, config, **given) for w in operands.packed
        ]
        found[name] = out, calls
    return found


def checked(operands: Operands, config: Config) -> Checked:
    """``runs`` after one of each, with its relative error in place of the output.

    Raises:
        ValueError: an error above ``LIMIT``.
    """
    found = {}
    for name, (out, calls) in runs(operands, config).items():
        calls[-1]()
        error = operands.relative_error(out)
        if not error <= LIMIT:
            m, n = out.shape
            raise ValueError(
                f"{name} build of {config}, {operands.kind}, M={m} N={n} K={operands.x.shape[1]}: relative error "
                f"{error:.3g}, above {LIMIT}"
            )
        found[name] = error, calls
    return found
