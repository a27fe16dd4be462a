"""Scale rules against brute force over all scales and codes, in double precision."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from adallm import fp8, nvfp4, quantizers
from adallm.formats import E2M1_VALUES, E4M3_VALUES, NVFP4_BLOCK

SCALES = torch.tensor(E4M3_VALUES[1:0x7F], dtype=torch.float64)
GRID = torch.tensor(E2M1_VALUES, dtype=torch.float64)
PRODUCTS = SCALES[:, None] * GRID
# What E4M3 makes of them, out of reach of its bounds.
ROUNDED = torch.where(
    PRODUCTS.abs() < 1.0,
    fp8.to_e4m3((PRODUCTS * 2.0**7).float()).double() / 2.0**7,
    fp8.to_e4m3((PRODUCTS / 2.0**3).float()).double() * 2.0**3,
)

_GENERATOR = torch.Generator().manual_seed(0)
randn, rand = (partial(draw, generator=_GENERATOR) for draw in (torch.randn, torch.rand))
BLOCKS = {
    "gaussian": randn(40, 64) * 0.02,
    "laplace": randn(40, 64) * rand(40, 64).log(),
    "heavy-tailed": randn(40, 64) / randn(40, 64).abs().clamp(min=1e-3),
    "sparse": randn(40, 64) * (rand(40, 64) > 0.8),
    "one number": torch.full((2, 64), -0.3),
    "spread over 2^24": randn(40, 64) * torch.exp2(-24 * rand(40, 4)).repeat_interleave(16, -1),
    "on the grid": torch.randint(-12, 13, (40, 64), generator=_GENERATOR) / 2.0,
}


def brute_force(w, g, *, weight=None, products=PRODUCTS):
    """The least error of each block ``[R, K/16]`` over all scales, in units of ``g``."""
    y = (w.double() / g.double()).unflatten(-1, (-1, NVFP4_BLOCK))
    of_scale = []
    for row in products:
        error = (y[..., None] - row).abs().amin(-1).square()
        of_scale.append((error if weight is None else error * weight.double().view(-1, NVFP4_BLOCK)).sum(-1))
    return torch.stack(of_scale).amin(0)


def error_of(t, w, *, weight=None, products=PRODUCTS):
    """That of the codes and scales of ``t``, in units of its global scale."""
    scale = t.scale.view(torch.uint8).long()
    assert int(scale.min()) > 0
    codes = nvfp4.unpack(t.packed).long().unflatten(-1, (-1, NVFP4_BLOCK))
    values = products[scale - 1].gather(-1, codes)
    y = (w.double() / t.global_scale.double()).unflatten(-1, (-1, NVFP4_BLOCK))
    error = (y - values).square()
    return (error if weight is None else error * weight.double().view(-1, NVFP4_BLOCK)).sum(-1)


def assert_least(found, least):
    """As small, but for the rounding of FP32."""
    assert bool((found <= least * (1 + 1e-5) + 1e-11 * least.max()).all()), float((found / least).max())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("factor", [None, 0.3, 1.7, 40.0])
def test_mse_is_the_best_of_all_scales(name, factor):
    """With the rule's global scale, and with one that cuts blocks off or leaves them few scales."""
    w = BLOCKS[name]
    g = None if factor is None else w.abs().max() / 2688 * factor
    t = nvfp4.quantize(w, scale_rule="mse", global_scale=g)
    assert_least(error_of(t, w), brute_force(w, t.global_scale))


@pytest.mark.parametrize("name", BLOCKS)
def test_importance(name):
    w = BLOCKS[name]
    for weight in (torch.rand(64), torch.exp2(-30 * torch.rand(64)), (torch.rand(64) > 0.7).float()):
        t = nvfp4.quantize(w, scale_rule="imatrix", importance=weight)
        assert_least(error_of(t, w, weight=weight), brute_force(w, t.global_scale, weight=weight))
    flat, plain = (
        nvfp4.quantize(w, scale_rule="imatrix", importance=torch.ones(64)),
        nvfp4.quantize(w, scale_rule="mse"),
    )
    assert torch.equal(flat.packed, plain.packed)
    assert torch.equal(flat.scale.view(torch.uint8), plain.scale.view(torch.uint8))


@pytest.mark.parametrize("name", BLOCKS)
def test_products_in_fp8(name):
    w = BLOCKS[name]
    t = nvfp4.quantize(w, scale_rule="mse_fp8")
    assert_least(error_of(t, w, products=ROUNDED), brute_force(w, t.global_scale, products=ROUNDED))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", nvfp4.LAYOUTS)
def test_four_over_six(name, layout):
    w = BLOCKS[name]
    t = nvfp4.quantize(w, scale_rule="four_over_six", layout=layout)
    torch.testing.assert_close(t.global_scale, w.abs().max() / 1536)
    amax = w.abs().unflatten(-1, (-1, NVFP4_BLOCK)).amax(-1)
    six, four = (fp8.to_e4m3(amax / t.global_scale / most).view(torch.uint8).clamp(min=1) for most in (6, 4))
    used = t.scale.view(torch.uint8)
    assert bool(((used == six) | (used == four) | ((amax == 0) & (used == 0x38))).all())
    other = torch.where(used == six, four, six)
    codes = nvfp4.encode_e2m1(
        w / (other.view(torch.float8_e4m3fn).float() * t.global_scale).repeat_interleave(NVFP4_BLOCK, -1)
    )
    rejected = nvfp4.NVFP4Tensor(nvfp4.pack(codes), other.view(torch.float8_e4m3fn), t.global_scale)
    assert bool((error_of(t, w) <= error_of(rejected, w) * (1 + 1e-5)).all())


def test_four_over_six_is_modelopts():
    """Bytes that ModelOpt 0.47 made, which does not fit beside vLLM; how is in the file's metadata."""
    with safe_open(Path(__file__).parent / "data" / "modelopt_four_over_six.safetensors", "pt") as file:
        w, packed, scale, global_scale = map(file.get_tensor, ("weight", "packed", "scale", "global_scale"))
    t = nvfp4.quantize(w, scale_rule="four_over_six")
    assert torch.equal(t.global_scale, global_scale)
    # Of zeros, which have the scale 448 there and 1 here; and of a block whose two errors are the same but for 2e-7.
    zeros, tie = (12, 0), (7, 1)
    other = (t.scale.view(torch.uint8) != scale.view(torch.uint8)).nonzero().tolist()
    assert other == [list(tie), list(zeros)]
    assert not w[12, :16].any()
    codes, theirs = (nvfp4.unpack(p).unflatten(-1, (-1, NVFP4_BLOCK)) for p in (t.packed, packed))
    assert (codes != theirs).any(-1).nonzero().tolist() == [list(tie)]
    step = global_scale.double() * torch.stack([t.scale[tie], scale[tie]]).double()[:, None]
    values = GRID[torch.stack([codes[tie], theirs[tie]]).long()] * step
    ours, modelopts = (w[7, 16:32].double() - values).square().sum(-1).tolist()
    assert ours == pytest.approx(modelopts, rel=1e-6)


@pytest.mark.parametrize("rule", quantizers.SEARCHED)
def test_the_global_scale_is_the_best_that_is_tried(rule):
    products = ROUNDED if rule == "mse_fp8" else PRODUCTS
    for w in (BLOCKS["gaussian"][:8], BLOCKS["heavy-tailed"][:3], torch.randn(2, 32) * 1e-30):
        weight = torch.rand(w.shape[1]) if rule == "imatrix" else None
        g = w.abs().max().double() / 2688
        totals = [
            float(brute_force(w, g * f, weight=weight, products=products).sum() * f**2)
            for f in quantizers.GLOBAL_SCALES
        ]
        t = nvfp4.quantize(w, scale_rule=rule, importance=weight)
        best = min(range(8), key=totals.__getitem__)
        torch.testing.assert_close(t.global_scale, (g * quantizers.GLOBAL_SCALES[best]).float())


def test_tensors_that_share_a_global_scale():
    a, b = torch.randn(6, 64), torch.randn(3, 64) * 0.1
    together = quantizers.best_global_scale([a, b], a.abs().amax(), "mse")
    assert together == nvfp4.quantize(torch.cat([a, b]), scale_rule="mse").global_scale
    assert together != nvfp4.quantize(b, scale_rule="mse").global_scale


@pytest.mark.parametrize("rule", quantizers.RULES)
def test_any_input_that_max_takes(rule):
    """Dtypes, rows with scales of their own, padding, zeros, strides; the same from run to run."""
    weight = (lambda k: torch.linspace(0.5, 1.5, k)) if rule == "imatrix" else (lambda k: None)
    w = torch.randn(5, 40).bfloat16()
    t = nvfp4.quantize(w, scale_rule=rule, pad=True, importance=weight(40))
    assert t.shape == w.shape
    assert (nvfp4.dequantize(t) - w.float()).norm() / w.float().norm() < 0.12
    zeros = torch.randn(3, 4, 48).mul_(torch.tensor([0.0, 1.0, 1.0]).repeat_interleave(16))
    for x in (zeros, zeros.transpose(0, 1), zeros.half()):
        t = nvfp4.quantize(x, scale_rule=rule, importance=weight(48))
        again = nvfp4.quantize(x.contiguous(), scale_rule=rule, importance=weight(48))
        assert torch.equal(t.packed, again.packed)
        assert not nvfp4.dequantize(t)[..., :16].any()
        assert bool((t.scale[..., 0].float() == 1).all())
    rows = torch.tensor([1e-3, 2e-3, 3e-3])
    t = nvfp4.quantize(zeros[:, 0], scale_rule=rule, global_scale=rows, importance=weight(48))
    for i in range(3):
        one = nvfp4.quantize(zeros[i, :1], scale_rule=rule, global_scale=rows[i], importance=weight(48))
        assert torch.equal(t.packed[i : i + 1], one.packed)


@pytest.mark.parametrize("layout", nvfp4.LAYOUTS)
@pytest.mark.parametrize("rule", quantizers.RULES)
def test_no_rule_is_worse_than_max(rule, layout):
    w = BLOCKS["gaussian"]
    weight = torch.ones(64) if rule == "imatrix" else None
    errors = [
        float((nvfp4.dequantize(nvfp4.quantize(w, scale_rule=r, layout=layout, importance=h)) - w).norm())
        for r, h in ((rule, weight), ("max", None))
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize(
    ("rule", "importance", "message"),
    [
        ("imatrix", None, "scale_rule 'imatrix' needs importance"),
        ("mse", torch.ones(32), "scale_rule 'mse' takes no importance"),
        ("imatrix", torch.ones(16), r"importance is torch.float32 \[16\]; it must be floating \[32\]"),
        ("imatrix", torch.ones(32, dtype=torch.int64), "importance is torch.int64"),
        ("imatrix", torch.tensor([1.0, float("nan"), *[1.0] * 30]), r"importance\[1\] is nan"),
        ("imatrix", torch.tensor([1.0] * 31 + [-1.0]), r"importance\[31\] is -1.0; it must be finite and not negative"),
        ("imatrix", torch.zeros(32), "importance is 0 for all columns"),
    ],
)
def test_importance_that_does_not_fit(rule, importance, message):
    with pytest.raises(ValueError, match=message):
        nvfp4.quantize(torch.randn(2, 32), scale_rule=rule, importance=importance)


@pytest.mark.parametrize("rule", quantizers.SEARCHED)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[1.0] * 15 + [float("nan")]]), r"x\[0, 15\] is nan"),
        (torch.zeros(2, 16), "is all zeros: amax is 0"),
        (torch.full((1, 16), 1e-44), "underflows to 0 in FP32"),
    ],
)
def test_weights_that_no_rule_takes(rule, x, message):
    with pytest.raises(ValueError, match=message):
        nvfp4.quantize(x, scale_rule=rule, importance=torch.ones(16) if rule == "imatrix" else None)
