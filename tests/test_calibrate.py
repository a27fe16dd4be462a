"""``calibrate.py`` and ``checkpoint/kv_scales.py``: scales of an FP8 KV cache, computed from text and written."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from adallm import calibrate as calibrate_module
from adallm import checkpoint, hf_model, windows
from adallm.calibrate import Magnitudes, calibrate
from adallm.checkpoint.emit import with_fp8_kv_cache
from adallm.checkpoint.exact import same_bytes
from adallm.cli import main
from adallm.hf_model import FORMATS
from adallm.tiny import corpus
from adallm.tiny.corpus import Document

MODEL = Path(calibrate_module.__file__).parent / "tiny" / "model"
LAYOUTS = ("modelopt", "compressed-tensors")
LAYERS = 7
TOKENS = 2500


def raw(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def is_scale(name: str) -> bool:
    return name.endswith((".k_scale", ".v_scale"))


def edit_json(file: Path, edit) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """About 6,000 tokens, with characters beyond ASCII."""
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("# größer, 大\n" + Path(corpus.__file__).read_text() * 3, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ids(text) -> list[int]:
    found = AutoTokenizer.from_pretrained(MODEL)(text.read_text(encoding="utf-8"), verbose=False).input_ids[:TOKENS]
    assert len(found) == TOKENS > 2048
    return found


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> dict[str, Path]:
    """The bundled model; one layout with an FP8 KV cache declared, the other without."""
    root = tmp_path_factory.mktemp("quantized")
    kv = dict(zip(LAYOUTS, ("fp8", None), strict=True))
    return {layout: checkpoint.convert(MODEL, root / layout, layout=layout, kv_cache=kv[layout]).path for layout in kv}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, quantized, text) -> dict[str, calibrate_module.Calibration]:
    root = tmp_path_factory.mktemp("calibrated")
    return {layout: calibrate(quantized[layout], root / layout, text=[text], tokens=TOKENS) for layout in LAYOUTS}


def small_model(path: Path, edit=None, *, dtype: torch.dtype = torch.bfloat16, ignore=("lm_head",), **options) -> Path:
    """A random Qwen3 of two layers, the second with a sliding window of 64, and the bundled tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.pop("vocab_size", 4096), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False, use_sliding_window=True,
        sliding_window=64, max_window_layers=1, max_position_embeddings=256, **options,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(dtype)
    if edit:
        with torch.no_grad():
            edit(model.model.layers)
    dense = path.with_name(f"{path.name}-dense")
    model.save_pretrained(dense)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, dense)
    return checkpoint.convert(dense, path, ignore=ignore).path


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary position embedding of ``[T, H, D]`` at positions 0 to T-1, in the dtype of x."""
    angles = torch.outer(torch.arange(len(x)).float(), theta ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    cos, sin = (f(torch.cat([angles, angles], -1)).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def keys_and_values(directory: Path, ids: list[int], length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What enters the cache of each layer, by the outputs of k_norm and v_proj and the formula of RoPE."""
    model = hf_model.load(directory, FORMATS["nvfp4"])
    theta, found = model.config.rope_parameters["rope_theta"], [([], []) for _ in model.model.layers]
    for layer, (keys, values) in zip(model.model.layers, found, strict=True):
        attention, heads = layer.self_attn, (-1, model.config.num_key_value_heads, model.config.head_dim)
        attention.k_norm.register_forward_hook(
            lambda _, __, out, keys=keys, heads=heads: keys.append(rotated(out.reshape(heads), theta))
        )
        attention.v_proj.register_forward_hook(
            lambda _, __, out, values=values, heads=heads: values.append(out.reshape(heads))
        )
    with torch.no_grad():
        for i in range(0, len(ids), length):
            model(torch.tensor([ids[i : i + length]]), use_cache=False)
    return [(torch.cat(keys), torch.cat(values)) for keys, values in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_amax_over_448_of_what_enters_the_cache(calibrated, quantized, ids, layout):
    done = calibrated[layout]
    assert (done.tokens, done.windows, len(done.layers)) == (TOKENS, 2, LAYERS)
    loaded = checkpoint.load(done.path)
    for i, (k, v) in enumerate(keys_and_values(quantized[layout], ids, 2048)):
        layer, name = done.layers[i], f"model.layers.{i}.self_attn"
        assert layer.name == name
        assert (layer.k_amax, layer.v_amax) == (float(k.abs().max()), float(v.abs().max()))
        assert same_bytes(loaded[f"{name}.k_proj.k_scale"], k.abs().max().float() / 448)
        assert same_bytes(loaded[f"{name}.v_proj.v_scale"], v.abs().max().float() / 448)
        assert (layer.k_scale, layer.v_scale) == tuple(float(loaded[f"{name}.{s}_proj.{s}_scale"]) for s in "kv")
        assert layer.k_saturated == layer.v_saturated == 0


def test_percentile(quantized, ids, text, tmp_path):
    done = calibrate(quantized["modelopt"], tmp_path / "dst", text=text, tokens=TOKENS, method="percentile")
    for layer, sides in zip(done.layers, keys_and_values(quantized["modelopt"], ids, 2048), strict=True):
        for x, scale, saturated in zip(
            sides, (layer.k_scale, layer.v_scale), (layer.k_saturated, layer.v_saturated), strict=True
        ):
            ascending = x.abs().flatten().sort().values.float()
            clip = ascending[-(-len(ascending) * 9999 // 10000) - 1]
            assert scale == float(clip / 448)
            assert saturated == float((ascending > clip).double().mean()) <= 1e-4
    assert any(layer.v_saturated for layer in done.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_percentiles_are_exact(dtype):
    x = torch.randn(3, 7, 991) * torch.logspace(-6, 3, 991)
    x[0, 0, :5] = torch.tensor([0.0, -0.0, 1e-7, -6e-8, 60000.0])
    x = x.bfloat16().float() if dtype == torch.float32 else x.to(dtype)
    magnitudes = Magnitudes()
    for part in x:
        magnitudes.add(part.T)
    values = x.abs().flatten().double().numpy()
    assert magnitudes.amax == values.max()
    for percentile in (1e-9, 0.1, 1, 33.3, 50, 90, 99, 99.9, 99.99, 100):
        expected = np.quantile(values, percentile / 100, method="inverted_cdf")
        assert magnitudes.percentile(percentile) == expected
        assert magnitudes.scale("percentile", percentile)[1] == (values > (expected or 448)).mean()
    nearest = torch.quantile(x.abs().flatten().double()[:10001], 0.9, interpolation="nearest")
    few = Magnitudes()
    few.add(x.flatten()[:10001])
    assert few.percentile(90) == nearest  # rank 9001 of 10001 by either definition


def test_magnitudes_at_the_ends():
    zeros = Magnitudes()
    zeros.add(torch.zeros(8, dtype=torch.bfloat16))
    assert zeros.scale("max", 99.99) == zeros.scale("percentile", 99.99) == (1.0, 0.0)
    # A percentile of 0 below an amax that is not: the scale of 1 is what the share is for.
    mostly = Magnitudes()
    mostly.add(torch.tensor([0.0] * 8 + [1.0, 500.0], dtype=torch.float16))
    assert mostly.scale("percentile", 50) == (1.0, 0.1)
    # FP32 beyond the largest BF16 number, to which it would round up to infinity.
    huge = Magnitudes()
    huge.add(torch.tensor([3.4e38]))
    assert huge.percentile(100) == huge.amax == float(torch.tensor(3.4e38))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="2 of 3 are not finite"):
            Magnitudes().add(torch.tensor([bad, 1.0, bad]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_else_changes(calibrated, quantized, layout):
    path, source = calibrated[layout].path, quantized[layout]
    before, after = raw(source), raw(path)
    scales = {name for name in after if is_scale(name)}
    assert len(scales) == 2 * LAYERS
    shape, prefix = ((), ("k_proj.", "v_proj.")) if layout == "modelopt" else ((1,), ("", ""))
    for i in range(LAYERS):
        for side, between in zip("kv", prefix, strict=True):
            value = after[f"model.layers.{i}.self_attn.{between}{side}_scale"]
            assert (value.dtype, value.shape) == (torch.float32, shape)
    assert after.keys() - scales == {name for name in before if not is_scale(name)}
    for name in after.keys() - scales:
        assert same_bytes(after[name], before[name]), name
    files = {file.name for file in path.iterdir()}
    assert files == {file.name for file in source.iterdir()}
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == after.keys()
    configs = [json.loads((directory / "config.json").read_text()) for directory in (source, path)]
    kv = [config["quantization_config"].pop("kv_cache_scheme", None) for config in configs]
    assert configs[0] == configs[1]
    assert (kv[1]["num_bits"], kv[1]["type"], kv[1]["dynamic"]) == (8, "float", False)
    assert checkpoint.quantization_of(path).kv_cache == "fp8"
    assert {row.format for row in checkpoint.inspect(path) if is_scale(row.name)} == {"f32"}


def test_both_layouts_get_the_scales_from_their_own_weights(calibrated):
    # The two compute (e2m1 * scale) * global_scale and e2m1 * (scale / divisor): not always the same FP32 weight.
    for a, b in zip(calibrated["modelopt"].layers, calibrated["compressed-tensors"].layers, strict=True):
        assert a.k_scale == pytest.approx(b.k_scale, rel=0.05)
        assert a.v_scale == pytest.approx(b.v_scale, rel=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversions_and_evaluation_keep_the_scales(calibrated, tmp_path, layout):
    path, (other,) = calibrated[layout].path, (name for name in LAYOUTS if name != layout)
    expected = {name: value for name, value in checkpoint.load(path).items() if is_scale(name)}
    checkpoint.convert(path, tmp_path / "there", layout=other)
    checkpoint.convert(tmp_path / "there", tmp_path / "back", layout=layout)
    for directory in (tmp_path / "there", tmp_path / "back"):
        found = checkpoint.load(directory)
        assert all(same_bytes(found[name], value) for name, value in expected.items())
    assert raw(tmp_path / "back").keys() == raw(path).keys()
    model = hf_model.load(path, FORMATS["nvfp4-fp8kv"])
    for i, layer in enumerate(calibrated[layout].layers):
        attention = model.model.layers[i].self_attn
        assert (attention._adallm_k_scale, attention._adallm_v_scale) == (layer.k_scale, layer.v_scale)


def test_again_is_the_same_and_replaces_what_is_there(calibrated, text, tmp_path):
    first = calibrated["compressed-tensors"]
    second = calibrate(first.path, tmp_path / "again", text=[text], tokens=TOKENS)
    assert second.layers == first.layers
    for file in first.path.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sliding_windows_and_other_dtypes(tmp_path, ids, text, dtype):
    source = small_model(tmp_path / "src", dtype=dtype)
    done = calibrate(source, tmp_path / "dst", text=[text], tokens=600)
    assert (done.tokens, done.windows) == (600, 3)  # of the 256 tokens of its context
    for layer, (k, v) in zip(done.layers, keys_and_values(source, ids[:600], 256), strict=True):
        assert (layer.k_amax, layer.v_amax) == (float(k.abs().max()), float(v.abs().max()))
        assert layer.k_scale == float(k.abs().max().float() / 448)


def test_no_values_give_a_scale_of_one(tmp_path, text):
    source = small_model(
        tmp_path / "src", lambda layers: layers[0].self_attn.v_proj.weight.zero_(), ignore=("lm_head", "*.v_proj")
    )
    done = calibrate(source, tmp_path / "dst", text=[text], tokens=512)
    assert (done.layers[0].v_amax, done.layers[0].v_scale) == (0.0, 1.0)
    assert done.layers[1].v_amax > 0


@pytest.mark.parametrize(
    ("what", "edit"),
    [
        ("keys", lambda layers: layers[1].self_attn.k_norm.weight[3].fill_(math.nan)),
        ("values", lambda layers: layers[1].self_attn.v_proj.weight.fill_(3e38)),
    ],
)
def test_keys_and_values_that_are_not_finite(tmp_path, text, what, edit):
    source = small_model(tmp_path / "src", edit, ignore=("lm_head", "*.v_proj"))
    with pytest.raises(ValueError, match=rf"^model\.layers\.1\.self_attn: {what}: \d+ of \d+ are not finite"):
        calibrate(source, tmp_path / "dst", text=[text], tokens=512)
    assert not (tmp_path / "dst").exists()


def test_the_corpus_without_held_out_text(monkeypatch):
    splits = {
        "heldout": [Document("a.py", "heldout")],
        "train": [Document("b.py", "train"), Document("test/test_b.py", "test")],
        "validation": [Document("c.py", "validation")],
    }
    monkeypatch.setattr(corpus, "load", lambda: splits)
    assert list(windows._documents(())) == ["validation", "train"]


def test_the_command_has_the_defaults_of_the_function(monkeypatch, capsys):
    given = {}
    done = calibrate_module.Calibration(Path("dst"), 0, 0, ())
    monkeypatch.setattr(calibrate_module, "calibrate", lambda *paths, **options: given.update(options) or done)
    assert main(["calibrate", "model", "dst"]) == 0
    assert (given["tokens"], given["method"], given["percentile"]) == (calibrate_module.TOKENS, "max", None)
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    said = capsys.readouterr().out
    assert f"{{{','.join(calibrate_module.METHODS)}}}" in said
    assert f"(default: {calibrate_module.PERCENTILE})" in " ".join(said.split())


def test_long_files_are_read_in_pieces(monkeypatch, tmp_path):
    (tmp_path / "a").write_text("abcdefgh", encoding="utf-8")
    (tmp_path / "b").write_text("ij", encoding="utf-8")
    monkeypatch.setattr(windows, "_PIECE", 3)
    assert list(windows._documents([tmp_path / "a", tmp_path / "b"])) == ["abc", "def", "gh", "ij"]


OPTIONS = [
    ({"method": "mean"}, "method 'mean'; supported: max, percentile"),
    ({"percentile": 99.0}, "percentile 99.0 means nothing for method 'max'"),
    ({"method": "percentile", "percentile": 0}, "percentile 0.0; it must be above 0 and at most 100"),
    ({"method": "percentile", "percentile": 100.1}, "percentile 100.1; it must be"),
    ({"method": "percentile", "percentile": math.nan}, "percentile nan; it must be"),
    ({"tokens": 511}, "tokens 511; calibration needs at least 512"),
    ({"text": ["short"]}, "short: 3 tokens of text; calibration needs at least 512"),
    ({"text": ["latin"]}, "latin is not UTF-8"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_bad_options(quantized, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(hf_model, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "short").write_text("import os\n")
    (tmp_path / "latin").write_bytes(b"gr\xf6\xdfer " * 1000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        calibrate(quantized["modelopt"], "dst", **options)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "latin", tmp_path / "short"]


def test_an_existing_destination(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "attention_layers", lambda _: pytest.fail("the model was opened"))
    with pytest.raises(FileExistsError, match="already exists"):
        calibrate(MODEL, tmp_path)


def unsupported(case: str, root: Path, quantized: dict[str, Path]) -> tuple[Path, str]:
    """A directory that is refused, and what the message has to say."""
    path = root / "src"
    if case == "dense":
        return (
            MODEL,
            "is not quantized.*supported: quantized checkpoints in the layouts modelopt and compressed-tensors",
        )
    layout = "compressed-tensors" if case in ("int8 cache", "scales for heads") else "modelopt"
    shutil.copytree(quantized[layout], path)
    if case == "no tokenizer":
        for file in path.glob("tokenizer*"):
            file.unlink()
        return path, "src: its tokenizer has no vocabulary; is tokenizer.json missing"
    if case == "other code":
        edit_json(path / "config.json", lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "mine.Config"}))
        (path / "mine.py").write_text("raise SystemExit('ran')")
        return path, r"config or tokenizer cannot be loaded \(ValueError: The repository .* contains custom code"
    if case == "int8 cache":
        scheme = {"num_bits": 8, "type": "int", "strategy": "tensor"}
        edit_json(path / "config.json", lambda c: c["quantization_config"].update(kv_cache_scheme=scheme))
        return path, "declares a KV cache in 'int8'; supported: fp8"
    if case == "scales for heads":
        scheme = {"num_bits": 8, "type": "float", "strategy": "attn_head"}
        edit_json(path / "config.json", lambda c: c["quantization_config"].update(kv_cache_scheme=scheme))
        weight_map = {}
        for file in path.glob("*.safetensors"):
            tensors = load_file(file)
            projections = [name.split("_proj.weight_packed")[0] for name in tensors if name.endswith("_packed")]
            sides = [name for name in projections if name.endswith((".k", ".v"))]
            tensors |= {f"{name}_scale": torch.ones(2, 1, 1) for name in sides}
            save_file(tensors, file)
            weight_map |= dict.fromkeys(tensors, file.name)
        edit_json(path / "model.safetensors.index.json", lambda index: index.update(weight_map=weight_map))
        return path, r"_scale has shape \[2, 1, 1\]; supported: one KV-cache scale for a layer"
    edit_json(path / "config.json", lambda c: c.update(model_type="unheard_of"))
    for file in path.glob("*.safetensors"):
        # One matrix for q, k and v, as some models store them.
        kept = {name.replace("k_proj", "kv_proj"): value for name, value in load_file(file).items()}
        save_file({name: value for name, value in kept.items() if "v_proj.v_" not in name}, file)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {n: f.name for f in path.glob("*.safetensors") for n in load_file(f)}})
    )
    return path, "model.layers.0.self_attn has no k_proj; supported: attention with k_proj and v_proj"


@pytest.mark.parametrize("case", ["dense", "no tokenizer", "other code", "int8 cache", "scales for heads", "no k_proj"])
def test_unsupported_models(quantized, text, tmp_path, monkeypatch, case):
    monkeypatch.setattr(hf_model, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    source, message = unsupported(case, tmp_path, quantized)
    with pytest.raises(ValueError, match=message):
        calibrate(source, tmp_path / "dst", text=[text])
    assert not (tmp_path / "dst").exists()


def test_a_tokenizer_of_another_model(tmp_path, text):
    source = small_model(tmp_path / "src", vocab_size=300)
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, but the model has 300"):
        calibrate(source, tmp_path / "dst", text=[text], tokens=512)


def test_a_layer_that_does_not_fill_the_cache(tmp_path, text, monkeypatch):
    source = small_model(tmp_path / "src")
    monkeypatch.setattr(checkpoint, "attention_layers", lambda _: ["model.layers.0.self_attn", "model.tower.0"])
    with pytest.raises(ValueError, match=r"nothing of model\.tower\.0 enters the cache of Qwen3ForCausalLM; supported"):
        calibrate(source, tmp_path / "dst", text=[text], tokens=512)


def test_write_kv_scales_takes_one_for_each_side_of_each_layer(tmp_path):
    source = small_model(tmp_path / "src")
    layers = checkpoint.attention_layers(source)
    assert layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    scales = {f"{layer}.{side}_proj.{side}_scale": 0.5 for layer in layers for side in "kv"}
    name = "model.layers.1.self_attn.v_proj.v_scale"
    cases = [({name: 0.0}, f"{name} is 0.0"), ({name: 1e-60}, "finite and positive FP32"), ({name: math.inf}, "is inf")]
    for change, message in [*cases, ({name: math.nan}, "is nan"), ({"x.k_scale": 1.0}, "x.k_scale is no scale")]:
        with pytest.raises(ValueError, match=message):
            checkpoint.write_kv_scales(source, tmp_path / "dst", scales | change)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        checkpoint.write_kv_scales(source, tmp_path / "dst", {k: v for k, v in scales.items() if k != name})
    assert not (tmp_path / "dst").exists()
    assert checkpoint.write_kv_scales(source, tmp_path / "dst", scales) == tmp_path / "dst"
    assert float(checkpoint.load(tmp_path / "dst")[name]) == 0.5


def test_what_a_conversion_kept_beside_a_scale_stays(tmp_path):
    """Global scales that the other layout cannot give back survive a calibration in between."""
    source = small_model(tmp_path / "src")
    there = checkpoint.convert(source, tmp_path / "there", layout="compressed-tensors").path
    names = [f"{layer}.{s}_proj.{s}_scale" for layer in checkpoint.attention_layers(there) for s in "kv"]
    between = checkpoint.write_kv_scales(there, tmp_path / "between", dict.fromkeys(names, 0.25))
    back = raw(checkpoint.convert(between, tmp_path / "back").path)
    for name, value in raw(source).items():
        assert same_bytes(back[name], value), name


def test_fp8_kv_cache_is_declared_in_every_form():
    fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    flat, nested = {"quant_algo": "NVFP4"}, {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}
    config, hf = with_fp8_kv_cache("modelopt", {"quantization_config": flat}, nested)
    assert config["quantization_config"] == flat | {"kv_cache_scheme": fp8}
    assert hf["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert nested["quantization"]["kv_cache_quant_algo"] is None  # a copy was changed
    assert with_fp8_kv_cache("modelopt", {"a": 1}, nested)[0] == {"a": 1}
    inner = {"text_config": {"quantization_config": flat | {"kv_cache_quant_algo": None}}}
    declared = with_fp8_kv_cache("modelopt", inner, None)[0]["text_config"]["quantization_config"]
    assert declared == flat | {"kv_cache_scheme": fp8, "kv_cache_quant_algo": "FP8"}
    config, hf = with_fp8_kv_cache("compressed-tensors", {"quantization_config": {"kv_cache_scheme": None}}, None)
    assert hf is None
    assert config["quantization_config"]["kv_cache_scheme"] == fp8 | {"strategy": "tensor", "symmetric": True}


def test_command(tmp_path, text, capsys):
    source = small_model(tmp_path / "src")
    dst = tmp_path / "dst"
    arguments = ["calibrate", str(source), str(dst), "--text", str(text), "--text", str(text), "--tokens", "512"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert len(lines) == 1 + 2 + 1
    assert lines[-1] == f"{dst}: KV-cache scales of 2 layers, from 512 tokens"
    # Calibration and files. How often a bar is drawn anew depends on the machine.
    bars = captured.err.strip().split("\n")
    assert ["100%" in bar.rpartition("\r")[2] for bar in bars] == [True, True]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"adallm: error: {dst} already exists\n"
    arguments[2] = str(tmp_path / "other")
    assert main([*arguments, "--quiet", "--method", "percentile", "--percentile", "90"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[0].split("  ")[-2:] == ["k saturated", "v saturated"]
    assert 9 < float(captured.out.splitlines()[1].split()[-1].removesuffix("%")) <= 10


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_loads_the_scales(calibrated, monkeypatch):
    """vLLM itself, its NVFP4 kernel alone replaced by a product with the dequantized weight: a CPU has none."""
    for name, value in {
        "ENABLE_V1_MULTIPROCESSING": "0", "CPU_OMP_THREADS_BIND": "nobind", "CPU_KVCACHE_SPACE": "1",
        "LOGGING_LEVEL": "ERROR",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"VLLM_{name}", value)
    vllm = pytest.importorskip("vllm", reason="needs vLLM")
    if torch.cuda.is_available() or not torch.cpu._is_avx512_supported():
        pytest.skip("needs vLLM's CPU build and AVX-512 for its FP8 KV cache")
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    class Dequantized(linear.EmulationNvFp4LinearKernel):
        def apply_weights(self, layer, x, bias=None):
            scales = (layer.weight_scale.data, layer.weight_global_scale)
            weight = dequantize_to_dtype(layer.weight.data, *scales, x.dtype, 16, swizzle=False)
            return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(linear, "MarlinNvFp4LinearKernel", Dequantized)
    for layout in LAYOUTS:
        done = calibrated[layout]
        engine = vllm.LLM(
            str(done.path), enforce_eager=True, distributed_executor_backend="uni", max_model_len=64, seed=0
        )
        model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
        for i, layer in enumerate(done.layers):
            attention = model.model.layers[i].self_attn.attn
            assert attention.kv_cache_dtype.startswith("fp8")
            for side in "kv":
                scale = getattr(layer, f"{side}_scale")
                # vLLM holds those of ModelOpt's layout in the dtype of the model.
                scale = scale if layout == "compressed-tensors" else float(torch.tensor(scale).bfloat16())
                assert float(getattr(attention, f"_{side}_scale")) == scale
                assert getattr(attention, f"_{side}_scale_float") == scale
        options = vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=0)
        (output,) = engine.generate("def __init__(self", options, use_tqdm=False)
        prompt, generated = output.prompt_token_ids, torch.tensor(output.outputs[0].token_ids)
        ours = hf_model.load(done.path, FORMATS["nvfp4-fp8kv"])
        with torch.no_grad():
            logits = ours(torch.tensor([[*prompt, *generated]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, generated[:, None]).sum()
        assert output.outputs[0].cumulative_logprob == pytest.approx(float(expected), abs=0.5)
        del engine, model
