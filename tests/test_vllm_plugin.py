"""The plugin inside vLLM itself, on a CPU: what is taken over, loaded, computed and refused."""

import importlib.metadata
import itertools
import json
import logging
import shutil
import types

import pytest
import torch
from paged_step import last_slots
from safetensors.torch import load_file, save_file
from torch.nn import functional

from adallm import checkpoint, evaluate, fp8, nvfp4, vllm_plugin
from adallm.nvfp4 import NVFP4Tensor
from adallm.vllm_plugin.settings import Settings

vllm = pytest.importorskip("vllm", reason="needs vLLM")
pytestmark = [pytest.mark.vllm]

MODEL = evaluate.BUNDLED_MODEL
LAYOUTS = ("modelopt", "compressed-tensors")
PROMPTS = ("def __init__(self", "import os\nimport sys\n", "class TestCase(unittest.TestCase):\n    def")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("needs vLLM's CPU build")
    for name, value in {
        "ENABLE_V1_MULTIPROCESSING": "0", "CPU_OMP_THREADS_BIND": "nobind", "CPU_KVCACHE_SPACE": "1",
        "LOGGING_LEVEL": "INFO",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"VLLM_{name}", value)


def engine(path, **options):
    options = {"max_model_len": 128, "seed": 0, **options}
    return vllm.LLM(str(path), enforce_eager=True, distributed_executor_backend="uni", **options)


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def generated(llm):
    options = vllm.SamplingParams(temperature=0, max_tokens=24, logprobs=0, prompt_logprobs=0)
    found = []
    for output in llm.generate(list(PROMPTS), options, use_tqdm=False):
        of_prompt = [
            step[token].logprob
            for step, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        ]
        (best,) = output.outputs
        of_new = [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)]
        found.append((list(best.token_ids), torch.tensor([*of_prompt, *of_new])))
    return found


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The bundled model in both layouts, each shard with a global scale of its own, a power of two: so that BF16 holds
    the dequantized weights exactly.
    """
    root = tmp_path_factory.mktemp("quantized")
    for layout in LAYOUTS:
        checkpoint.convert(MODEL, root / layout, layout=layout, share_scales=False, progress=False)
        for file in (root / layout).glob("*.safetensors"):
            tensors = load_file(file)
            for name, value in tensors.items():
                if name.endswith(("weight_scale_2", "weight_global_scale")):
                    tensors[name] = torch.exp2(value.log2().round())
            save_file(tensors, file, {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def dense(quantized, tmp_path_factory):
    """BF16 models of the dequantized weights, one for each layout: their scales are not the same."""
    root = tmp_path_factory.mktemp("dense")
    for layout in LAYOUTS:
        tensors = {}
        for name, value in checkpoint.load(quantized / layout).items():
            if isinstance(value, NVFP4Tensor):
                value = nvfp4.dequantize(value)
                assert torch.equal(value, value.bfloat16().float())
            tensors[name] = value.bfloat16()
        shutil.copytree(MODEL, root / layout, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, root / layout / "model.safetensors", {"format": "pt"})
    return root


def test_vllm_finds_it():
    (entry,) = (e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "adallm")
    assert entry.load() is vllm_plugin.register


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_a_dense_model_of_the_same_weights(quantized, dense, layout, caplog):
    expected = generated(engine(dense / layout))
    llm = engine(quantized / layout)
    assert llm.llm_engine.vllm_config.model_config.quantization == "adallm"
    for (ids, logprobs), (dense_ids, dense_logprobs) in zip(generated(llm), expected, strict=True):
        assert ids == dense_ids
        # One unit of BF16 in logits of about 8.
        assert (logprobs - dense_logprobs).abs().max() <= 2**-4

    # Fused shards keep their scales: what is held is what the checkpoint has, bit for bit.
    held = dict(model_of(llm).named_modules())
    shards = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    tensors = checkpoint.load(quantized / layout)
    fused = 0
    for name, module in held.items():
        if not hasattr(module, "nvfp4"):
            continue
        parent, _, last = name.rpartition(".")
        parts = [tensors[f"{parent}.{shard}.weight"] for shard in shards.get(last, (last,))]
        assert torch.equal(nvfp4.dequantize(module.nvfp4.weight), torch.cat([nvfp4.dequantize(p) for p in parts]))
        assert not {"weight", "weight_packed", "weight_scale", "input_scale"} & dict(module.named_parameters()).keys()
        fused += module.nvfp4.global_scale.dim()
    assert fused


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "modelopt_fp4", "quantization": {"quant_algo": "nvfp4"}}, "modelopt"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, "modelopt"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, None),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}},
            },
            "mixed",
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "FP8"}},
            },
            None,
        ),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, None),
        ({"quant_method": "fp8"}, None),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, None),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "g": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}}
                },
            },
            "compressed-tensors",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "g": {"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}}
                },
            },
            None,
        ),
        ({}, None),
    ],
)
def test_which_checkpoints_are_taken_over(config, kind):
    from adallm.vllm_plugin.config import NVFP4Config, kind_of

    assert kind_of(config) == kind
    for named in (None, "adallm", "modelopt_fp4"):
        assert NVFP4Config.override_quantization_method(config, named) == (kind and "adallm")
    assert NVFP4Config.override_quantization_method(config, "humming") is None


def test_registered_twice_and_disabled(monkeypatch):
    from vllm.model_executor.layers import quantization

    vllm_plugin.register()
    vllm_plugin.register()
    assert quantization.QUANTIZATION_METHODS.count("adallm") == 1
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", [])
    monkeypatch.setattr("adallm.vllm_plugin.config.QUANTIZATION_METHODS", quantization.QUANTIZATION_METHODS)
    monkeypatch.setenv("ADALLM_DISABLE", "1")
    vllm_plugin.register()
    assert quantization.QUANTIZATION_METHODS == []


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "sm_80"), ((8, 0), None), ((8, 9), None), ((9, 0), None), ((10, 0), "FP4 cores"), ((12, 0), "FP4 cores")],
)
def test_on_which_gpus(monkeypatch, capability, reason):
    from adallm.vllm_plugin import compat

    found = types.SimpleNamespace(major=capability[0], minor=capability[1])
    platform = types.SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, get_device_capability=lambda: found, device_name="cuda"
    )
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    assert compat.capability() == capability
    said = compat.unsuitable()
    assert said is None if reason is None else reason in said


def test_settings():
    assert Settings.read(None, {}) == Settings("auto", "checkpoint", False)
    environment = {"ADALLM_ACTIVATIONS": "fp8", "ADALLM_ALLOW_FALLBACK": "1", "ADALLM_LM_HEAD": "nvfp4"}
    assert Settings.read(None, environment) == Settings("fp8", "nvfp4", True)
    assert Settings.read({"adallm": {"activations": "bf16", "allow_fallback": False}}, environment) == Settings(
        "bf16", "nvfp4", False
    )
    off = Settings(fuse=False)
    assert Settings.read(None, {"ADALLM_FUSE": "0"}) == Settings.read({"adallm": {"fuse": False}}, {}) == off
    assert Settings.read({"adallm": {"fuse": True}}, {"ADALLM_FUSE": "0"}) == Settings()
    for additional, environment, said in (
        (None, {"ADALLM_FUSE": "off"}, "ADALLM_FUSE is 'off'; supported: 0, 1"),
        ({"adallm": {"fuse": "off"}}, {"ADALLM_FUSE": "1"}, "adallm.fuse is 'off'; supported: 0, 1"),
        (None, {"ADALLM_ACTIVATIONS": "int8"}, "ADALLM_ACTIVATIONS is 'int8'; supported: auto, bf16, fp8"),
        ({"adallm": {"activations": "fp4"}}, {}, "adallm.activations is 'fp4'"),
        ({"adallm": {"activation": "fp8"}}, {}, r"\['activation'\]; supported: activations, lm_head, allow_fallback"),
        ({"adallm": "fp8"}, {}, "must be a dictionary"),
        (None, {"ADALLM_ALLOW_FALLBACK": "yes"}, "ADALLM_ALLOW_FALLBACK is 'yes'"),
    ):
        with pytest.raises(ValueError, match=said):
            Settings.read(additional, environment)
    assert [Settings("auto").kind(c) for c in (None, (8, 6), (8, 9), (9, 0))] == ["bf16", "bf16", "auto", "auto"]
    assert {Settings("bf16").kind(c) for c in (None, (8, 6), (8, 9))} == {"bf16"}
    assert Settings("fp8").kind((9, 0)) == Settings("fp8").kind(None) == "fp8"
    with pytest.raises(ValueError, match=r"ACTIVATIONS is fp8.*sm_86; it has no FP8 cores.*bf16, auto"):
        Settings("fp8").kind((8, 6))
    assert Settings("bf16", "fp8").kind((8, 9)) == "bf16"
    with pytest.raises(ValueError, match=r"LM_HEAD is fp8.*sm_80; it has no FP8 cores.*checkpoint, nvfp4"):
        Settings("bf16", "fp8").kind((8, 0))


def damaged(source, target, damage):
    """A copy of a checkpoint whose tensors ``damage`` has changed in place."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file, {"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        there = {name for file in target.glob("*.safetensors") for name in load_file(file)}
        content["weight_map"] = {name: file for name, file in content["weight_map"].items() if name in there}
        index.write_text(json.dumps(content))
    return target


K = "model.layers.2.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"


def _drop(name):
    return lambda tensors: tensors.pop(name, None)


def _change(name, change):
    def damage(tensors):
        if name in tensors:
            tensors[name] = change(tensors[name])

    return damage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "damage", "said"),
    [
        ("modelopt", _drop(f"{K}.weight_scale"), f"the checkpoint has no {K}.weight_scale$"),
        ("modelopt", _drop(f"{DOWN}.weight_scale_2"), f"the checkpoint has no {DOWN}.weight_scale_2$"),
        ("compressed-tensors", _drop(f"{K}.weight_packed"), f"the checkpoint has no {K}.weight_packed$"),
        (
            "modelopt",
            _change(f"{K}.weight", lambda x: torch.cat((x, x))),
            rf"{K}.weight is torch.uint8 \[256, 192\]; this layer needs torch.uint8 \[128, 192\]",
        ),
        (
            "modelopt",
            _change(f"{DOWN}.weight_scale", lambda x: x[:, :-1].contiguous()),
            rf"{DOWN}.weight_scale is torch.float8_e4m3fn \[384, 47\]; this layer needs .* \[384, 48\]",
        ),
        (
            "compressed-tensors",
            _change(f"{DOWN}.weight_scale", lambda x: x.float()),
            rf"{DOWN}.weight_scale is torch.float32 \[384, 48\]; this layer needs torch.float8_e4m3fn \[384, 48\]",
        ),
        (
            "modelopt",
            _change(f"{K}.weight_scale_2", lambda x: x * float("nan")),
            f"{K}.weight_scale_2 is nan; it must be finite and positive",
        ),
        (
            "compressed-tensors",
            _change(f"{K}.weight_scale", lambda x: (-x.float()).to(x.dtype)),
            f"{K}.weight_scale has a block scale that is negative or NaN",
        ),
    ],
)
def test_bad_checkpoints(quantized, tmp_path, layout, damage, said):
    with pytest.raises(ValueError, match=said):
        engine(damaged(quantized / layout, tmp_path / "bad", damage))


def configured(config, packed=None):
    """A config of ours outside an engine."""
    from adallm.vllm_plugin.config import NVFP4Config

    made = NVFP4Config.from_config(config)
    made.packed_modules_mapping = packed or {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


def pretend(monkeypatch, rank=0, size=1):
    """That this process is one of several ranks."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


def loaded(layer, prefix, tensors, shards):
    """What vLLM's models do when they load: each tensor by the loader of the parameter."""
    for shard, name in shards.items():
        for parameter, value in layer.named_parameters(recurse=False):
            if (tensor := tensors.get(f"{prefix}.{name}.{parameter}")) is not None:
                value.weight_loader(value, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)
    return nvfp4.dequantize(layer.nvfp4.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_hold_the_halves(quantized, layout, monkeypatch):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import linear

    tensors = {}
    for file in (quantized / layout).glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((quantized / layout / "config.json").read_text())["quantization_config"]
    whole = {
        n: nvfp4.dequantize(t) for n, t in checkpoint.load(quantized / layout).items() if n.endswith("proj.weight")
    }
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    for rank in (0, 1):
        pretend(monkeypatch, rank, 2)
        with set_current_vllm_config(VllmConfig()):
            quant = configured(
                config, {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
            )
            qkv = linear.QKVParallelLinear(
                384,
                64,
                6,
                2,
                bias=False,
                quant_config=quant,
                prefix=f"{attention}.qkv_proj",
                params_dtype=torch.bfloat16,
            )
            gate_up = linear.MergedColumnParallelLinear(
                384,
                [768] * 2,
                bias=False,
                quant_config=quant,
                prefix=f"{mlp}.gate_up_proj",
                params_dtype=torch.bfloat16,
            )
            down = linear.RowParallelLinear(
                768, 384, bias=False, quant_config=quant, prefix=f"{mlp}.down_proj", params_dtype=torch.bfloat16
            )
        found = loaded(qkv, attention, tensors, {"q": "q_proj", "k": "k_proj", "v": "v_proj"})
        parts = [whole[f"{attention}.{n}_proj.weight"].chunk(2)[rank] for n in "qkv"]
        assert torch.equal(found, torch.cat(parts))
        found = loaded(gate_up, mlp, tensors, {0: "gate_proj", 1: "up_proj"})
        assert torch.equal(found, torch.cat([whole[f"{mlp}.{n}_proj.weight"].chunk(2)[rank] for n in ("gate", "up")]))
        found = loaded(down, mlp, tensors, {None: "down_proj"})
        assert torch.equal(found, whole[f"{mlp}.down_proj.weight"].chunk(2, 1)[rank])


def test_a_mixed_checkpoint_and_what_is_ignored(monkeypatch):
    pretend(monkeypatch)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import linear

    from adallm.vllm_plugin.linear import AdaLLMNVFP4LinearMethod

    made = configured(
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "ignore": ["lm_head", "model.layers.1*"],
            "quantized_layers": {
                "model.layers.0.a": {"quant_algo": "FP8"},
                "model.layers.0.b": {"quant_algo": "NVFP4", "group_size": 16},
                "model.layers.0.c": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
                "model.layers.1.a": {"quant_algo": "NVFP4", "group_size": 16},
            },
        }
    )
    with set_current_vllm_config(VllmConfig()):
        layer = linear.ReplicatedLinear(64, 32, bias=False, params_dtype=torch.bfloat16)
        methods = {n: made.get_quant_method(layer, f"model.layers.{n}") for n in ("0.a", "0.b", "0.c", "0.d", "1.a")}
    ours = {name for name, method in methods.items() if isinstance(method, AdaLLMNVFP4LinearMethod)}
    assert ours == {"0.b", "0.c"}
    assert methods["0.a"].spec.weight.dtype == torch.float8_e4m3fn
    assert isinstance(methods["0.d"], linear.UnquantizedLinearMethod)
    assert isinstance(methods["1.a"], linear.UnquantizedLinearMethod)
    rows = made._report.rows()
    assert ("2", "NVFP4 ReplicatedLinear", "adallm W4A16, reference on a CPU", "activations auto") in rows
    assert ("2", "ReplicatedLinear", "vLLM UnquantizedLinearMethod", "not quantized in the checkpoint") in rows
    assert ("1", "ReplicatedLinear", "vLLM ModelOptLinearMethod", "another algorithm in the checkpoint") in rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_ours_does_not_run(quantized, layout, monkeypatch):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import linear

    pretend(monkeypatch)
    config = json.loads((quantized / layout / "config.json").read_text())["quantization_config"]

    def layer(made):
        return linear.ReplicatedLinear(
            64, 24, bias=False, quant_config=made, prefix="model.layers.0.mlp.down_proj", params_dtype=torch.bfloat16
        )

    with set_current_vllm_config(VllmConfig()):
        with pytest.raises(ValueError, match=r"down_proj is \[24, 64\] on this rank; supported: both multiples of 16"):
            layer(configured(config))
        monkeypatch.setenv("ADALLM_ALLOW_FALLBACK", "1")
        made = configured(config)
        # A CPU has no NVFP4 kernel of vLLM's: it says so itself, now that it is asked.
        with pytest.raises(ValueError, match=r"(?i)nvfp4|kernel"):
            layer(made)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_vllms(quantized, monkeypatch, caplog, layout):
    """Said in one line, whatever the number of layers, and in the table."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    class FusedMoE:
        pass

    method = FusedMoE()
    for stock in (ModelOptNvFp4Config, CompressedTensorsConfig):
        monkeypatch.setattr(stock, "get_quant_method", lambda self, layer, prefix: method)
    made = configured(json.loads((quantized / layout / "config.json").read_text())["quantization_config"])
    logger = logging.getLogger("vllm.adallm")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger.parent, "propagate", True)
    with caplog.at_level("INFO", "vllm.adallm"):
        for i in range(3):
            experts = torch.nn.Module.__new__(RoutedExperts)
            torch.nn.Module.__init__(experts)
            assert made.get_quant_method(experts, f"model.layers.{i}.mlp.experts") is method
    # A set: a record reaches the handler by way of each logger that has it, of which vLLM makes one more.
    said = {record.getMessage() for record in caplog.records if record.name == "vllm.adallm"}
    assert said == {"adallm: experts, of model.layers.0.mlp.experts and other layers, run on vLLM's FusedMoE"}
    assert made._report.rows() == [("3", "experts", "vLLM FusedMoE", "adallm has no kernel for experts")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_a_quantized_head(quantized, monkeypatch, kind):
    monkeypatch.setenv("ADALLM_LM_HEAD", kind)
    llm = engine(quantized / "modelopt")
    head, dense = model_of(llm).lm_head, model_of(llm).model.embed_tokens.weight.data
    if kind == "nvfp4":
        assert torch.equal(nvfp4.dequantize(head.nvfp4.weight), nvfp4.dequantize(nvfp4.quantize(dense)))
    else:
        assert torch.equal(head.fp8.dense_weight(), fp8.dequantize(fp8.quantize(dense, granularity="row")))
    (first, *_) = generated(llm)
    assert torch.isfinite(first[1]).all()


class EmbeddingIsTheHead(torch.nn.Module):
    """Tied as vLLM 0.26 ties Qwen3: there is no ``ParallelLMHead``."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def tie_weights(self, embed_tokens):
        return embed_tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_a_quantized_head_that_is_the_embedding(quantized, monkeypatch, caplog, kind):
    monkeypatch.setenv("ADALLM_LM_HEAD", kind)
    with_head = generated(engine(quantized / "modelopt"))
    monkeypatch.setattr("vllm.model_executor.models.qwen3.ParallelLMHead", EmbeddingIsTheHead)
    logger = logging.getLogger("vllm.adallm")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger.parent, "propagate", True)
    with caplog.at_level("INFO", "vllm.adallm"):
        llm = engine(quantized / "modelopt")
    assert f"lm_head {kind}: quantized here" in caplog.text
    model = model_of(llm)
    assert model.lm_head is model.model.embed_tokens
    assert hasattr(model.lm_head, kind)
    for (tokens, logprobs), (expected, of_expected) in zip(generated(llm), with_head, strict=True):
        assert tokens == expected
        assert torch.equal(logprobs, of_expected)


@pytest.mark.slow
def test_a_dummy_load(quantized):
    llm = engine(quantized / "compressed-tensors", load_format="dummy")
    assert all(torch.isfinite(logprobs).all() for _, logprobs in generated(llm))


def attention_step(lengths, queries, *, dtype=torch.float8_e4m3fn, heads=(6, 2, 64), block=16, seed=0):
    """vLLM's cache with keys and values in it, the arguments of a step and its tokens."""
    torch.manual_seed(seed)
    hq, hk, d = heads
    width = -(-max(lengths) // block)
    blocks = len(lengths) * width + 1
    cache = torch.randn(blocks, hk, block, 2 * d).to(dtype)
    table = torch.randperm(blocks)[: len(lengths) * width].view(len(lengths), width).int()
    tokens = sum(queries)
    # As a slice of a fused product, which is what attention is given.
    qkv = torch.randn(tokens, (hq + 2 * hk) * d).bfloat16()
    q, k, v = (part.view(tokens, -1, d) for part in qkv.split([hq * d, hk * d, hk * d], dim=-1))
    return cache, table, torch.tensor(lengths, dtype=torch.int32), q, k, v


def implementation(window=None, *, cache="fp8", soft_cap=None, sinks=None):
    from adallm.vllm_plugin.attention import Impl

    made = Impl(6, 64, 0.125, 2, None, window, cache, logits_soft_cap=soft_cap, sinks=sinks)
    made.process_weights_after_loading(torch.bfloat16)
    return made


LAYER = types.SimpleNamespace(calculate_kv_scales=False, _k_scale_float=0.5, _v_scale_float=2.0)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("cache", ["fp8", "auto"])
def test_decode_and_speculative_steps_of_the_backend(cache, alone, monkeypatch):
    """New keys and values are written by decode attention or, of more sequences, before it."""
    from adallm.attention import paged_decode_reference, write_kv
    from adallm.vllm_plugin import attention
    from adallm.vllm_plugin.attention import Metadata

    monkeypatch.setattr(attention, "WRITES_UP_TO", 3 if alone else 2)
    before = []

    def write(k, *others, **given):
        before.append(len(k))
        write_kv(k, *others, **given)

    monkeypatch.setattr(attention, "write_kv", write)

    quantized = cache == "fp8"
    for queries in (1, 3):
        dtype = torch.float8_e4m3fn if quantized else torch.bfloat16
        kv, table, lengths, q, k, v = attention_step([40, 5, 17], [queries] * 3, dtype=dtype)
        sinks = torch.randn(6).bfloat16()
        made = implementation(16, cache=cache, soft_cap=20.0, sinks=sinks)
        assert not made.supports_quant_query_input
        scales = {"k_scale": 0.5, "v_scale": 2.0} if quantized else {}
        # New keys and values go to their slots.
        slots = last_slots(table, lengths.tolist(), [queries] * 3)
        stored = kv.view(torch.uint8) if quantized else kv
        step = Metadata(**dict.fromkeys(TRITON_FIELDS), decodes=3, queries=queries)
        step.block_table, step.seq_lens = table, lengths
        step.slot_mapping, step.num_actual_tokens = torch.cat((slots, torch.tensor([-1, -1]))), 3 * queries
        out = torch.full((3 * queries + 2, 6, 64), float("nan")).bfloat16()
        padded = [torch.cat((x, x[:2])) for x in (q, k, v)]
        made.forward(LAYER, *padded, stored, step, out)
        written = kv.transpose(1, 2).reshape(-1, 2, 128)[slots].float()
        error = written[..., :64] * scales.get("k_scale", 1.0) - k.float()
        assert error.abs().max() <= (0.15 if quantized else 0.0)
        assert before == ([] if alone else [3 * queries + 2])
        before.clear()
        halves = kv.transpose(1, 2).split(64, dim=-1)
        expected = paged_decode_reference(
            q.view(3, queries, 6, 64),
            *halves,
            table,
            lengths,
            scale=0.125,
            window=16,
            soft_cap=20.0,
            sinks=sinks.float(),
            **scales,
        )
        assert torch.equal(out[: 3 * queries].view(3, queries, 6, 64), expected.bfloat16())
        # Tokens that pad a step are nobody's.
        assert out[3 * queries :].isnan().all()


TRITON_FIELDS = (
    "num_actual_tokens", "max_query_len", "query_start_loc", "max_seq_len", "seq_lens", "block_table", "slot_mapping",
    "seq_threshold_3D", "num_par_softmax_segments", "softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum",
    "causal",
)  # fmt: skip


def test_what_the_backend_takes(monkeypatch):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from adallm.vllm_plugin.attention import Impl

    vllm_plugin.register()
    backend = AttentionBackendEnum.CUSTOM.get_class()
    assert backend.get_name() == "CUSTOM"
    assert [backend.supports_head_size(size) for size in (64, 80, 96, 128, 192, 256)] == [True, False, *[True] * 4]
    assert [backend.supports_kv_cache_dtype(name) for name in ("auto", "fp8", "fp8_e5m2", "int8_per_token_head")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert backend.supports_sink()
    assert backend.supports_sliding_window()
    assert not implementation().fused_output_quant_supported(None)
    assert not backend.supports_non_causal()
    assert not backend.supports_attn_type("encoder_only")
    with pytest.raises(ValueError, match=r"32 query and 1 KV heads.*supported: up to 16"):
        Impl(32, 64, 0.125, 1, None, None, "auto")
    monkeypatch.setenv("ADALLM_ALLOW_FALLBACK", "1")
    assert not Impl(32, 64, 0.125, 1, None, None, "auto")._ours


def test_a_step_is_checked_once_for_each_size_and_cache(monkeypatch):
    from adallm.vllm_plugin import attention

    impl, seen = object.__new__(attention.Impl), []
    given = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "scale": 0.125, "logits_soft_cap": 0.0}
    ours = {"_ours": True, "_writes": True, "_window": None, "_sinks": None, "_slopes": None, "_flash": None}
    state = {"_quantized": False, "_steps": {}, "_written": False, "_seen": None, "_views": None}
    for name, value in (given | ours | state).items():
        setattr(impl, name, value)

    def decode(q, k_cache, v_cache, *args, checked, **options):
        seen.append((k_cache.data_ptr(), v_cache.data_ptr() - k_cache.data_ptr(), checked))

    monkeypatch.setattr(attention, "paged_decode", decode)
    monkeypatch.setattr(attention, "write_kv", lambda *args, checked, **scales: seen.append(checked))
    monkeypatch.setattr(attention, "WRITES_UP_TO", 2)

    def run(cache, sequences):
        lines = torch.zeros(sequences, dtype=torch.int32)
        step = types.SimpleNamespace(
            decodes=sequences, queries=1, prompts=None, beginning=None, continued=None, workspace=None,
            num_actual_tokens=sequences, seq_lens=lines, block_table=lines[:, None], slot_mapping=lines.long(),
        )  # fmt: skip
        q, kv = torch.zeros(sequences, 4, 64), torch.zeros(sequences, 2, 64)
        attention.Impl.forward(impl, None, q, kv, kv, cache, step, torch.zeros_like(q))

    first, other = (torch.zeros(blocks, 2, 16, 128) for blocks in (3, 5))
    for cache, sequences in ((first, 1), (first, 1), (first, 2), (first, 3), (first, 3), (other, 1), (other, 3)):
        run(cache, sequences)
    shape = {n: attention.Shape(n, 1, 4, 2, 64, 3, 16) for n in (1, 2, 3)}
    at = [(cache.data_ptr(), 256) for cache in (first, other)]
    assert seen == [
        (*at[0], None), (*at[0], shape[1]), (*at[0], None), False, (*at[0], None), True, (*at[0], shape[3]),
        (*at[1], None), False, (*at[1], None),
    ]  # fmt: skip


def split(monkeypatch, queries, lengths):
    """What the builder makes of a step, and where its tokens begin."""
    from adallm.vllm_plugin import attention

    starts = torch.tensor([0, *queries]).cumsum(0).int()
    common = types.SimpleNamespace(
        num_reqs=len(queries), num_actual_tokens=sum(queries), max_query_len=max(queries), query_start_loc=starts,
        query_start_loc_cpu=starts, seq_lens=torch.tensor(lengths), seq_lens_cpu_upper_bound=torch.tensor(lengths),
        block_table=torch.arange(len(queries))[:, None], slot_mapping=torch.arange(sum(queries)),
    )  # fmt: skip

    def built(self, *args):
        return attention.TritonAttentionMetadata(**{name: getattr(common, name, None) for name in TRITON_FIELDS})

    monkeypatch.setattr(attention.TritonAttentionMetadataBuilder, "build", built)
    builder = object.__new__(attention.MetadataBuilder)
    builder._workspace, builder.reorder_batch_threshold = None, 3
    return builder.build(0, common), starts


@pytest.mark.parametrize(
    ("queries", "lengths", "decodes", "count", "first"),
    [
        ([1, 1, 1], [9, 9, 9], 3, 1, None),
        ([3, 3, 7, 9], [8, 8, 9, 9], 2, 3, 3),
        ([1, 1, 5], [1, 1, 5], 2, 1, 2),
        ([7, 9], [7, 9], 0, 0, 0),
        ([7, 9], [7, 10], 0, 0, None),
        ([7, 9, 4, 4], [8, 9, 4, 4], 0, 0, 1),
        ([3, 2], [4, 5], 1, 3, None),
    ],
)
def test_a_step_is_split(monkeypatch, queries, lengths, decodes, count, first):
    step, starts = split(monkeypatch, queries, lengths)
    assert (step.decodes, step.queries) == (decodes, count)

    def assert_part(part, begin, end):
        a, b = int(starts[begin]), int(starts[end])
        assert part.num_actual_tokens == b - a
        assert part.query_start_loc.tolist() == (starts[begin : end + 1] - a).tolist()
        assert part.seq_lens.tolist() == lengths[begin:end]
        assert part.block_table[:, 0].tolist() == list(range(begin, end))
        assert part.slot_mapping.tolist() == list(range(a, b))

    if decodes == len(queries):
        assert step.prompts is step.beginning is step.continued is None
        return
    assert_part(step.prompts, decodes, len(queries))
    if first is None:
        assert step.beginning is None
        assert step.continued.step is step.prompts
        return
    begins = step.beginning
    assert (begins.first, begins.first_token, begins.tokens) == (first, starts[first], sum(queries[first:]))
    assert begins.starts.tolist() == (starts[first:] - starts[first]).tolist()
    assert begins.longest == max(queries[first:])
    if first == decodes:
        assert step.continued is None
    else:
        assert_part(step.continued.step, decodes, first)
        assert step.continued.starts.tolist() == torch.tensor([0, *lengths[decodes:first]]).cumsum(0).tolist()
        assert step.continued.tokens == sum(lengths[decodes:first])
        assert step.continued.longest == max(lengths[decodes:first])


def attention_of(q, k, v, window):
    """``[tokens, heads, 64]`` in FP32, the queries being the last tokens."""
    first = k.shape[0] - q.shape[0]
    distance = torch.arange(first, k.shape[0])[:, None] - torch.arange(k.shape[0])[None, :]
    q, k, v = (x.transpose(0, 1).float() for x in (q, k, v))
    seen = (distance >= 0) & (distance < window)
    return functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize("flash", ["all", "what begins", "none"])
def test_who_runs_what_of_a_mixed_step(monkeypatch, flash):
    """Decodes, a prompt that goes on and two that begin; in FlashAttention's place what it computes, in torch."""
    from adallm.vllm_plugin import attention, prefill

    queries, lengths = [1, 1, 6, 5, 8], [40, 17, 20, 5, 8]
    step, _ = split(monkeypatch, queries, lengths)
    kv, table, step.seq_lens, q, k, v = attention_step(lengths, queries)
    step.block_table, step.prompts.block_table, step.continued.step.block_table = table, table[2:], table[2:3]
    step.slot_mapping = last_slots(table, lengths, queries)
    out = torch.full((21, 6, 64), float("nan")).bfloat16()
    triton = []

    def forward(self, layer, query, key, value, cache, part, output, *_):
        triton.append(part)
        assert query.shape == output.shape == (part.num_actual_tokens, 6, 64)
        output.fill_(7.0)

    def varlen(*, q, k, v, out, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, window_size, fa_version, **given):
        assert (causal, softmax_scale, window_size, fa_version) == (True, 0.125, [15, 0], 3)
        # Bounds, of which vLLM's metadata has that of the whole step.
        assert given["max_seqlen_q"] == 8
        assert given["max_seqlen_k"] == int(cu_seqlens_k.diff().max())
        for (a, b), (c, d) in zip(
            *map(itertools.pairwise, (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())), strict=True
        ):
            out[a:b] = attention_of(q[a:b], k[c:d], v[c:d], 16)

    monkeypatch.setattr(attention.TritonAttentionImpl, "forward", forward)
    if flash != "none":
        monkeypatch.setattr(prefill, "version", lambda *_, **__: 3)
        monkeypatch.setattr("vllm.v1.attention.backends.fa_utils.flash_attn_varlen_func", varlen, raising=False)
    if flash == "what begins":
        monkeypatch.setattr(prefill, "MOST_BYTES", 19 * 2 * 2 * 2 * 64)
    made = implementation(16)
    made.forward(LAYER, q, k, v, kv.view(torch.uint8), step, out)
    written = kv.transpose(1, 2).reshape(-1, 2, 128)[step.slot_mapping].float() * torch.tensor(
        [0.5, 2.0]
    ).repeat_interleave(64)
    assert (written - torch.cat((k, v), -1).float()).abs().max() <= 0.3
    assert not out.isnan().any()
    assert not (out[:2] == 7.0).any()
    if flash == "none":
        assert made.runs == "adallm decode, vLLM Triton prefill"
        assert triton == [step.prompts]
        assert (out[2:] == 7.0).all()
        return
    assert "vLLM FlashAttention 3 prefill, Triton past" in made.runs
    assert torch.equal(out[13:], attention_of(q[13:], k[13:], v[13:], 16).bfloat16())
    if flash == "what begins":
        assert triton == [step.continued.step]
        assert (out[2:8] == 7.0).all()
        return
    assert triton == []
    cached = kv[table[2].long()].transpose(1, 2).reshape(-1, 2, 128)[:20].float()
    keys, values = (cached[..., :64] * 0.5).bfloat16(), (cached[..., 64:] * 2.0).bfloat16()
    assert torch.equal(out[2:8], attention_of(q[2:8], keys, values, 16).bfloat16())


@pytest.mark.parametrize("padding", [0, 3])
def test_a_step_of_prompts_that_begin(monkeypatch, padding):
    """All of its tokens, and none of those that fill it up."""
    from adallm.vllm_plugin import prefill

    lengths = [5, 8]
    step, _ = split(monkeypatch, lengths, lengths)
    kv, table, step.seq_lens, q, k, v = attention_step(lengths, lengths)
    step.slot_mapping = last_slots(table, lengths, lengths)
    q, k, v = (functional.pad(x, (0, 0, 0, 0, 0, padding), value=float("nan")) for x in (q, k, v))
    out = torch.full_like(q, 7.0)
    given = []
    monkeypatch.setattr(prefill, "version", lambda *_, **__: 3)
    varlen = lambda **arguments: given.append(arguments)  # noqa: E731
    monkeypatch.setattr("vllm.v1.attention.backends.fa_utils.flash_attn_varlen_func", varlen, raising=False)
    implementation(16).forward(LAYER, q, k, v, kv.view(torch.uint8), step, out)
    (arguments,) = given
    for name, x in {"q": q, "k": k, "v": v, "out": out}.items():
        assert arguments[name].shape == (13, *x.shape[1:])
        assert arguments[name].data_ptr() == x.data_ptr()
    assert arguments["cu_seqlens_q"].tolist() == arguments["cu_seqlens_k"].tolist() == [0, 5, 13]
    written = kv.transpose(1, 2).reshape(-1, 2, 128)[step.slot_mapping].float() * torch.tensor(
        [0.5, 2.0]
    ).repeat_interleave(64)
    assert (written - torch.cat((k, v), -1)[:13].float()).abs().max() <= 0.3


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_that_the_checkpoint_has_in_nvfp4(tmp_path, layout):
    """Untied from the embeddings, as a model with a quantized head is."""
    source = tmp_path / "untied"
    shutil.copytree(MODEL, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: value for file in MODEL.glob("*.safetensors") for name, value in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    checkpoint.convert(source, tmp_path / "quantized", layout=layout, ignore=(), progress=False)
    stored = checkpoint.load(tmp_path / "quantized")["lm_head.weight"]
    assert isinstance(stored, NVFP4Tensor)
    llm = engine(tmp_path / "quantized")
    assert torch.equal(nvfp4.dequantize(model_of(llm).lm_head.nvfp4.weight), nvfp4.dequantize(stored))
    assert all(torch.isfinite(logprobs).all() for _, logprobs in generated(llm))
