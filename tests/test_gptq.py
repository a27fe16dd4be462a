"""``gptq.py``: against the best update of the columns that are left, solved anew for each in double precision."""

import pytest
import torch

from adallm import gptq, nvfp4, quantizers
from adallm.formats import E2M1_VALUES

GRID = torch.tensor(E2M1_VALUES, dtype=torch.float64)


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated, some columns much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (mixed / columns**0.5)
    return x * torch.exp2(3 * torch.rand(columns, generator=generator, dtype=torch.float64))


def weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


def global_scale(w: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    return quantizers.best_global_scale([w], w.abs().amax(), "imatrix", moments.diagonal().float())


def one_by_one(w: torch.Tensor, moments: torch.Tensor, scale: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Codes: each column in turn is rounded, and those that are left are what then costs least."""
    step = (scale.double() * g.double()).repeat_interleave(16, -1)
    h = moments + gptq.DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    w, codes = w.double().clone(), torch.zeros(w.shape, dtype=torch.int64)
    left = moments.diagonal().argsort(descending=True, stable=True).tolist()
    while left:
        column, *left = left
        value = w[:, column] / step[:, column]
        codes[:, column] = (value[:, None] - GRID).abs().argmin(-1)
        error = w[:, column] - GRID[codes[:, column]] * step[:, column]
        # d/dw of the cost is 0: H_ff (change of those left) = H_fc (error of the column).
        if left:
            w[:, left] += torch.linalg.solve(h[left][:, left], h[left][:, [column]] * error).T
    return codes


@pytest.mark.parametrize("columns", [32, 160])
def test_columns_that_are_left_make_up_for_the_error(columns):
    w, x = weights(12, columns), inputs(500, columns)
    moments = x.T @ x
    g = global_scale(w, moments)
    t = gptq.quantize(w, moments, global_scale=g)
    plain = nvfp4.quantize(w, scale_rule="imatrix", importance=moments.diagonal().float(), global_scale=g)
    assert torch.equal(t.scale.view(torch.uint8), plain.scale.view(torch.uint8))
    assert torch.equal(nvfp4.unpack(t.packed).long() % 8, one_by_one(w, moments, t.scale, g) % 8)

    def cost(t: nvfp4.NVFP4Tensor) -> float:
        return float(((nvfp4.dequantize(t).double() - w.double()) @ x.T).square().sum())

    assert cost(t) < 0.7 * cost(plain)


def test_without_correlation_it_rounds_to_the_nearest():
    w = weights(8, 64)
    moments = 3 * torch.eye(64, dtype=torch.float64)
    t = gptq.quantize(w, moments, global_scale=global_scale(w, moments))
    assert torch.equal(t.packed, nvfp4.quantize(w, scale_rule="mse").packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layouts_and_dtypes(dtype):
    w, x = weights(8, 64).to(dtype), inputs(200, 64)
    moments = x.T @ x
    g = global_scale(w, moments)
    before = moments.clone()
    found = [gptq.quantize(w, moments, global_scale=g, layout=layout) for layout in nvfp4.LAYOUTS]
    assert torch.equal(moments, before)
    assert [t.divisor is None for t in found] == [True, False]
    for t in found:
        assert float((nvfp4.dequantize(t) - w.float()).norm() / w.float().norm()) < 0.2
    again = gptq.quantize(w, moments, global_scale=g)
    assert torch.equal(again.packed, found[0].packed)


def test_a_column_without_input_is_rounded():
    w, x = weights(4, 32), inputs(100, 32)
    x[:, 5] = 0
    t = gptq.quantize(w, x.T @ x, global_scale=w.abs().amax() / 2688)
    assert bool(torch.isfinite(nvfp4.dequantize(t)).all())


@pytest.mark.parametrize(
    ("moments", "options", "message"),
    [
        (torch.eye(16), {}, r"moments are \[16, 16\] for a weight of \[4, 32\]"),
        (torch.zeros(32, 32), {}, "importance is 0 for all columns"),
        (torch.ones(32, 32), {"damping": 0.0}, "second moments of its inputs are singular"),
        (torch.full((32, 32), torch.nan), {}, r"importance\[0\] is nan"),
    ],
)
def test_what_cannot_be_quantized(moments, options, message):
    w = weights(4, 32)
    with pytest.raises(ValueError, match=message):
        gptq.quantize(w, moments, global_scale=w.abs().amax() / 2688, **options)
