"""``NVFP4Linear`` on a GPU, and its operators; what needs no GPU runs interpreted."""

import pytest
import torch
from cuda_graph import replayed

from adallm import fp8, nvfp4
from adallm.kernels import choice, layout, ops
from adallm.kernels.norm import add_rms_norm
from adallm.kernels.silu import silu_and_mul
from adallm.kernels.sizes import cdiv
from adallm.linear import FP8Linear, NVFP4Linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = choice.GPU("sm_90", 4, "test")


def tensors(n, k, device="cuda", *, rows=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    t = nvfp4.quantize(torch.randn(n, k, generator=g)).to(device)
    scale = t.global_scale
    if rows:  # three shards of a fused layer
        factor = torch.tensor([1.0, 0.37, 3.1]).repeat_interleave(n // 3)
        scale = scale * torch.cat((factor, factor.new_full((n - len(factor),), 0.011))).to(device)
    return t.packed, t.scale, scale


def error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _forget():
    choice.reload()
    yield
    choice.reload()


@pytest.mark.parametrize("activations", ["bf16", "fp8", "auto"])
@pytest.mark.parametrize("m", [1, 7, 40, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_on_every_row_of_the_table(monkeypatch, activations, m, bias):
    monkeypatch.setattr(choice, "gpu", lambda index: GPU)
    table = {kind: (*(r for r in rows if r.m <= 128), choice.Row(choice.ANY, ())) for kind, rows in TABLES.items()}
    monkeypatch.setitem(choice.TABLES, "sm_90", TABLES if activations == "fp8" else table)
    monkeypatch.setitem(choice.FP8_FROM, "sm_90", 100)
    packed, scale, global_scale = tensors(480, 272, DEVICE, rows=True)
    t = nvfp4.NVFP4Tensor(packed, scale, global_scale)
    p = layout.from_checkpoint(t, fp8=activations == "fp8")
    b = torch.randn(480, device=DEVICE).bfloat16() if bias else None
    x = torch.randn(m, 272, device=DEVICE).bfloat16()
    arrivals = torch.zeros(choice.MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
    y = ops._linear(
        x,
        None,
        p.words,
        p.scales,
        p.row_scale,
        p.shift,
        b,
        arrivals,
        ops.described(activations, global_scale),
        480,
        torch.bfloat16,
    )
    expected = x.double() @ nvfp4.dequantize(t).double().T + (0 if b is None else b.double())
    in_fp8 = activations == "fp8" or (activations == "auto" and m >= 100 and not bias)
    assert error(y, expected) <= (4e-2 if in_fp8 else 2e-3)
    assert not in_fp8 or error(y, expected) > 1e-2
    assert not arrivals.any()


TABLES = choice.TABLES["sm_90"]


def of_each_kind(test):
    """With every kind of activations, few and many tokens, with a bias and without."""
    for name, values in {"activations": ["bf16", "fp8", "auto"], "m": [1, 40, 130], "bias": [False, True]}.items():
        test = pytest.mark.parametrize(name, values)(test)
    return test


def behind(monkeypatch, activations, m, bias):
    """A weight ``[144, 272]``: its values, those of the bias, what the operators are given of it, and whether ``m``
    tokens are multiplied in FP8.
    """
    monkeypatch.setattr(choice, "gpu", lambda index: GPU)
    monkeypatch.setitem(choice.FP8_FROM, "sm_90", 100)
    t = nvfp4.NVFP4Tensor(*tensors(144, 272, DEVICE, rows=True))
    p = layout.from_checkpoint(t, fp8=activations == "fp8")
    b = torch.randn(144, device=DEVICE).bfloat16() if bias else None
    arrivals = torch.zeros(choice.MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
    how = ops.described(activations, t.global_scale)
    rest = (p.words, p.scales, p.row_scale, p.shift, b, arrivals, how, 144, torch.bfloat16)
    in_fp8 = activations == "fp8" or (activations == "auto" and m >= 100 and not bias)
    return nvfp4.dequantize(t).double(), 0 if b is None else b.double(), rest, in_fp8


def draws(m, in_fp8):
    """So many that there are 40 tokens, since the error of E4M3 in one is that of few values and of one scale."""
    return cdiv(40, m) if in_fp8 else 1


def assert_near(found, *, in_fp8):
    """Results and what is expected, of each draw."""
    found = error(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    assert found <= (4e-2 if in_fp8 else 3.5e-3)
    assert not in_fp8 or found > 1e-2


@of_each_kind
def test_the_gated_operator(monkeypatch, activations, m, bias):
    weight, b, rest, in_fp8 = behind(monkeypatch, activations, m, bias)
    launched, found, plain = [], [], []
    monkeypatch.setattr(ops, "silu_and_mul", lambda x: launched.append("silu_and_mul") or silu_and_mul(x))
    for x in torch.randn(draws(m, in_fp8), m, 544, device=DEVICE).bfloat16():
        y = ops._linear_gated(x, *rest)
        product = torch.nn.functional.silu(x[:, :272].double()) * x[:, 272:].double()
        found.append((y.double(), product @ weight.T + b))
        plain.append(ops._linear(silu_and_mul(x), None, *rest).double())
    assert launched == ([] if in_fp8 else ["silu_and_mul"] * len(found))
    assert_near(found, in_fp8=in_fp8)
    # As of the product in BF16, which FP8 activations are not rounded to on their way.
    assert error(torch.cat([y for y, _ in found]), torch.cat(plain)) <= (2e-2 if in_fp8 else 0)
    assert not rest[5].any()
    assert ops._linear_gated(x[:0], *rest).shape == (0, 144)
    for bad, said in ((x[:, :272], r"gate_up is \[\d+, 272\]"), (x.float(), "x is torch.float32 without x_scale")):
        with pytest.raises(ValueError, match=said):
            ops._linear_gated(bad, *rest)


@of_each_kind
def test_the_operator_behind_a_norm(monkeypatch, activations, m, bias):
    weight, b, rest, in_fp8 = behind(monkeypatch, activations, m, bias)
    of_norm = torch.randn(272, device=DEVICE).bfloat16()
    launched, found = [], []
    monkeypatch.setattr(ops, "add_rms_norm", lambda *a, **k: launched.append("norm") or add_rms_norm(*a, **k))
    for x, residual in torch.randn(draws(m, in_fp8), 2, m, 272, device=DEVICE).bfloat16():
        y, total = ops._linear_normed(x, residual, of_norm, 1e-5, *rest)
        added = x.double() + residual.double()
        assert torch.equal(total, added.bfloat16())
        normed = added * torch.rsqrt((added**2).mean(-1, keepdim=True) + 1e-5) * of_norm.double()
        found.append((y.double(), normed @ weight.T + b))
    assert launched == ([] if in_fp8 else ["norm"] * len(found))
    assert_near(found, in_fp8=in_fp8)
    assert not rest[5].any()
    y, total = ops._linear_normed(x[:0], residual[:0], of_norm, 1e-5, *rest)
    assert (y.shape, total.shape) == ((0, 144), (0, 272))
    for bad, said in (((x[:, :256], residual), r"x is \[\d+, 256\]"), ((x, residual[:, :256]), "residual is")):
        with pytest.raises(ValueError, match=said):
            ops._linear_normed(*bad, of_norm, 1e-5, *rest)


def test_how_a_layer_is_described():
    scales = torch.tensor([0.1, 0.1, 0.3, 0.3, 0.3, 0.1])
    mode, alphas, stops = ops._read(ops.described("auto", scales))
    assert (mode, stops) == ("auto", [2, 5, 6])
    assert torch.equal(torch.tensor(alphas), scales[[0, 2, 5]])


def test_the_operator_without_tokens():
    p = layout.from_checkpoint(nvfp4.NVFP4Tensor(*tensors(48, 80, DEVICE)))
    empty = torch.empty(0, 80, device=DEVICE).bfloat16()
    arrivals = torch.zeros(choice.MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
    how = ops.described("bf16", torch.ones(48))
    args = (p.words, p.scales, p.row_scale, p.shift, None, arrivals, how, 48, torch.bfloat16)
    assert ops._linear(empty, None, *args).shape == (0, 48)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("stored is a weight", {"x": torch.zeros(2, 192)}),
        ("stored is a weight", {"x": torch.zeros(80)}),
        ("stored is a weight", {"n": 4800}),
        ("without x_scale", {"x": torch.zeros(2, 80, dtype=torch.float32)}),
        ("without x_scale", {"x": torch.zeros(2, 80, dtype=torch.float8_e4m3fn)}),
        ("with x_scale", {"x_scale": torch.ones(2)}),
        ("stored is a weight", {"x": torch.zeros(2, 80, dtype=torch.float8_e4m3fn), "x_scale": torch.ones(2)}),
        ("x_scale is", {"x": torch.zeros(2, 128, dtype=torch.float8_e4m3fn), "x_scale": torch.ones(3), "fp8": True}),
        ("x_scale is", {"x": torch.zeros(2, 128, dtype=torch.float8_e4m3fn), "x_scale": torch.ones(2), "fp8": False}),
        ("4096 arrivals", {"arrivals": torch.zeros(8, dtype=torch.int32)}),
    ],
)
def test_the_operator_refuses_what_the_kernels_would_misread(match, change):
    p = layout.from_checkpoint(nvfp4.NVFP4Tensor(*tensors(48, 80, "cpu")))
    args = {
        "x": torch.zeros(2, 80).bfloat16(),
        "x_scale": None,
        "words": p.words,
        "arrivals": torch.zeros(choice.MAX_SPLIT_TILES, dtype=torch.int32),
        "n": 48,
        "fp8": False,
    }
    ops._check(**args)
    with pytest.raises(ValueError, match=match):
        ops._check(**{**args, **change})


def on_gpu(n=320, k=1088, *, activations="bf16", bias=False, rows=False, dtype=torch.bfloat16):
    packed, scale, global_scale = tensors(n, k, rows=rows)
    b = torch.randn(n, device="cuda").to(dtype) if bias else None
    layer = NVFP4Linear.from_tensors(packed, scale, global_scale, b, activations=activations)
    weight = nvfp4.dequantize(nvfp4.NVFP4Tensor(packed, scale, global_scale)).double()
    return layer, weight, b


LIMIT = {("bf16", torch.bfloat16): 2e-3, ("bf16", torch.float16): 3e-4, ("fp8", torch.bfloat16): 4e-2}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1088,), (1, 1088), (2, 3, 1088), (33, 1088), (200, 1088), (700, 1088), (5000, 1088)]
)
@pytest.mark.parametrize(("activations", "dtype"), LIMIT)
@pytest.mark.parametrize("bias", [False, True])
def test_against_fp64(shape, activations, dtype, bias):
    layer, weight, b = on_gpu(activations=activations, bias=bias, rows=True, dtype=dtype)
    x = torch.randn(shape, device="cuda").to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], 320)
    assert error(y, x.double() @ weight.T + (0 if b is None else b.double())) <= LIMIT[activations, dtype]
    assert not layer.arrivals.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 80), (2048, 2064), (6144, 4096), (4096, 12288)])
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_shapes(n, k, m):
    layer, weight, _ = on_gpu(n, k)
    x = torch.randn(m, k, device="cuda").bfloat16()
    assert error(layer(x), x.double() @ weight.T) <= (2e-3 if n * m > 4000 else 4e-3)


@pytest.mark.gpu
def test_no_tokens_and_views():
    layer, weight, _ = on_gpu()
    assert layer(torch.empty(0, 1088, device="cuda").bfloat16()).shape == (0, 320)
    wide = torch.randn(6, 3000, device="cuda").bfloat16()
    for x in (wide[:, :1088], wide[:, 1:1089], wide[::2, :1088], torch.randn(1088, 6, device="cuda").bfloat16().t()):
        assert error(layer(x), x.double() @ weight.T) <= 2.5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_compiled_and_in_a_graph_and_deterministic(activations):
    layer, _, _ = on_gpu(activations=activations)
    x = torch.randn(9, 1088, device="cuda").bfloat16()
    y = layer(x)
    assert all(torch.equal(layer(x), y) for _ in range(5))
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), y)
    assert torch.equal(replayed(layer, x), y)


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_the_operators_keep_torchs_rules(activations):
    layer, _, _ = on_gpu(activations=activations)
    x = torch.randn(3, 1088, device="cuda").bfloat16()
    args = (x, None, layer.words, layer.scales, layer.row_scale, layer.shift, None, layer.arrivals)
    torch.library.opcheck(torch.ops.adallm.nvfp4_linear.default, (*args, layer._how, 320, torch.bfloat16))
    torch.library.opcheck(torch.ops.adallm.fp8_tokens.default, (x, None, 1e-6, False, False))


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["bf16", "fp8", "auto"])
@pytest.mark.parametrize("m", [1, 9, 300, 1200])
def test_the_gated_operator_compiled_and_in_a_graph(activations, m):
    layer, weight, _ = on_gpu(activations=activations, rows=True)
    rest = (layer.words, layer.scales, layer.row_scale, layer.shift, None, layer.arrivals, layer._how, 320)

    def run(x):
        return torch.ops.adallm.nvfp4_linear_gated(x, *rest, torch.bfloat16)

    x = torch.randn(m, 2176, device="cuda").bfloat16()
    y = run(x)
    in_fp8 = activations == "fp8" or "FP8" in layer.path(m)
    product = torch.nn.functional.silu(x[:, :1088].double()) * x[:, 1088:].double()
    assert error(y, product @ weight.T) <= (4e-2 if in_fp8 else 3.5e-3)
    assert torch.equal(torch.compile(run, fullgraph=True)(x), y)
    torch.library.opcheck(torch.ops.adallm.nvfp4_linear_gated.default, (x, *rest, torch.bfloat16))
    assert torch.equal(replayed(run, x), y)
    assert not layer.arrivals.any()


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["bf16", "fp8", "auto"])
@pytest.mark.parametrize("m", [1, 9, 300, 1200])
def test_the_operator_behind_a_norm_compiled_and_in_a_graph(activations, m):
    layer, weight, _ = on_gpu(activations=activations, rows=True)
    rest = (layer.words, layer.scales, layer.row_scale, layer.shift, None, layer.arrivals, layer._how, 320)
    of_norm = torch.randn(1088, device="cuda").bfloat16()

    def run(x, residual):
        return torch.ops.adallm.nvfp4_linear_normed(x, residual, of_norm, 1e-6, *rest, torch.bfloat16)

    x, residual = torch.randn(2, m, 1088, device="cuda").bfloat16()
    y, total = run(x, residual)
    in_fp8 = activations == "fp8" or "FP8" in layer.path(m)
    added = x.double() + residual.double()
    assert torch.equal(total, added.bfloat16())
    normed = added * torch.rsqrt((added**2).mean(-1, keepdim=True) + 1e-6) * of_norm.double()
    assert error(y, normed @ weight.T) <= (4e-2 if in_fp8 else 3.5e-3)
    torch.library.opcheck(
        torch.ops.adallm.nvfp4_linear_normed.default, (x, residual, of_norm, 1e-6, *rest, torch.bfloat16)
    )
    for again in (torch.compile(run, fullgraph=True)(x, residual), replayed(run, x, residual)):
        assert all(torch.equal(ours, once) for ours, once in zip(again, (y, total), strict=True))
    assert not layer.arrivals.any()


@pytest.mark.gpu
def test_auto():
    """Few tokens as W4A16, bit for bit; many with the values of W4A8."""
    auto, exact, eight = (on_gpu(activations=activations)[0] for activations in ("auto", "bf16", "fp8"))
    few = torch.randn(5, 1088, device="cuda").bfloat16()
    assert torch.equal(auto(few), exact(few))
    if not fp8_cores():
        pytest.skip("needs FP8 cores")
    many = torch.randn(1100, 1088, device="cuda").bfloat16()
    assert auto.path(1100) == "expand + library, FP8"
    assert error(auto(many), eight(many).double()) <= 3e-3
    assert torch.equal(torch.compile(auto, fullgraph=True)(many), auto(many))
    assert auto.nbytes == exact.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 64, 300])
def test_a_weight_in_fp8(m):
    if not fp8_cores():
        pytest.skip("needs FP8 cores")
    stored = fp8.quantize(torch.randn(1536, 1024), granularity="row")
    bias = torch.randn(1536).bfloat16()
    reference, linear = FP8Linear(stored, bias), FP8Linear(stored, bias).to("cuda")
    x = torch.randn(m, 1024).bfloat16()
    assert error(linear(x.cuda()).cpu(), reference(x).double()) <= 5e-3
    with pytest.raises(ValueError, match=r"float16 .*supported on a GPU: bfloat16"):
        linear(x.cuda().half())


def fp8_cores():
    return torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.gpu
def test_tokens_that_are_fp8_already():
    layer, _, _ = on_gpu(activations="fp8")
    x = torch.randn(2, 5, 1088, device="cuda").bfloat16()
    data, scale = torch.ops.adallm.fp8_tokens(x.view(-1, 1088), None, 1e-6, False, False)
    assert torch.equal(layer(data.view(2, 5, 1088), scale.view(2, 5)), layer(x))
    assert layer(data, scale, dtype=torch.float16).dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_there_and_back_between_devices(activations):
    packed, scale, global_scale = tensors(48, 80, "cpu")
    layer = NVFP4Linear.from_tensors(packed, scale, global_scale, activations=activations)
    x = torch.randn(3, 80).bfloat16()
    before = layer(x)
    layer.to("cuda")
    assert layer.packed is None
    assert error(layer(x.cuda()).cpu(), before.double()) <= (4e-3 if activations == "bf16" else 4e-2)
    assert torch.equal(layer.weight.packed.cpu(), packed)
    layer.cpu()
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.packed, packed)


@pytest.mark.gpu
def test_memory():
    layer, _, _ = on_gpu(4096, 4096)
    assert 8 * layer.nbytes / 4096**2 <= 4.6
    assert layer.scratch_bytes(8192) == 2 * 4096**2
    x = torch.randn(8192, 4096, device="cuda").bfloat16()
    layer(x[:1])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    assert torch.cuda.max_memory_allocated() - before <= layer.scratch_bytes(8192) + y.nbytes + 2**21


@pytest.mark.gpu
def test_bad_arguments_on_a_gpu():
    layer, _, _ = on_gpu()
    eight, _, _ = on_gpu(activations="fp8")
    good = torch.randn(2, 1088, device="cuda").bfloat16()
    data, scale = fp8.to_e4m3(good), torch.ones(2, device="cuda")
    for call, match in (
        (lambda: layer(good.float()), r"x is torch.float32; supported on a GPU: bfloat16, float16"),
        (lambda: layer(good[:, :1087]), r"x is torch.bfloat16 \[2, 1087\] on cuda:0; it must be \[\.\.\., 1088\]"),
        (lambda: layer(good.cpu()), r"on cpu; it must be .* on cuda:0"),
        (lambda: layer(data, scale), r"float8_e4m3fn; that needs a layer with activations='fp8'"),
        (lambda: eight(data), r"x_scale is None; it must be float32 \[2\]"),
        (lambda: eight(data, scale[:1]), r"x_scale is torch.float32 \[1\]; it must be float32 \[2\]"),
        (lambda: eight(data, scale, dtype=torch.float32), r"dtype is torch.float32; supported: bfloat16, float16"),
        (lambda: on_gpu(24, 64), r"the weight is \[24, 64\]; supported on a GPU: .* multiples of 16"),
        (
            lambda: NVFP4Linear.from_tensors(*tensors(16, 16), torch.zeros(16)),
            r"packed, scale, global_scale and bias are on \['cpu', 'cuda:0'\]",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
