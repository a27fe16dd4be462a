"""Compiled graphs: what becomes ``nvfp4_linear_gated`` or ``_normed``, what does not, and that numbers stay."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cuda_graph import replayed
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import rms_norm, silu

pytest.importorskip("vllm", reason="needs vLLM")
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from vllm.platforms import current_platform

from adallm import nvfp4
from adallm.kernels import ops  # noqa: F401  defines the operators
from adallm.linear import NVFP4Linear
from adallm.vllm_plugin import compat, fuse, layers

pytestmark = pytest.mark.vllm
WIDE, K, N = 32, 64, 48
GATED, PLAIN = torch.ops.adallm.nvfp4_linear_gated.default, torch.ops.adallm.nvfp4_linear.default
EPS = 1e-5


@pytest.fixture(autouse=True)
def _as_before():
    torch._dynamo.reset()
    counters.clear()
    with config.patch(post_grad_fusion_options=dict(config.post_grad_fusion_options), force_disable_caches=True):
        yield
    torch._dynamo.reset()


def operators(ran):
    """On a CPU, where ``words`` is the weight itself ``[K, N]``; what runs is noted, by name and shape."""

    def product(x, words, bias, dtype):
        out = x.float() @ words.float()
        return (out if bias is None else out + bias.float()).to(dtype)

    def linear(x, x_scale, words, scales, row_scale, shift, bias, arrivals, how, n, dtype):
        ran.append(("plain", tuple(x.shape)))
        return product(x, words, bias, dtype)

    def gated(gate_up, words, scales, row_scale, shift, bias, arrivals, how, n, dtype):
        ran.append(("gated", tuple(gate_up.shape)))
        k = gate_up.shape[1] // 2
        x = silu(gate_up[:, :k].float()) * gate_up[:, k:].float()
        return product(x.to(gate_up.dtype), words, bias, dtype)

    def normed(x, residual, weight, eps, words, scales, row_scale, shift, bias, arrivals, how, n, dtype):
        ran.append(("normed", tuple(x.shape)))
        total = x.float() + residual.float()
        y = rms_norm(total, weight.shape, weight.float(), eps)
        return product(y.to(x.dtype), words, bias, dtype), total.to(x.dtype)

    library = torch.library.Library("adallm", "IMPL")
    library.impl("nvfp4_linear_normed", normed, "CPU")
    library.impl("nvfp4_linear", linear, "CPU")
    library.impl("nvfp4_linear_gated", gated, "CPU")
    return library


@pytest.fixture
def calls():
    """What ran."""
    ran = []
    library = operators(ran)
    yield ran
    library._destroy()


class Linear(nn.Module):
    """As ``NVFP4Linear`` calls its operator."""

    def __init__(self, k, n, dtype=torch.bfloat16, bias=False):
        super().__init__()
        self.n = n
        self.register_buffer("words", torch.randn(k, n).div(8).to(dtype))
        self.register_buffer("bias", torch.randn(n).to(dtype) if bias else None)
        self.register_buffer("one", torch.ones(1))
        self.how = torch.zeros(3)

    def forward(self, x, x_scale=None):
        shape = x.shape
        one = self.one
        x = x.reshape(-1, shape[-1])
        out = torch.ops.adallm.nvfp4_linear(
            x, x_scale, self.words, one, one, one, self.bias, one, self.how, self.n, x.dtype
        )
        return out.view(*shape[:-1], self.n)


def in_order(y, down):
    return down(silu(y[..., :K]) * y[..., K:])


class MLP(nn.Module):
    def __init__(self, between=in_order, dtype=torch.bfloat16, k=K, bias=False):
        super().__init__()
        self.gate_up, self.down, self.between = Linear(WIDE, 2 * K, dtype, bias), Linear(k, N, dtype, bias), between

    def forward(self, x):
        return self.between(self.gate_up(x), self.down)


def compiled(model, x, *, dynamic=True):
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.inference_mode():
        return torch.compile(model, fullgraph=True)(x), model(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_gated_mlp(calls, dtype, swapped, bias):
    between = (lambda y, down: down(y[:, K:] * silu(y[:, :K]))) if swapped else in_order
    fuse.use(True)
    got, expected = compiled(MLP(between, dtype, bias=bias), torch.randn(8, WIDE).to(dtype))
    assert calls[:2] == [("plain", (8, WIDE)), ("gated", (8, 2 * K))]
    assert counters["inductor"][fuse.NAME] == 1
    # Not rounded between SiLU and product, as eager is.
    assert float((got.double() - expected.double()).norm() / expected.double().norm()) < 2.0 ** (
        -8 if dtype == torch.bfloat16 else -11
    )


def test_two_layers_one_behind_the_other(calls):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.join, self.second = MLP(), Linear(N, WIDE), MLP()

        def forward(self, x):
            return self.second(x + self.join(self.first(x)))

    fuse.use(True)
    got, expected = compiled(Two(), torch.randn(5, WIDE).bfloat16())
    assert [name for name, _ in calls[:5]] == ["plain", "gated", "plain", "plain", "gated"]
    assert float((got.double() - expected.double()).norm() / expected.double().norm()) < 2**-6


def kept_product(y, down):
    x = silu(y[:, :K]) * y[:, K:]
    return down(x), x


OTHERS = {
    "swapped halves": (lambda y, down: down(silu(y[:, K:]) * y[:, :K]), K),
    "the same half": (lambda y, down: down(silu(y[:, :K]) * y[:, :K]), K),
    "less than a half": (lambda y, down: down(silu(y[:, : K - 16]) * y[:, K - 16 : 2 * K - 32]), K - 16),
    "no halves": (lambda y, down: down(silu(y[:, :K]) * y[:, K // 2 : K // 2 + K]), K),
    "rows": (lambda y, down: down(silu(y[:4, :K]) * y[4:, K:]), K),
    "used twice": (kept_product, K),
    "sigmoid": (lambda y, down: down(torch.sigmoid(y[:, :K]) * y[:, K:]), K),
    "a scale": (lambda y, down: down(silu(y[:, :K]) * y[:, K:], y[:, 0].float()), K),
    "in float32": (lambda y, down: down(silu(y[:, :K].float()).float() * y[:, K:].float()), K),
    "not ours in front": (lambda y, down: in_order(y + 1, down), K),
    "two of them": (lambda y, down: down(silu(y[:, :K]) * (y + 1)[:, K:]), K),
    "something between": (lambda y, down: down((silu(y[:, :K]) * y[:, K:]) * 2), K),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_left_as_it_is(calls, name):
    between, k = OTHERS[name]
    fuse.use(True)
    compiled(MLP(between, k=k), torch.randn(8, WIDE).bfloat16(), dynamic=name != "rows")
    assert calls
    assert {name for name, _ in calls} == {"plain"}


def test_not_asked_for(calls):
    fuse.use(True)
    fuse.use(False)
    compiled(MLP(), torch.randn(8, WIDE).bfloat16())
    assert {name for name, _ in calls} == {"plain"}


def test_views_and_what_is_known_of_the_new_node(calls):
    model = MLP()
    trace = make_fx(
        lambda x: model(x),
        decomposition_table=select_decomp_table(),
        tracing_mode="symbolic",
        _allow_non_fake_inputs=True,
    )
    # As Inductor has it before it removes views.
    made = trace(torch.randn(8, WIDE).bfloat16())
    views = [node for node in made.graph.nodes if node.target in fuse._VIEWS]
    (old,) = [node for node in made.graph.nodes if node.target is PLAIN][1:]
    old.meta["eager_input_vals"] = ()
    x = torch.randn(8, WIDE).bfloat16()
    expected = made(x)
    assert len(views) > 2
    assert fuse._Pass().apply(made.graph) == 1
    made.graph.lint()
    made.recompile()
    (new,) = [node for node in made.graph.nodes if node.target is GATED]
    assert new.args[0].target is PLAIN
    assert new.meta["val"] is old.meta["val"]
    assert "eager_input_vals" not in new.meta
    names = {getattr(node.target, "__name__", "") for node in made.graph.nodes}
    assert not names & {"slice.Tensor", "mul.Tensor", "div.Tensor", "exp.default", "convert_element_type.default"}
    torch.testing.assert_close(made(x), expected, rtol=2**-6, atol=2**-6)
    assert fuse._Pass().apply(made.graph) == 0


def added_and_normed(x, residual, weight, *more):
    """As vLLM's IR has it on a GPU, where its pass in front of ours leaves nothing that is done in place."""
    return torch.ops.vllm_ir.fused_add_rms_norm.default(x, residual, weight, EPS, *more)


class Layer(nn.Module):
    """Of a decoder, without attention."""

    def __init__(self, dtype=torch.bfloat16, of_weight=None, more=(None,)):
        super().__init__()
        self.first, self.more = Linear(WIDE, WIDE, dtype), more
        self.gate_up, self.down = Linear(WIDE, 2 * K, dtype), Linear(K, WIDE, dtype)
        self.last = Linear(WIDE, N, dtype)
        for name in ("norm", "after"):
            self.register_buffer(name, torch.rand(WIDE).add(0.5).to(of_weight or dtype))

    def forward(self, x, residual):
        x, residual = added_and_normed(self.first(x), residual, self.norm, *self.more)
        x = in_order(self.gate_up(x), self.down)
        x, residual = added_and_normed(x, residual, self.after, *self.more)
        return self.last(x), residual


@pytest.mark.parametrize("of_weight", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_and_its_norms(calls, dtype, of_weight):
    x, residual = torch.randn(2, 7, WIDE).to(dtype)
    fuse.use(True)
    with torch.inference_mode():
        model = Layer(dtype, of_weight)
        for one in (x, residual):
            torch._dynamo.mark_dynamic(one, 0)
        got = torch.compile(model, fullgraph=True)(x, residual)
        assert calls == [("plain", (7, WIDE)), ("normed", (7, WIDE)), ("gated", (7, 2 * K)), ("normed", (7, WIDE))]
        assert counters["inductor"][fuse.NAME] == 3
        for ours, expected in zip(got, model(x, residual), strict=True):
            assert ours.dtype == expected.dtype == dtype
            assert float((ours.double() - expected.double()).norm() / expected.double().norm()) < 2.0 ** (
                -7 if dtype == torch.bfloat16 else -10
            )


def kept(x, residual, weight, last):
    y, total = added_and_normed(x, residual, weight)
    return last(y), total, y


def computed(x, residual, weight, last):
    y, total = added_and_normed(x, residual, weight)
    last.bias = total[0].repeat(2)[:N]
    return last(y), total


LEFT = {
    "a part of the row": lambda x, residual, weight, last: last(added_and_normed(x, residual, weight, 16)[0]),
    "no weight": lambda x, residual, weight, last: last(added_and_normed(x, residual, None)[0]),
    "the sum": lambda x, residual, weight, last: last(added_and_normed(x, residual, weight)[1]),
    "used twice": kept,
    "no input of the graph": computed,
    "a scale": lambda x, residual, weight, last: last(added_and_normed(x, residual, weight)[0], x[:, 0].float()),
    "no sum": lambda x, residual, weight, last: last(torch.ops.vllm_ir.rms_norm.default(x, weight, EPS)),
    "something between": lambda x, residual, weight, last: last(added_and_normed(x, residual, weight)[0] * 2),
    "three dimensions": lambda x, residual, weight, last: last(
        added_and_normed(x[None], residual[None], weight)[0].view(-1, WIDE)
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_norms_that_are_left_as_they_are(calls, name):
    last, weight = Linear(WIDE, N), torch.ones(WIDE).bfloat16()
    x, residual = torch.randn(2, 7, WIDE).bfloat16()
    fuse.use(True)
    with torch.inference_mode():
        torch.compile(LEFT[name])(x, residual, weight, last)
    assert [name for name, _ in calls] == ["plain"]


def test_a_norm_whose_sum_nobody_takes(calls):
    last, weight = Linear(WIDE, N), torch.ones(WIDE).bfloat16()
    x, residual = torch.randn(2, 7, WIDE).bfloat16()
    fuse.use(True)
    with torch.inference_mode():
        torch.compile(lambda x, residual: last(added_and_normed(x, residual, weight)[0]))(x, residual)
    assert [name for name, _ in calls] == ["normed"]


def test_three_dimensions_are_not_those_of_vllm(calls):
    model = MLP()
    fuse.use(True)
    with torch.inference_mode():
        torch.compile(model)(torch.randn(2, 3, WIDE).bfloat16())
    assert {name for name, _ in calls} == {"plain"}


def test_the_options():
    config.post_grad_fusion_options = {"decompose_mm_pass": {}}
    fuse.use(True)
    first = dict(config.post_grad_fusion_options)
    fuse.use(True)
    ours = {"version": fuse._VERSION, "norms": True}
    assert config.post_grad_fusion_options == first == {"decompose_mm_pass": {}, fuse.NAME: ours}
    # By which Inductor's caches, and vLLM's, tell graphs with it from those without.
    assert config.save_config_portable()["post_grad_fusion_options"] == first
    assert fuse.used()
    fuse.use(True, norms=False)
    assert config.post_grad_fusion_options[fuse.NAME] == ours | {"norms": False}
    fuse.use(False)
    fuse.use(False)
    assert config.post_grad_fusion_options == {"decompose_mm_pass": {}}
    assert not fuse.used()


@pytest.mark.parametrize(
    ("capability", "settings", "wanted"),
    [
        ((9, 0), {"fuse": True}, True),
        ((8, 9), {"fuse": True, "activations": "fp8"}, True),
        ((9, 0), {}, True),
        ((9, 0), {"fuse": False}, False),
        ((9, 0), {"activations": "bf16"}, True),
        ((8, 6), {}, True),
        (None, {"fuse": True}, False),
    ],
)
def test_when_a_quantization_config_asks_for_it(monkeypatch, capability, settings, wanted):
    monkeypatch.setattr(compat, "capability", lambda: capability)
    engine = types.SimpleNamespace(additional_config={"adallm": settings}, model_config=None)
    monkeypatch.setattr(layers, "get_current_vllm_config_or_none", lambda: engine)
    fuse.use(not wanted)
    ours = layers._Ours()
    ours._prepare()
    ours._prepare()
    assert fuse.used() is wanted


@pytest.mark.parametrize("name", ["fuse_allreduce_rms", "enable_sp", "fuse_act_quant"])
def test_norms_that_a_pass_of_vllm_looks_for(monkeypatch, calls, name):
    monkeypatch.setattr(compat, "capability", lambda: (9, 0))
    passes = types.SimpleNamespace(**{name: True})
    engine = types.SimpleNamespace(
        additional_config={}, model_config=None, compilation_config=types.SimpleNamespace(pass_config=passes)
    )
    monkeypatch.setattr(layers, "get_current_vllm_config_or_none", lambda: engine)
    layers._Ours()._prepare()
    with torch.inference_mode():
        torch.compile(Layer())(*torch.randn(2, 7, WIDE).bfloat16())
    first = "normed" if name == "fuse_act_quant" else "plain"
    assert [name for name, _ in calls] == ["plain", first, "gated", first]


IN_VLLM = """
import json
import torch
from torch.nn import functional
from vllm import ir
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from adallm.vllm_plugin import fuse
from test_fuse import K, N, WIDE, Linear, operators

ran = []
library = operators(ran)
ir.set_default_torch_wrap(True)  # as on a GPU

@support_torch_compile(dynamic_arg_dims={"x": 0, "residual": 0})
class Model(torch.nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        torch.manual_seed(0)
        self.gate_up, self.act, self.down = Linear(WIDE, 2 * K), SiluAndMul(), Linear(K, N)
        self.before, self.after = (RMSNorm(n, dtype=torch.bfloat16) for n in (WIDE, N))

    def forward(self, x: torch.Tensor, residual: torch.Tensor):
        x, residual = self.before(x, residual)
        return self.after(self.down(self.act(self.gate_up(x)))), residual

def run():
    ran.clear()
    config = VllmConfig(
        compilation_config=CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE, backend="inductor", cudagraph_mode=CUDAGraphMode.NONE,
            splitting_ops=[], custom_ops=["none"],
        )
    )
    config.compilation_config.compile_sizes = []
    config.compilation_config.compile_ranges_endpoints = [64]
    config.compilation_config.ir_enable_torch_wrap = True
    with set_current_vllm_config(config), set_forward_context(None, config), torch.inference_mode():
        model = Model(vllm_config=config)
        x, residual = torch.randn(2, 8, WIDE).bfloat16()
        out, _ = model(x.clone(), residual.clone())
        model(x[:3].clone(), residual[:3].clone())
        one = functional.rms_norm((x + residual).float(), [WIDE], eps=1e-6).bfloat16().float()
        one = one @ model.gate_up.words.float()
        one = (functional.silu(one[:, :K]) * one[:, K:]) @ model.down.words.float()
        expected = functional.rms_norm(one, [N], eps=1e-6)
    error = float((out.float() - expected).norm() / expected.norm())
    return [name for name, _ in ran], error, str(config.compilation_config.local_cache_dir)

found = []
for wanted in (False, True, True):
    fuse.use(wanted)
    found.append(run())
print("FOUND " + json.dumps(found))
"""


@pytest.mark.slow
def test_in_vllms_backend_and_its_caches(tmp_path):
    environment = os.environ | {
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run([sys.executable, "-c", IN_VLLM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    (without, *errors), (fused, *more), (again, *last) = json.loads(line[6:])
    assert without == 4 * ["plain"]
    # In front of ours, on a GPU alone, a pass of vLLM leaves no RMSNorm that is done in place.
    assert fused == again == 2 * ["plain" if current_platform.is_cpu() else "normed", "gated"]
    assert max(error for error, _ in (errors, more, last)) < 1e-2
    # What was compiled for one is not found by the other.
    assert errors[1] != more[1] == last[1]


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["bf16", "fp8", "auto"])
@pytest.mark.parametrize("m", [1, 9, 1200])
def test_on_a_gpu(activations, m):
    class OnGPU(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up, self.down = (
                NVFP4Linear(nvfp4.quantize(torch.randn(n, k, device="cuda").div(8)), activations=activations)
                for n, k in ((2176, 512), (320, 1088))
            )

        def forward(self, x):
            y = self.gate_up(x)
            return self.down(silu(y[:, :1088]) * y[:, 1088:])

    model, x = OnGPU(), torch.randn(m, 512, device="cuda").bfloat16()
    fuse.use(True)
    run = torch.compile(model, fullgraph=True)
    got, expected = run(x), model(x).double()
    assert counters["inductor"][fuse.NAME] == 1
    assert float((got.double() - expected).norm() / expected.norm()) < (8e-3 if activations == "bf16" else 3e-2)
    assert torch.equal(replayed(run, x), got)
