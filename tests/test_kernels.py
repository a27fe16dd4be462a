"""The kernels against arithmetic in FP64: interpreted on a CPU, compiled on a GPU."""

import dataclasses
import itertools

import pytest
import torch

from adallm import fp8, nvfp4
from adallm.kernels import layout, matmul
from adallm.kernels.expand import expand, fp8_values
from adallm.kernels.matmul import Config, launch
from adallm.kernels.norm import add_rms_norm
from adallm.kernels.ops import launcher
from adallm.kernels.quantize import quantize_tokens
from adallm.kernels.silu import silu_and_mul

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if CUDA else "cpu"
ORDER = torch.tensor(layout.FP8_COLUMNS)

# Sliced and tiled, one split and several, one tile of K and two.
CONFIGS = [
    Config(16, 8, 64, 2, 1, 2, 2),
    Config(32, 8, 128, 4, 1, 4, 3),
    Config(64, 16, 64, 1, 1, 4, 3),
    Config(64, 32, 128, 1, 3, 4, 2),
    Config(128, 16, 64, 1, 2, 4, 3),
]
# With one tile of 16 x 64 a warp, the compiler orders the registers of FP8 weights as ``check_registers`` must refuse.
CONFIGS_8 = [dataclasses.replace(c, k=128) if c.n * c.k == 64 * 64 else c for c in CONFIGS if c.slices == 1]
# Odd M, N and K that no tile divides, one token, less than a tile.
SHAPES = [(1, 16, 16), (3, 48, 80), (17, 80, 208), (33, 144, 528)]


def packed(n, k, *, integers=False, fp8=False):
    """A weight, for FP8 or 16-bit products; with ``integers`` its values, and so all sums below 2^24, are exact."""
    if integers:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scale = torch.full((n, k // 16), 2.0).to(torch.float8_e4m3fn)
        t = nvfp4.NVFP4Tensor(nvfp4.pack(codes), scale, torch.tensor(1.0))
    else:
        t = nvfp4.quantize(torch.randn(n, k) * torch.exp2(torch.randint(-4, 5, (n, 1)).float()))
    t = t.to(DEVICE)
    return t, layout.from_checkpoint(t, fp8=fp8)


def run(x, p, config, *, x_scale=None, bias=None, dtype=None):
    m, n = x.shape[0], p.n
    out = torch.full((m, n), float("nan"), dtype=dtype or x.dtype, device=DEVICE)
    arrivals = torch.zeros(matmul.blocks(config, m, n), dtype=torch.int32, device=DEVICE)
    launcher(config)(x, p.words, p.scales, p.row_scale, out, config, x_scale=x_scale, bias=bias, arrivals=arrivals)
    assert not arrivals.any()
    return out


def error(out, expected):
    return float((out.double() - expected).norm() / expected.norm())


def fp8_weight(p):
    """The E4M3 weight of W4A8, its columns in their own order, FP64."""
    values = fp8_values(p)
    plain = torch.empty_like(values).view(p.n, -1, 64)
    plain[..., ORDER.to(DEVICE)] = values.view(p.n, -1, 64)
    return plain.view(p.n, -1)[:, : p.k].double()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_w4a16_bit_for_bit_where_sums_are_exact(config, shape, dtype):
    m, n, k = shape
    t, p = packed(n, k, integers=True)
    x = torch.randint(-4, 5, (m, k), device=DEVICE).to(dtype)
    bias = torch.randint(-8, 9, (n,), device=DEVICE).to(dtype)
    expected = x.double() @ nvfp4.dequantize(t).double().T + bias.double()
    assert torch.equal(run(x, p, config, bias=bias), expected.to(dtype))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_w4a16_is_rounded_once(config, dtype):
    t, p = packed(80, 208)
    x = torch.randn(9, 208, device=DEVICE).to(dtype)
    expected = x.double() @ nvfp4.dequantize(t).double().T
    assert error(run(x, p, config), expected) <= (2e-3 if dtype == torch.bfloat16 else 3e-4)


@pytest.mark.parametrize("config", CONFIGS_8, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_w4a8_against_the_same_operands(config, dtype):
    t, p = packed(80, 208, fp8=True)
    x = torch.randn(17, 208, device=DEVICE).to(dtype)
    data, scale = quantize_tokens(x)
    out = run(data, p, config, x_scale=scale, dtype=dtype)
    operands = fp8.quantize(x.float(), granularity="token")
    values = fp8.dequantize(operands).double()
    assert error(out, values @ fp8_weight(p).T) <= 2e-3
    assert error(out, x.double() @ nvfp4.dequantize(t).double().T) <= 4e-2


@pytest.mark.gpu
@pytest.mark.parametrize("k", [2048, 4096, 25600])
@pytest.mark.parametrize(
    "config",
    [Config(64, 64, 128, 1, 1, 4, 3), Config(64, 64, 256, 1, 3, 4, 3), Config(128, 256, 128, 1, 1, 8, 3)],
    ids=str,
)
def test_w4a8_of_long_sums(k, config):
    """Sums stay in the FP8 tensor core for ``PROMOTE_COLUMNS`` only."""
    _, p = packed(256, k, fp8=True)
    x = torch.randn(256, k, device=DEVICE, dtype=torch.bfloat16)
    data, scale = quantize_tokens(x)
    values = fp8.dequantize(fp8.quantize(x, granularity="token")).double()
    out = run(data, p, config, x_scale=scale, dtype=torch.bfloat16)
    assert error(out, values @ fp8_weight(p).T) <= 2e-3


OVERLAPPING = [
    Config(64, 16, 64, 1, 1, 4, 4, True),
    Config(64, 64, 128, 1, 2, 4, 4, True),
    Config(128, 128, 64, 1, 4, 8, 4, True),
    Config(128, 256, 64, 1, 1, 8, 4, True),
    Config(64, 16, 64, 1, 1, 4, 4, True, 3),
    Config(128, 128, 64, 1, 1, 8, 4, True, 4),
    Config(64, 256, 128, 1, 1, 4, 3, True, 2),
]


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("config", OVERLAPPING, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 512), (3, 80, 768), (300, 336, 1280), (129, 512, 4096)])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8"])
def test_overlapping_products(config, m, n, k, kind):
    t, p = packed(n, k, fp8=kind == "fp8")
    x = torch.randn(m, k, device=DEVICE).to(torch.float16 if kind == "fp16" else torch.bfloat16)
    scale, expected = None, x.double() @ nvfp4.dequantize(t).double().T
    data = x
    if kind == "fp8":
        data, scale = quantize_tokens(x)
        expected = fp8.dequantize(fp8.quantize(x, granularity="token")).double() @ fp8_weight(p).T
    bias = torch.randn(n, device=DEVICE).to(x.dtype)
    first = run(data, p, config, x_scale=scale, bias=bias, dtype=x.dtype)
    assert error(first, expected + bias.double()) <= (2e-3 if n * m > 4000 else 4e-3)
    assert all(torch.equal(run(data, p, config, x_scale=scale, bias=bias, dtype=x.dtype), first) for _ in range(5))


def test_promotion_is_by_the_columns_of_a_split():
    assert matmul.promote(Config(64, 64, 128, 1, 1, 4, 3), 2048) == 0
    assert matmul.promote(Config(64, 64, 128, 1, 1, 4, 3), 2064) == 16
    assert matmul.promote(Config(64, 64, 256, 1, 1, 4, 3), 4096) == 8
    assert matmul.promote(Config(64, 64, 256, 1, 2, 4, 3), 4096) == 0


def test_infinity_and_nan_reach_their_token_only():
    _, p = packed(48, 80)
    x = torch.randn(4, 80, device=DEVICE).bfloat16()
    clean = run(x, p, CONFIGS[0])
    x[1, 3] = float("nan")
    x[2, 5] = float("inf")
    out = run(x, p, CONFIGS[0])
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 3]], clean[[0, 3]])


def test_strided_input_and_output():
    t, p = packed(48, 80)
    x = torch.randn(5, 160, device=DEVICE).bfloat16()[:, :80]
    wide = torch.full((5, 96), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    launch(x, p.words, p.scales, p.row_scale, wide[:, :48], CONFIGS[0])
    assert error(wide[:, :48], x.double() @ nvfp4.dequantize(t).double().T) <= 3e-3
    assert wide[:, 48:].isnan().all()


@pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 80), (80, 208), (144, 528)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_expansion_is_exact(n, k, dtype):
    t, p = packed(n, k)
    unscaled = nvfp4.NVFP4Tensor(t.packed, t.scale, torch.ones((), device=DEVICE))
    assert torch.equal(expand(p.words, p.scales, p.shift, n, k, dtype).float(), nvfp4.dequantize(unscaled))


def every_product(fp8=False):
    """All codes times all scales: 16 rows, 126 blocks; the largest scale leaves the others unshifted."""
    scale = torch.arange(126, 0, -1, dtype=torch.uint8).repeat(16, 1)
    bytes_ = torch.tensor([i | (i ^ 9) << 4 for i in range(16)], dtype=torch.uint8)
    packed_ = torch.stack([bytes_.roll(r)[:8].repeat(126) for r in range(16)])
    t = nvfp4.NVFP4Tensor(packed_, scale.contiguous().view(torch.float8_e4m3fn), torch.tensor(1.0)).to(DEVICE)
    return t, layout.from_checkpoint(t, fp8=fp8)


def test_expansion_of_every_product_of_a_code_and_a_scale():
    t, p = every_product()
    exact = nvfp4.dequantize(t)
    assert torch.equal(expand(p.words, p.scales, p.shift, p.n, p.k, torch.bfloat16).float(), exact)
    assert torch.equal(expand(p.words, p.scales, p.shift, p.n, p.k, torch.float16).float(), exact)
    _, p = every_product(fp8=True)
    k = layout.padded(p.n, p.k)[1]
    eight = expand(p.words, p.scales, p.shift, p.n, k, torch.float8_e4m3fn).float()
    expected = torch.nn.functional.pad(fp8.to_e4m3(exact / 2**7).float(), (0, k - p.k))
    assert torch.equal(eight, expected.view(p.n, -1, 64)[..., ORDER.to(DEVICE)].reshape(p.n, k))


@pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 80), (144, 528)])
def test_e4m3_of_words_for_16_bit_products(n, k):
    """The same values as of words for FP8 products, in the order of the columns."""
    t, p = packed(n, k)
    eight = layout.from_checkpoint(t, fp8=True)
    expected = expand(eight.words, eight.scales, eight.shift, n, layout.padded(n, k)[1], torch.float8_e4m3fn).float()
    expected = expected.view(n, -1, 64)[..., ORDER.argsort().to(DEVICE)].reshape(n, -1)[:, :k]
    found = expand(p.words, p.scales, p.shift, n, k, torch.float8_e4m3fn, of_16=True)
    assert torch.equal(found.float(), expected)


def test_what_w4a8_rounds_and_by_how_much():
    """Exact for mantissas 1, 1.25 and 1.5; magnitudes 1.5, 3 and 6 of the others round, by 4.8% at most."""
    t, p = every_product(fp8=True)
    exact, rounded = nvfp4.dequantize(t).double(), fp8_weight(p)
    normal = exact.abs() >= 2.0**7 * 2.0**-6
    relative = ((rounded - exact).abs() / exact.abs()).nan_to_num()
    mantissa = (t.scale.view(torch.uint8) & 7).repeat_interleave(16, 1)
    magnitude = nvfp4.unpack(t.packed) & 7
    inexact = torch.isin(magnitude, torch.tensor([3, 5, 7], device=DEVICE)) & ~torch.isin(
        mantissa, torch.tensor([0, 2, 4], device=DEVICE)
    )
    assert bool((relative[normal & ~inexact] == 0).all())
    assert bool((relative[normal & inexact] > 0).all())
    assert float(relative[normal].max()) <= 0.048
    assert float((rounded - exact).abs()[~normal].max()) <= 2.0**7 * 2.0**-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(1, 16), (3, 48), (5, 208), (2, 4096), (2, 4112), (2, 9216), (2, 32784)])
def test_tokens_are_those_of_the_reference(dtype, m, k):
    x = torch.randn(m, 2 * k, device=DEVICE).to(dtype)[:, :k]
    x[0] = 0
    data, scale = quantize_tokens(x, ordered=True)
    expected = fp8.quantize(x, granularity="token")
    assert torch.equal(scale, expected.scale.flatten())
    assert torch.equal(data.float(), expected.data.float())
    same, larger = quantize_tokens(x, ordered=True, times=128.0)
    assert torch.equal(same.float(), data.float())
    assert torch.equal(larger, 128 * scale)
    in_order = quantize_tokens(x)[0].float().view(m, -1, 64)
    plain = torch.nn.functional.pad(data.float(), (0, -k % 64)).view(m, -1, 64)
    assert torch.equal(in_order, plain[..., ORDER.to(DEVICE)])


@pytest.mark.parametrize(("m", "k"), [(3, 48), (2, 4112), (2, 32784)])
def test_tokens_fused_with_rms_norm_and_with_silu(m, k):
    x, weight = torch.randn(m, k, device=DEVICE).bfloat16(), torch.randn(k, device=DEVICE).bfloat16()
    y = x.double() * torch.rsqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    gated = torch.randn(m, 2 * k, device=DEVICE).bfloat16()
    z = torch.nn.functional.silu(gated[:, :k].double()) * gated[:, k:].double()
    residual, total = gated[:, :k], torch.empty_like(x)
    added = x.double() + residual.double()
    of_sum = added * torch.rsqrt((added**2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    options = {"weight": weight, "eps": 1e-5, "residual": residual, "total": total}
    for got, expected in (
        (quantize_tokens(x, **options, ordered=True), of_sum),
        (quantize_tokens(x, weight=weight, eps=1e-5, ordered=True), y),
        (quantize_tokens(gated, gated=True, ordered=True), z),
    ):
        data, scale = got
        torch.testing.assert_close(scale.double(), expected.abs().amax(-1) / 448, rtol=1e-6, atol=0)
        steps = expected / scale.double()[:, None]
        # Half a step of E4M3, and a little for a value that FP32 puts on the other side of a midpoint.
        assert bool(((data.double() - steps).abs() <= steps.abs() * (2**-4 + 1e-5) + 2**-10).all())
        assert error(data.double() * scale.double()[:, None], expected) <= 4e-2
    assert torch.equal(total, added.bfloat16())
    other, of_float = torch.empty_like(x), weight.float()
    again = quantize_tokens(x, **options | {"residual": residual.t().contiguous().t(), "total": other}, ordered=True)
    assert torch.equal(other, total)
    assert torch.equal(again[0].view(torch.uint8), quantize_tokens(x, **options, ordered=True)[0].view(torch.uint8))
    assert torch.equal(quantize_tokens(x, **options | {"weight": of_float})[1], quantize_tokens(x, **options)[1])


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 21)])
@pytest.mark.parametrize(("m", "k"), [(1, 16), (3, 48), (2, 1008), (2, 1024), (5, 2064), (1, 3)])
def test_silu_and_mul(dtype, bits, m, k):
    wide = torch.randn(m, 2 * k + 5, device=DEVICE).mul(4).to(dtype)
    for x in (wide[:, : 2 * k], wide[:, 1 : 2 * k + 1], wide[:, : 2 * k].contiguous(), wide[:, : 2 * k].t()[:].t()):
        y = silu_and_mul(x)
        assert (y.shape, y.dtype) == ((m, k), dtype)
        expected = torch.nn.functional.silu(x[:, :k].double()) * x[:, k:].double()
        # Rounded once: half a unit in the last place, and a little for FP32 before it.
        torch.testing.assert_close(y.double(), expected, rtol=2.0**-bits * 1.01, atol=2.0**-24)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 20)])
@pytest.mark.parametrize(("m", "k"), [(1, 16), (3, 48), (2, 4096), (2, 5120), (1, 16400), (1, 3)])
def test_add_rms_norm(dtype, bits, m, k):
    wide = torch.randn(m, 2 * k + 5, device=DEVICE).mul(4).to(dtype)
    of_float = torch.randn(k, device=DEVICE)
    a, b = wide[:, 1 : k + 1], wide[:, k + 1 : 2 * k + 1]
    for x, residual, weight in (
        (a, b, of_float.to(dtype)),
        (a.contiguous(), b.contiguous(), of_float.to(dtype)),
        (a.t().contiguous().t(), b.t().contiguous().t(), of_float),
    ):
        total = torch.full_like(x.contiguous(), float("nan"))
        y = add_rms_norm(x, residual=residual, total=total, weight=weight, eps=1e-3)
        assert (y.shape, y.dtype) == ((m, k), dtype)
        added = x.double() + residual.double()
        expected = added * torch.rsqrt((added**2).mean(-1, keepdim=True) + 1e-3) * weight.double()
        # Rounded once: half a unit in the last place, and a little for FP32 before it.
        torch.testing.assert_close(y.double(), expected, rtol=2.0**-bits * 1.01, atol=2.0**-22)
        torch.testing.assert_close(total, (x.float() + residual.float()).to(dtype), rtol=0, atol=0)


def test_add_rms_norm_of_what_does_not_fit():
    x, weight = torch.randn(2, 16, device=DEVICE).bfloat16(), torch.ones(16, device=DEVICE)
    fits = {"residual": x, "total": torch.empty_like(x), "weight": weight, "eps": 1e-6}
    assert add_rms_norm(x[:0], **fits | {"residual": x[:0], "total": x[:0]}).shape == (0, 16)
    for match, y, changed in (
        ("x is", x[0], {}),
        ("x is", x.double(), {}),
        ("weight is", x, {"weight": weight[:8]}),
        ("weight is", x, {"weight": torch.ones(32, device=DEVICE)[::2]}),
        ("weight is", x, {"weight": weight.double()}),
        ("residual is", x, {"residual": x[:1]}),
        ("residual is", x, {"residual": x.float()}),
        ("total is", x, {"total": x[:, :8]}),
        ("contiguous total", x, {"total": torch.empty(16, 2, device=DEVICE).bfloat16().t()}),
    ):
        with pytest.raises(ValueError, match=match):
            add_rms_norm(y, **fits | changed)
        if y.dim() == 2 and y.dtype == torch.bfloat16:
            with pytest.raises(ValueError, match=match):
                quantize_tokens(y, **fits | changed)
    for match, options in (
        ("contiguous total", {"weight": weight, "residual": x}),
        ("which has a weight", {"residual": x, "total": x}),
        ("which has a weight", {"total": x}),
        ("and no gate", {"weight": weight, "gated": True}),
        ("and no gate", {"total": x, "gated": True}),
    ):
        with pytest.raises(ValueError, match=match):
            quantize_tokens(torch.cat((x, x), 1) if "gated" in options else x, **options)


def test_silu_and_mul_of_what_is_no_number_and_of_no_tokens():
    x = torch.tensor([[float("nan"), float("inf"), -200.0, 0.0] + [2.0] * 4], device=DEVICE).bfloat16()
    y = silu_and_mul(x)[0]
    assert y[0].isnan()
    assert y[1] == float("inf")
    assert y[2:].tolist() == [0, 0]
    assert silu_and_mul(x[:0]).shape == (0, 4)
    for bad in (x[0], x[:, :7], x.double(), x[:, :0]):
        with pytest.raises(ValueError, match=r"it must be bfloat16, float16 or float32 \[M, 2 K\]"):
            silu_and_mul(bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_of_every_size_and_where_values_round(dtype):
    exponents = torch.tensor([-140, -126, -100, -68, -60, -52, 0, 52, 60, 68, 100, 119], device=DEVICE)
    if dtype == torch.bfloat16 and not CUDA:  # of which the interpreter has no subnormal values
        exponents = exponents.clamp(min=-100)
    # Multiples of steps and of halves of them, with the largest value of E4M3 in each row.
    halves = torch.randint(-511, 512, (12, 512)) / torch.exp2(torch.randint(10, (12, 512)))
    x = torch.cat([torch.randn(12, 256).mul(100), halves, torch.full((12, 16), 448.0)], 1).clamp(-448, 448)
    x = torch.ldexp(x.double().to(DEVICE), exponents[:, None]).to(dtype)
    data, scale = quantize_tokens(x, ordered=True)
    expected = fp8.quantize(x, granularity="token")
    assert torch.equal(scale, expected.scale.flatten())
    assert torch.equal(data.float(), expected.data.float())
    x[3, 7] = float("inf")
    data = quantize_tokens(x, ordered=True)[0].float()
    assert data[3, 7].isnan()
    assert not data[3, :7].any()
    assert torch.equal(data[[2, 4]], expected.data.float()[[2, 4]])


def test_tokens_with_nan_and_without_any():
    x = torch.randn(3, 64, device=DEVICE).bfloat16()
    x[1, 7] = float("nan")
    data, scale = quantize_tokens(x, ordered=True)
    assert (data[1].float() * scale[1]).isnan().any()
    assert not (data[[0, 2]].float()).isnan().any()
    assert [t.shape for t in quantize_tokens(x[:0])] == [(0, 64), (0,)]


def test_results_do_not_change_from_run_to_run():
    _, p = packed(144, 528)
    x = torch.randn(33, 528, device=DEVICE).bfloat16()
    for config in CONFIGS:
        first = run(x, p, config)
        assert all(torch.equal(run(x, p, config), first) for _ in range(3 if CUDA else 1))


def test_registers_in_another_order_are_noticed():
    from adallm.kernels.dequant import check_registers

    bases = "[0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0, 0]"
    line = 'tt.elementwise_inline_asm "" {packed_element = 8 : i32} %a : tensor<2xi32, #b> -> tensor<2x2xbf16, #linear>'
    check_registers(f"#linear = #ttg.linear<{{register = [{bases}, [1]], lane = []}}>\n{line}\n")
    swapped = ", ".join(reversed(bases.split("], ["))).join(("[", "]"))
    for text in (f"#linear = #ttg.linear<{{register = [{swapped}], lane = []}}>\n{line}", "no such operation"):
        with pytest.raises(RuntimeError, match=r"lays out the registers .* supported: Triton 3\.6 and 3\.7"):
            check_registers(text)
    good = f"#linear = #ttg.linear<{{register = [{bases}], lane = []}}>\n{line}\n"
    check_registers(good + "warp_group_dot_wait %acc {pendings = 0 : i32}")
    with pytest.raises(RuntimeError, match="run while its weights are overwritten"):
        check_registers(good + "warp_group_dot_wait %acc {pendings = 3 : i32}")


def test_blocks_cover_the_output():
    for (m, n, _), config in itertools.product(SHAPES, CONFIGS):
        count = matmul.blocks(config, m, n)
        assert count * config.m * config.n >= m * n
        assert (count - 1) * config.m * config.n < (m + config.m) * (n + config.n)


@pytest.mark.parametrize(
    ("match", "x", "options"),
    [
        ("x is", (4, 24), {}),
        ("x is", (4, 16), {"gated": True}),
        ("x is", (2, 4, 16), {}),
        ("weight is", (4, 32), {"weight": torch.ones(16, device=DEVICE)}),
        ("weight is", (4, 32), {"weight": torch.ones(64, device=DEVICE)[::2]}),
        ("weight, residual or total is", (4, 32), {"weight": torch.ones(16, device=DEVICE), "gated": True}),
    ],
)
def test_tokens_that_the_kernel_would_misread(match, x, options):
    with pytest.raises(ValueError, match=match):
        quantize_tokens(torch.ones(*x, device=DEVICE), **options)


def test_tokens_of_another_dtype():
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        quantize_tokens(torch.ones(4, 32, dtype=torch.float64, device=DEVICE))
