"""Checkpoints: both layouts, written and read, and read by others."""

import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adallm import checkpoint, nvfp4, quantizers
from adallm.checkpoint import CheckpointError, convert, load, load_dense, quantization_of
from adallm.checkpoint import exact as exact_module
from adallm.checkpoint import header as header_module
from adallm.checkpoint.exact import original_of, pack_originals, same_bytes, translate, unpack_originals
from adallm.checkpoint.names import Patterns, compressed_tensors_kv_name, fused_group, modelopt_kv_name
from adallm.nvfp4 import NVFP4Tensor

LAYOUTS = ("modelopt", "compressed-tensors")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "vocab_size": 96,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False, "max_position_embeddings": 128,
}  # fmt: skip


def dense_tensors(config: dict, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights of a Qwen3 model."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    query, key = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}": (key, hidden) for name in ("k_proj", "v_proj")}
        shapes |= {f"{layer}.self_attn.q_proj": (query, hidden), f"{layer}.self_attn.o_proj": (hidden, query)}
        shapes |= {f"{layer}.self_attn.{name}": (config["head_dim"],) for name in ("q_norm", "k_norm")}
        shapes |= {f"{layer}.{name}": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.mlp.{name}": (wide, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}.mlp.down_proj"] = (hidden, wide)
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": (torch.randn(shape, generator=generator) * (0.01 + 0.01 * i)).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def write(path: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A directory, its tensors dealt out to the shards in turn."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def raw(path: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor."""
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same_bytes(a[name], b[name]), name


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", QWEN3, dense_tensors(QWEN3), shards=3)


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """A ModelOpt directory with activation and KV-cache scales, two of them without an exact reciprocal."""
    path = convert(write(tmp_path / "bf16", QWEN3, dense_tensors(QWEN3)), tmp_path / "calibrated", kv_cache="fp8").path
    tensors = raw(path)
    scales = [name for name in tensors if name.endswith("weight_scale_2")]
    generator = torch.Generator().manual_seed(1)
    for name in scales:
        tensors[name.replace("weight_scale_2", "input_scale")] = torch.rand((), generator=generator)
        tensors[name] = torch.rand((), generator=generator) / 1000
    tensors["model.layers.1.self_attn.k_proj.k_scale"] = torch.tensor(1.7)
    inexact = [name for name in tensors if "scale" in name and tensors[name].dim() == 0]
    inexact = [name for name in inexact if tensors[name].reciprocal().reciprocal() != tensors[name]]
    assert len(inexact) >= 2
    save_file(tensors, path / "model.safetensors")
    edit_json(path / "config.json", lambda c: c["quantization_config"].pop("config_groups"))
    return path


def edit_json(file: Path, edit) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


# Quantizing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_quantize_each_weight_alone(tmp_path: Path, layout: str, shards: int) -> None:
    dense = dense_tensors(QWEN3)
    src = write(tmp_path / "src", QWEN3, dense, shards)
    done = convert(src, tmp_path / "dst", layout=layout, share_scales=False)
    assert done.quantized == 14
    loaded = load(tmp_path / "dst")
    assert loaded.keys() == dense.keys()
    for name, value in loaded.items():
        if not re.search(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj", name):
            assert same_bytes(value, dense[name])
            continue
        expected = nvfp4.quantize(dense[name], layout=layout)
        assert same_bytes(value.packed, expected.packed)
        assert same_bytes(value.scale, expected.scale)
        assert same_bytes(value.global_scale, expected.global_scale)
        assert (value.divisor is None) == (layout == "modelopt")
        assert value.divisor is None or same_bytes(value.divisor, expected.divisor)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", quantizers.RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_layers_share_the_global_scale(tmp_path: Path, layout: str, dtype: torch.dtype, rule: str) -> None:
    config = QWEN3 | {"dtype": str(dtype).removeprefix("torch.")}
    dense = dense_tensors(config, dtype)
    # Three shards, dealt in turn: no group lies in one file.
    weigh = {
        name.removesuffix(".weight"): torch.arange(1.0, x.shape[1] + 1) for name, x in dense.items() if x.dim() == 2
    }
    given = {"scale_rule": rule} | ({"importance": weigh} if rule == "imatrix" else {})
    convert(write(tmp_path / "src", config, dense, 3), tmp_path / "dst", layout=layout, **given)
    loaded = load(tmp_path / "dst")
    for i in range(2):
        for module, members in (("self_attn", ATTENTION[:3]), ("mlp", MLP[:2]), ("mlp", MLP[2:])):
            names = [f"model.layers.{i}.{module}.{member}.weight" for member in members]
            whole = torch.cat([dense[name] for name in names])
            importance = torch.arange(1.0, whole.shape[1] + 1) if rule == "imatrix" else None
            together = nvfp4.quantize(whole, layout=layout, scale_rule=rule, importance=importance)
            assert same_bytes(torch.cat([loaded[name].packed for name in names]), together.packed)
            assert same_bytes(
                torch.cat([loaded[name].scale.view(torch.uint8) for name in names]), together.scale.view(torch.uint8)
            )
            for name in names:
                assert same_bytes(loaded[name].global_scale, together.global_scale)


@pytest.mark.slow
def test_same_bytes_as_a_modelopt_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import nvfp4_tensor
    from transformers import AutoModelForCausalLM

    # ModelOpt asks a CUDA device that is not there which kernels it has.
    monkeypatch.setattr(nvfp4_tensor, "fp4_compatible", lambda: False)
    src = write(tmp_path / "src", QWEN3, dense_tensors(QWEN3))
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16)
    quant_cfg = {**mtq.NVFP4_DEFAULT_CFG, "quant_cfg": dict(mtq.NVFP4_DEFAULT_CFG["quant_cfg"])}
    quant_cfg["quant_cfg"].update(mtq.FP8_KV_CFG["quant_cfg"])
    model = mtq.quantize(model, quant_cfg, lambda m: m(torch.arange(64).reshape(2, 32)))
    export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    convert(src, tmp_path / "ours", kv_cache="fp8")
    theirs = {name: value for name, value in raw(tmp_path / "theirs").items() if not name.endswith("input_scale")}
    assert_same(raw(tmp_path / "ours"), theirs)
    theirs, ours = quantization_of(tmp_path / "theirs"), quantization_of(tmp_path / "ours")
    assert (ours.algorithm, ours.kv_cache, ours.ignored) == (theirs.algorithm, theirs.kv_cache, theirs.ignored)
    assert theirs.groups[0].scheme.activations == "nvfp4"
    assert ours.groups[0].scheme.activations is None
    # A real export survives the other layout, its activation scales included.
    convert(tmp_path / "theirs", tmp_path / "there", layout="compressed-tensors")
    convert(tmp_path / "there", tmp_path / "back")
    assert_same(raw(tmp_path / "theirs"), raw(tmp_path / "back"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_is_quantized_in_fp32(tmp_path: Path, layout: str) -> None:
    config = QWEN3 | {"dtype": "float16"}
    dense = dense_tensors(config, torch.float16)
    name = "model.layers.0.mlp.down_proj.weight"
    dense[name] *= 0.01  # 2688 / amax is beyond FP16 here
    convert(write(tmp_path / "src", config, dense), tmp_path / "dst", layout=layout)
    expected = nvfp4.quantize(dense[name].float(), layout=layout)
    assert same_bytes(load(tmp_path / "dst")[name].packed, expected.packed)
    assert same_bytes(load(tmp_path / "dst")[name].global_scale, expected.global_scale)
    assert load(tmp_path / "dst")["model.norm.weight"].dtype == torch.float16


def test_tied_model_has_no_head(tmp_path: Path) -> None:
    config = QWEN3 | {"tie_word_embeddings": True}
    src = write(tmp_path / "src", config, dense_tensors(config))
    for layout in LAYOUTS:
        convert(src, tmp_path / layout, layout=layout)
        assert "lm_head" in quantization_of(tmp_path / layout).ignored
        assert "lm_head.weight" not in load(tmp_path / layout)


@pytest.mark.parametrize(
    ("ignore", "dense"),
    [
        (("lm_head", "model.layers.0"), ["layers.0."]),
        (("lm_head", "*.self_attn.*"), ["self_attn"]),
        (("lm_head", r"re:.*\.layers\.1\.mlp\.(gate|up)_proj$"), ["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"]),
        (("lm_head", "o_proj"), ["self_attn.o_proj"]),
        ((), []),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ignored_layers_stay_dense(source: Path, tmp_path: Path, layout: str, ignore: tuple, dense: list) -> None:
    convert(source, tmp_path / "dst", layout=layout, ignore=ignore)
    for name, value in load(tmp_path / "dst").items():
        quantized = isinstance(value, NVFP4Tensor)
        linear = "_proj" in name or (name == "lm_head.weight" and not ignore)
        assert quantized == (linear and not any(part in name for part in dense)), name


def test_unmatched_pattern_warns(source: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="mpl.*matches no module"):
        convert(source, tmp_path / "dst", ignore=("lm_head", "*.mpl.*"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moe(tmp_path: Path, layout: str) -> None:
    config = QWEN3 | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 32}
    dense = {name: value for name, value in dense_tensors(config).items() if ".mlp." not in name}
    for i in range(2):
        dense[f"model.layers.{i}.mlp.gate.weight"] = torch.randn(4, 64).bfloat16()
        for j in range(4):
            for name in MLP:
                shape = (64, 32) if name == "down_proj" else (32, 64)
                dense[f"model.layers.{i}.mlp.experts.{j}.{name}.weight"] = torch.randn(shape).bfloat16() * (j + 1)
    convert(write(tmp_path / "src", config, dense, 3), tmp_path / "dst", layout=layout)
    loaded = load(tmp_path / "dst")
    assert loaded.keys() == dense.keys()
    assert isinstance(loaded["model.layers.1.mlp.experts.3.down_proj.weight"], NVFP4Tensor)
    assert same_bytes(loaded["model.layers.1.mlp.gate.weight"], dense["model.layers.1.mlp.gate.weight"])
    scales = {name: value.global_scale for name, value in loaded.items() if "experts.2." in name}
    assert (
        scales["model.layers.0.mlp.experts.2.gate_proj.weight"] == scales["model.layers.0.mlp.experts.2.up_proj.weight"]
    )
    other = next(name for name in LAYOUTS if name != layout)
    convert(tmp_path / "dst", tmp_path / "there", layout=other)
    convert(tmp_path / "there", tmp_path / "back", layout=layout)
    assert_same(raw(tmp_path / "dst"), raw(tmp_path / "back"))


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    config = QWEN3 | {"model_type": "llama4"}
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    src = write(tmp_path / "src", config, dense_tensors(QWEN3) | {name: torch.randn(2, 64, 32).bfloat16()})
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor {name}: .*3-D"):
        convert(src, tmp_path / "dst")
    convert(src, tmp_path / "dst", ignore=("lm_head", "*.experts"))
    assert load(tmp_path / "dst")[name].shape == (2, 64, 32)


def test_columns_that_are_no_multiple_of_16(tmp_path: Path) -> None:
    config = QWEN3 | {"intermediate_size": 40}
    src = write(tmp_path / "src", config, dense_tensors(config))
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.\d\.mlp\.down_proj\.weight: is \[64, 40\].*16"):
        convert(src, tmp_path / "dst")
    convert(src, tmp_path / "dst", ignore=("lm_head", "down_proj"))
    assert load(tmp_path / "dst")["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(("value", "message"), [(0.0, "all zeros"), (float("nan"), "nan"), (float("inf"), "inf")])
@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.q_proj"])
def test_weights_that_cannot_be_quantized(tmp_path: Path, name: str, value: float, message: str) -> None:
    dense = dense_tensors(QWEN3)
    name = f"model.layers.1.{name}.weight"
    dense[name] = torch.full_like(dense[name], value)
    src = write(tmp_path / "src", QWEN3, dense)
    if value == 0 and "q_proj" in name:  # k and v give it a global scale
        convert(src, tmp_path / "dst")
        assert not nvfp4.dequantize(load(tmp_path / "dst")[name]).any()
        return
    with pytest.raises(CheckpointError, match=f"tensor {name}: cannot be quantized: .*{message}"):
        convert(src, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


# The two layouts


def test_modelopt_to_compressed_tensors_and_back(calibrated: Path, tmp_path: Path) -> None:
    convert(calibrated, tmp_path / "there", layout="compressed-tensors")
    convert(tmp_path / "there", tmp_path / "back")
    assert_same(raw(calibrated), raw(tmp_path / "back"))
    assert quantization_of(tmp_path / "back").kv_cache == "fp8"
    ours, theirs = load(calibrated), load(tmp_path / "there")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not isinstance(value, NVFP4Tensor):
            assert same_bytes(value, theirs[name]), name
            continue
        assert same_bytes(value.packed, theirs[name].packed)
        assert same_bytes(value.global_scale, theirs[name].global_scale)
        assert same_bytes(theirs[name].divisor, value.global_scale.reciprocal())


def test_compressed_tensors_to_modelopt_and_back(calibrated: Path, tmp_path: Path) -> None:
    convert(calibrated, tmp_path / "start", layout="compressed-tensors")
    file = tmp_path / "start" / "model.safetensors"
    tensors = load_file(file)
    for i, name in enumerate(tensors):
        if name.endswith("global_scale"):
            tensors[name] = torch.tensor([1000.0 + i / 7])
        elif name.endswith(("k_scale", "v_scale")):
            tensors[name] = torch.tensor([1.5], dtype=torch.bfloat16)  # as llm-compressor stores them
    save_file(tensors, file)
    convert(tmp_path / "start", tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", layout="compressed-tensors")
    assert_same(tensors, raw(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "again")
    assert_same(raw(tmp_path / "there"), raw(tmp_path / "again"))


@settings(deadline=None)
@given(st.floats(2**-120, 2**120, width=32))
def test_scales_survive_the_other_layout(value: float) -> None:
    for layout, other in (LAYOUTS, LAYOUTS[::-1]):
        scale = torch.tensor(value).reshape(() if layout == "modelopt" else 1)
        there = translate(scale, "global_scale", other)
        assert same_bytes(there, scale.reciprocal().reshape(there.shape))
        kept = unpack_originals(pack_originals({"t": scale}))
        assert same_bytes(original_of("t", there, "global_scale", other, kept), scale)
        assert original_of("t", there * 1.5, "global_scale", other, kept) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"t": 1}',
        '{"t": ["float32", [], "00"]}',
        '{"t": ["int7", [], ""]}',
        '{"t": ["float32", [9], "00000000"]}',
    ],
)
def test_unreadable_originals_are_left_out(text: str) -> None:
    assert unpack_originals({exact_module.METADATA_KEY: text}) == {}


def test_originals_are_used_only_if_they_fit(calibrated: Path, tmp_path: Path) -> None:
    convert(calibrated, tmp_path / "there", layout="compressed-tensors")
    file = tmp_path / "there" / "model.safetensors"
    tensors = load_file(file)
    forged = {name: torch.tensor(3.0) for name in tensors if name.endswith("global_scale")}
    save_file(tensors, file, metadata=pack_originals(forged))
    for name, value in load(tmp_path / "there").items():
        if isinstance(value, NVFP4Tensor):
            stored = tensors[name.replace(".weight", ".weight_global_scale")]
            assert same_bytes(value.global_scale, stored.reciprocal().reshape(()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kv_cache(source: Path, tmp_path: Path, layout: str) -> None:
    convert(source, tmp_path / "dst", layout=layout, kv_cache="fp8")
    prefix, shape = "model.layers.1.self_attn.", (() if layout == "modelopt" else (1,))
    stored = f"{prefix}v_proj.v_scale" if layout == "modelopt" else f"{prefix}v_scale"
    assert same_bytes(raw(tmp_path / "dst")[stored], torch.ones(shape))
    assert same_bytes(load(tmp_path / "dst")[f"{prefix}v_proj.v_scale"], torch.tensor(1.0))
    assert quantization_of(tmp_path / "dst").kv_cache == "fp8"
    # The same in two steps.
    convert(source, tmp_path / "first", layout=layout)
    assert quantization_of(tmp_path / "first").kv_cache is None
    convert(tmp_path / "first", tmp_path / "second", layout=layout, kv_cache="fp8")
    assert_same(raw(tmp_path / "dst"), raw(tmp_path / "second"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_producer_is_an_object_with_a_name(source: Path, tmp_path: Path, layout: str) -> None:
    path = convert(source, tmp_path / "dst", layout=layout).path
    producer = json.loads((path / "config.json").read_text())["quantization_config"]["producer"]
    assert producer["name"] == quantization_of(path).producer == "adallm"  # vLLM reads producer.get("name")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["producer"] = "somebody"
    (path / "config.json").write_text(json.dumps(config))
    assert quantization_of(path).producer == "somebody"


def mixed_directory(path: Path) -> Path:
    """ModelOpt MIXED_PRECISION: FP8 attention, by tensor in layer 0 and by channel in layer 1; NVFP4 MLP."""
    tensors, layers = dense_tensors(QWEN3), {}
    for name in [name for name in tensors if "_proj" in name]:
        module, weight = name.removesuffix(".weight"), tensors.pop(name)
        if ".mlp." in name:
            t = nvfp4.quantize(weight)
            parts = {"weight": t.packed, "weight_scale": t.scale, "weight_scale_2": t.global_scale}
            layers[module] = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        elif ".0." in name:
            scale = weight.abs().amax().float() / 448
            parts = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
            parts["input_scale"] = torch.tensor(0.3)
            layers[module] = {"quant_algo": "FP8"}
        else:
            scale = weight.abs().amax(1).float() / 448
            parts = {"weight": (weight / scale[:, None]).to(torch.float8_e4m3fn), "weight_scale": scale}
            layers[module] = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    write(path, QWEN3 | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}}, tensors)
    quantization = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    (path / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": quantization}))
    return path


def test_mixed_precision(tmp_path: Path) -> None:
    src = mixed_directory(tmp_path / "mixed")
    assert len(quantization_of(src).groups) == 3
    convert(src, tmp_path / "there", layout="compressed-tensors")
    there = quantization_of(tmp_path / "there")
    assert there.algorithm == "mixed-precision"
    assert {rf"re:^model\.layers\.\d+\.mlp\.{name}$" for name in MLP} in [set(group.targets) for group in there.groups]
    convert(tmp_path / "there", tmp_path / "back")
    assert_same(raw(src), raw(tmp_path / "back"))
    tensors = raw(src)
    for path in (src, tmp_path / "there"):
        dense = load_dense(path, torch.float32)
        for i in range(2):
            name = f"model.layers.{i}.self_attn.q_proj"
            scale = tensors[f"{name}.weight_scale"].reshape(1 if i == 0 else -1, 1)
            assert torch.equal(dense[f"{name}.weight"], tensors[f"{name}.weight"].float() * scale)
        assert dense.keys() == dense_tensors(QWEN3).keys()
        assert isinstance(load(path)["model.layers.0.mlp.up_proj.weight"], NVFP4Tensor)
        assert load(path)["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn


def test_schemes_that_modelopt_has_no_word_for(tmp_path: Path) -> None:
    convert(mixed_directory(tmp_path / "mixed"), tmp_path / "there", layout="compressed-tensors")

    def weights_only(config: dict) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group.update(input_activations=None, format=group["format"].replace("float-", "naive-"))

    edit_json(tmp_path / "there" / "config.json", weights_only)
    assert load(tmp_path / "there")
    with pytest.raises(ValueError, match=r"layers\.\d\.self_attn\.\w_proj has .*no algorithm"):
        convert(tmp_path / "there", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_parts_of_a_layer_in_different_files(calibrated: Path, tmp_path: Path) -> None:
    tensors, config = raw(calibrated), json.loads((calibrated / "config.json").read_text())
    split = write(tmp_path / "split", config, tensors, shards=5)
    shutil.copy(calibrated / "hf_quant_config.json", split)
    dense = load_dense(split)
    assert all(torch.equal(value, dense[name]) for name, value in load_dense(calibrated).items())
    convert(split, tmp_path / "there", layout="compressed-tensors")
    convert(tmp_path / "there", tmp_path / "back")
    assert_same(tensors, raw(tmp_path / "back"))


# Reading


def test_load_dense_and_inspect(calibrated: Path) -> None:
    loaded, dense = load(calibrated), load_dense(calibrated, torch.float32)
    assert dense.keys() == dense_tensors(QWEN3).keys()
    for name, value in dense.items():
        expected = loaded[name]
        expected = nvfp4.dequantize(expected) if isinstance(expected, NVFP4Tensor) else expected.float()
        assert torch.equal(value, expected)
    rows = {row.name: row for row in checkpoint.inspect(calibrated)}
    row = rows["model.layers.0.mlp.down_proj.weight"]
    assert (row.format, row.shape, row.nbytes) == ("nvfp4", (64, 96), 64 * 48 + 64 * 6 + 8)
    assert row.bits_per_weight == 8 * row.nbytes / (64 * 96)
    assert sum(row.nbytes for row in rows.values()) == sum(value.nbytes for value in raw(calibrated).values())


def test_links_as_in_a_hub_cache(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    shutil.move(source, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert load(snapshot).keys() == dense_tensors(QWEN3).keys()
    convert(snapshot, tmp_path / "dst")
    assert not any(path.is_symlink() for path in (tmp_path / "dst").iterdir())


def test_dense_directory(source: Path) -> None:
    assert quantization_of(source) is None
    assert_same(load(source), dense_tensors(QWEN3))
    assert load_dense(source, None)["model.norm.weight"].dtype == torch.bfloat16


# Writing


def test_one_shard_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never two files open, and never more bytes alive than the largest file has."""
    real, state = header_module.safe_open, {"open": 0, "alive": 0, "peak": 0}

    class Counted:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            state["open"] += 1
            assert state["open"] == 1
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *error):
            state["open"] -= 1
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            tensor = self.inner.get_tensor(name)
            state["alive"] += tensor.nbytes
            state["peak"] = max(state["peak"], state["alive"])
            weakref.finalize(tensor, lambda nbytes=tensor.nbytes: state.update(alive=state["alive"] - nbytes))
            return tensor

    monkeypatch.setattr(header_module, "safe_open", Counted)
    sizes = [sum(value.nbytes for value in load_file(file).values()) for file in source.glob("*.safetensors")]
    convert(source, tmp_path / "mo", kv_cache="fp8")
    assert 0 < state["peak"] <= max(sizes)
    convert(tmp_path / "mo", tmp_path / "ct", layout="compressed-tensors")
    assert state["peak"] <= max(sizes)
    assert state["alive"] == 0


@pytest.mark.parametrize("error", [RuntimeError, OSError])
@pytest.mark.parametrize("calls", [0, 2])
def test_errors_leave_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type, calls: int
) -> None:
    from adallm.checkpoint import writer

    real, count = writer.save_file, iter(range(9))

    def failing(*args, **kwargs):
        if next(count) == calls:
            raise error
        real(*args, **kwargs)
        assert not (tmp_path / "dst").exists()
        assert not list(tmp_path.glob(".dst*/config.json"))

    monkeypatch.setattr(writer, "save_file", failing)
    with pytest.raises(error):
        convert(source, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("rule", ["max", "mse"])
def test_interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """The same call goes on behind what was finished; another one begins anew."""
    from adallm.checkpoint import writer

    real, written, last = writer.save_file, [], []

    def counting(tensors, path, **options):
        if last and len(written) == last[0]:
            # As a kill would leave it.
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(path.name)
        real(tensors, path, **options)

    monkeypatch.setattr(writer, "save_file", counting)
    whole = convert(source, tmp_path / "whole", scale_rule=rule)
    assert len(written) == 3
    last.append(5)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dst", scale_rule=rule)
    (partial,) = tmp_path.glob(".dst.*.partial")
    assert not (tmp_path / "dst").exists()
    assert not (partial / "config.json").exists()
    last.clear()
    other = convert(source, tmp_path / "dst", scale_rule="four_over_six")
    assert written[5:] == written[:3]
    shutil.rmtree(other.path)
    # A finished file that was damaged since is written again.
    first = partial / written[0].removesuffix(".partial")
    first.write_bytes(first.read_bytes()[:-1])
    done = convert(source, tmp_path / "dst", scale_rule=rule)
    assert written[8:] == [written[0], written[2]]
    assert (done.nbytes, done.quantized) == (whole.nbytes, whole.quantized)
    names = sorted(path.name for path in whole.path.iterdir())
    assert sorted(path.name for path in done.path.iterdir()) == names
    for name in names:
        assert (done.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "source", "whole"]


def test_a_source_that_changed_begins_anew(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adallm.checkpoint import writer

    real, written = writer.save_file, []

    def interrupted(tensors, path, **options):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path.name)
        real(tensors, path, **options)

    monkeypatch.setattr(writer, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dst")
    monkeypatch.setattr(writer, "save_file", real)
    (file, *_) = sorted(source.glob("*.safetensors"))
    save_file({name: -value for name, value in load_file(file).items()}, file)
    done = convert(source, tmp_path / "dst")
    expected = convert(source, tmp_path / "expected")
    assert_same(raw(done.path), raw(expected.path))


def test_two_at_the_same_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adallm.checkpoint import writer

    real, calls = writer.save_file, []

    def nested(tensors, path, **options):
        if not calls:
            calls.append(path)
            with pytest.raises(OSError, match="dst is being written by another process"):
                convert(source, tmp_path / "dst")
        real(tensors, path, **options)

    monkeypatch.setattr(writer, "save_file", nested)
    assert convert(source, tmp_path / "dst").path.is_dir()


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_existing_destination(source: Path, tmp_path: Path, kind: str) -> None:
    dst = tmp_path / "dst"
    {"file": dst.touch, "directory": dst.mkdir, "dangling link": lambda: dst.symlink_to("nowhere")}[kind]()
    with pytest.raises(FileExistsError, match="dst already exists"):
        convert(source, dst)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "source"]


def test_no_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="1000 bytes free, but dst needs"):
        convert(source, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_companions(source: Path, tmp_path: Path) -> None:
    kept = [
        "tokenizer.json",
        "generation_config.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer.model",
        "LICENSE",
    ]
    left = [
        "pytorch_model.bin",
        "x.pt",
        "optimizer.pth",
        "model.py",
        "x.pkl",
        ".hidden.json",
        "pytorch_model.bin.index.json",
    ]
    for name in kept + left:
        (source / name).write_text(name)
    convert(source, tmp_path / "dst")
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    assert names >= set(kept)
    assert not names & set(left)
    assert (tmp_path / "dst").stat().st_mode & 0o777 == source.stat().st_mode & 0o777
    assert all(path.stat().st_mode & 0o400 for path in (tmp_path / "dst").iterdir())


def test_bad_options(source: Path, calibrated: Path, tmp_path: Path) -> None:
    bad = [("layout", "gguf"), ("kv_cache", "int8"), ("scale_rule", "best"), ("ignore", ["re:("]), ("ignore", "x")]
    for option, value in bad:
        with pytest.raises(ValueError, match="pattern" if value == ["re:("] else option):
            convert(source, tmp_path / "dst", **{option: value})
    with pytest.raises(ValueError, match="quantized already"):
        convert(calibrated, tmp_path / "dst", ignore=("lm_head", "o_proj"))
    with pytest.raises(ValueError, match="no linear layer"):
        convert(source, tmp_path / "dst", ignore=("*",))
    assert not (tmp_path / "dst").exists()


def test_importance_that_does_not_fit(source: Path, tmp_path: Path) -> None:
    columns = {name: x.shape[1] for name, x in load_dense(source, None).items() if x.dim() == 2}
    whole = {name.removesuffix(".weight"): torch.ones(k) for name, k in columns.items()}
    first = "model.layers.0.mlp.down_proj"
    for importance, message in (
        ({}, r"model\.layers\.0\.\w+\.\w+_proj: scale_rule 'imatrix' needs importance"),
        ({name: x for name, x in whole.items() if name != first}, f"{first}: scale_rule 'imatrix' needs importance"),
        (whole | {first: torch.ones(3)}, rf"{first}: importance is torch.float32 \[3\]"),
        (whole | {first: torch.full((columns[f"{first}.weight"],), -1.0)}, rf"{first}: importance\[0\] is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "dst", scale_rule="imatrix", importance=importance)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\w+\.\w+_proj: scale_rule 'mse' takes no"):
        convert(source, tmp_path / "dst", scale_rule="mse", importance=whole)
    assert not (tmp_path / "dst").exists()


def test_names() -> None:
    assert fused_group("a.q_proj") == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert fused_group("a.o_proj") == ("a.o_proj",)
    name = "model.layers.0.self_attn.k_scale"
    assert modelopt_kv_name(name) == "model.layers.0.self_attn.k_proj.k_scale"
    assert compressed_tensors_kv_name(modelopt_kv_name(name)) == name
    patterns = Patterns(["lm_head", "model.layers.1", "*.mlp.gate", "re:vision.*x"])
    for module in ("lm_head", "language_model.lm_head", "model.layers.1.mlp.up_proj", "m.mlp.gate", "vision.a.x"):
        assert patterns.match(module), module
    for module in ("model.layers.11.mlp.up_proj", "m.mlp.gate_proj", "my_lm_head", "a.vision.x"):
        assert patterns.match(module) is None, module


# Others read it


@pytest.mark.parametrize("case", ["tied", "untied", "from-modelopt", "mixed"])
def test_transformers_gets_the_same_weights(tmp_path: Path, calibrated: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3Config, Qwen3ForCausalLM

    dst = tmp_path / "dst"
    if case in ("tied", "untied"):
        sizes = {"hidden_size": 128, "vocab_size": 512, "intermediate_size": 256, "head_dim": 32}
        config = Qwen3Config(**{**QWEN3, **sizes, "tie_word_embeddings": case == "tied"})
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "src", max_shard_size="400KB")
        assert (tmp_path / "src" / "model.safetensors.index.json").exists()
        convert(tmp_path / "src", dst, layout="compressed-tensors", kv_cache="fp8")
    else:
        src = calibrated if case == "from-modelopt" else mixed_directory(tmp_path / "mixed")
        convert(src, dst, layout="compressed-tensors")
    # compressed-tensors compiles its unpacking, which would need a C++ compiler on this machine.
    with torch.compiler.set_stance("force_eager"):
        model, info = AutoModelForCausalLM.from_pretrained(
            dst, quantization_config=CompressedTensorsConfig(dequantize=True), dtype="auto", output_loading_info=True
        )
    assert not any(info.values()), info
    theirs, ours, stored = model.state_dict(), load_dense(dst, torch.bfloat16), raw(dst)
    for name, value in ours.items():
        if stored.get(name, value).dtype == torch.float8_e4m3fn:
            # transformers rounds the FP32 scale of an FP8 layer to the model's dtype; we do not.
            value = stored[name].bfloat16() * stored[f"{name}_scale"].bfloat16()
        assert same_bytes(theirs[name], value), name
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
