"""``calibrated.py``, ``walk.py``: rules that know a layer's inputs from text."""

import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_calibrate import MODEL, raw
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adallm import calibrated, checkpoint, gptq, nvfp4, quantizers, walk
from adallm.checkpoint import partial
from adallm.cli import main
from adallm.tiny import corpus

TOKENS = 700


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("".join(d.text for d in corpus.load()["validation"][:3])[:8000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def windows(text):
    ids = AutoTokenizer.from_pretrained(MODEL)(text.read_text(), verbose=False).input_ids[:TOKENS]
    assert len(ids) == TOKENS
    return [ids[i : i + 256] for i in range(0, TOKENS, 256)]


def dense(path, edit=None, **options):
    """A random Qwen3 of two layers, the second with a sliding window, and the bundled tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=False, use_sliding_window=True, sliding_window=64,
        max_window_layers=1, max_position_embeddings=256, **options,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    if edit:
        with torch.no_grad():
            edit(model.model.layers)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, path)
    return path


def entering(model, windows):
    """What enters each linear layer, by whole forward passes: FP64 ``sum x x^T``."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def add(_, args, name=name):
                x = args[0][0].double()
                found[name] = found.get(name, 0) + x.T @ x

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]), use_cache=False)
    return found


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def test_the_walk_sees_what_whole_passes_see(tmp_path, windows):
    source = dense(tmp_path / "src")
    expected, seen = entering(load(source), windows), {}
    names = [name for name in expected if "embed" not in name]
    walk.walk(
        load(source), windows, names, lambda moments, _: seen.update(moments) or False,
        diagonal=False, device="cpu", title="", progress=False,
    )  # fmt: skip
    assert list(seen) == sorted(names, key=names.index)
    assert "lm_head" in seen
    for name, moments in seen.items():
        torch.testing.assert_close(moments, expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()))
    diagonals = {}
    walk.walk(
        load(source), windows, names, lambda moments, _: diagonals.update(moments) or False,
        diagonal=True, device="cpu", title="", progress=False,
    )  # fmt: skip
    for name in names:
        torch.testing.assert_close(diagonals[name], expected[name].diagonal(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", nvfp4.LAYOUTS)
def test_imatrix(tmp_path, text, windows, layout):
    source = dense(tmp_path / "src")
    done = calibrated.convert(
        source, tmp_path / "dst", scale_rule="imatrix", text=text, tokens=TOKENS, layout=layout, ignore=()
    )
    assert done.quantized == 15
    found, stored = checkpoint.load(done.path), raw(source)
    seen = entering(load(source), windows)
    for group in checkpoint.plan(source, tmp_path / "other", ignore=()).values():
        importance = seen[group[0]].diagonal().float()
        parts = [stored[f"{name}.weight"] for name in group]
        amax = torch.stack([part.abs().amax().float() for part in parts]).amax()
        g = quantizers.best_global_scale(parts, amax, "imatrix", importance)
        for name, part in zip(group, parts, strict=True):
            t = found[f"{name}.weight"]
            expected = nvfp4.quantize(part, scale_rule="imatrix", importance=importance, global_scale=g, layout=layout)
            assert t.global_scale == expected.global_scale
            # Sums in another order may tip a block between two scales that are as good.
            assert float((t.scale.float() == expected.scale.float()).float().mean()) > 0.999


@pytest.mark.parametrize("layout", nvfp4.LAYOUTS)
def test_gptq_goes_on_from_what_was_quantized(tmp_path, text, windows, layout):
    source = dense(tmp_path / "src")
    options = {"scale_rule": "gptq", "text": [text], "tokens": TOKENS, "layout": layout}
    first = calibrated.convert(source, tmp_path / "a", **options)
    second = calibrated.convert(source, tmp_path / "b", **options)
    assert (first.quantized, first.layout) == (14, layout)
    for file in first.path.glob("*.safetensors"):
        assert file.read_bytes() == (second.path / file.name).read_bytes()
    model, found, stored = load(source), checkpoint.load(first.path), raw(source)
    # With the first layer as it was quantized, the second layer's inputs are those that it was quantized for.
    for name, t in found.items():
        if name.startswith("model.layers.0.") and isinstance(t, nvfp4.NVFP4Tensor):
            model.get_parameter(name).data.copy_(nvfp4.dequantize(t))
    name = "model.layers.1.mlp.down_proj"
    down = found[f"{name}.weight"]
    moments = entering(model, windows)["model.layers.1.self_attn.q_proj"]
    q = found["model.layers.1.self_attn.q_proj.weight"]
    expected = gptq.quantize(
        stored["model.layers.1.self_attn.q_proj.weight"], moments, global_scale=q.global_scale, layout=layout
    )
    # Sums in another order tip a few codes, and what follows from them.
    assert float((nvfp4.unpack(q.packed) == nvfp4.unpack(expected.packed)).float().mean()) > 0.98
    assert q.global_scale == found["model.layers.1.self_attn.v_proj.weight"].global_scale
    assert q.global_scale != down.global_scale
    assert torch.equal(found["lm_head.weight"], stored["lm_head.weight"])


def test_the_command(tmp_path, text, capsys):
    source = dense(tmp_path / "src")
    argv = ["quantize", str(source), str(tmp_path / "dst"), "--text", str(text), "--tokens", "512", "--quiet"]
    assert main([*argv, "--scale-rule", "gptq", "--kv-cache", "fp8", "--ignore", "*.o_proj"]) == 0
    assert "12 NVFP4 weights in the modelopt layout" in capsys.readouterr().out
    assert "model.layers.0.self_attn.k_proj.k_scale" in raw(tmp_path / "dst")
    assert main([*argv, "--scale-rule", "mse"]) == 2
    assert "scale_rule 'mse' reads no text; those that do: imatrix, gptq" in capsys.readouterr().err


def described(path):
    return {
        file.name: {name: (value.dtype, value.shape) for name, value in load_file(file).items()}
        for file in path.glob("*.safetensors")
    }


@pytest.mark.parametrize("rule", [*quantizers.RULES, "gptq"])
@pytest.mark.parametrize("layout", nvfp4.LAYOUTS)
def test_every_rule_writes_a_model_that_loads(tmp_path, text, rule, layout):
    """With the same configs, names, dtypes and shapes as the max rule: what reads one reads all."""
    source = dense(tmp_path / "src")
    given = {"text": text, "tokens": 512} if rule in calibrated.RULES else {}
    done = calibrated.convert(source, tmp_path / "dst", scale_rule=rule, layout=layout, **given)
    as_max = checkpoint.convert(source, tmp_path / "max", layout=layout).path
    assert described(done.path) == described(as_max)
    for file in done.path.glob("*.json"):
        assert file.read_bytes() == (as_max / file.name).read_bytes()
    if layout == "compressed-tensors":
        dequantize = CompressedTensorsConfig(dequantize=True)
        # It compiles its unpacking, which would need a C++ compiler.
        with torch.compiler.set_stance("force_eager"):
            theirs = AutoModelForCausalLM.from_pretrained(done.path, quantization_config=dequantize, dtype="auto")
        for name, value in checkpoint.load_dense(done.path, torch.bfloat16).items():
            assert torch.equal(theirs.state_dict()[name], value)
    for name, t in checkpoint.load(done.path).items():
        if isinstance(t, nvfp4.NVFP4Tensor):
            w = raw(source)[name].float()
            assert float((nvfp4.dequantize(t) - w).norm() / w.norm()) < 0.12


@pytest.mark.parametrize("rule", calibrated.RULES)
@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (None, {"text": "short"}, "short: .* tokens of text; calibration needs at least 512"),
        (None, {"tokens": 100}, "tokens 100; calibration needs at least 512"),
        (None, {"layout": "awq"}, "layout 'awq'"),
        (
            lambda layers: layers[0].post_attention_layernorm.weight[3].fill_(math.nan),
            {},
            r"model\.layers\.0\.mlp\.gate_proj: \d+ of \d+ inputs are not finite",
        ),
        (
            lambda layers: layers[1].mlp.up_proj.weight.zero_(),
            {},
            r"model\.layers\.1\.mlp\.down_proj(: importance is 0 for all columns| is given zeros alone)",
        ),
        (
            lambda layers: layers[1].mlp.up_proj.weight[2, 3].fill_(math.inf),
            {},
            r"model\.layers\.1\.mlp\.(up_proj\.weight: x\[2, 3\] is inf|down_proj: \d+ of \d+ inputs are not finite)",
        ),
    ],
)
def test_errors_leave_nothing(tmp_path, text, monkeypatch, rule, edit, options, message):
    source = dense(tmp_path / "src", edit)
    (tmp_path / "short").write_text("import os\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        calibrated.convert(source, tmp_path / "dst", **({"scale_rule": rule, "text": text, "tokens": TOKENS} | options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short", "src"]


def test_what_is_refused_before_the_model_is_loaded(tmp_path, text, monkeypatch):
    source = dense(tmp_path / "src")
    monkeypatch.setattr(calibrated, "_load", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(FileExistsError):
        calibrated.convert(source, tmp_path, scale_rule="gptq", text=text)
    with pytest.raises(ValueError, match="no linear layer that would be NVFP4"):
        calibrated.convert(source, tmp_path / "dst", scale_rule="gptq", text=text, ignore=("re:.*",))
    with pytest.raises(ValueError, match=r"ignore is the string '\*'"):
        calibrated.convert(source, tmp_path / "dst", scale_rule="gptq", text=text, ignore="*")
    done = calibrated.convert(source, tmp_path / "nvfp4", scale_rule="max")
    with pytest.raises(ValueError, match="is quantized already"):
        calibrated.convert(done.path, tmp_path / "dst", scale_rule="gptq", text=text)


def test_fewer_tokens_than_columns(tmp_path, text):
    source = dense(tmp_path / "src")
    model = load(source)
    groups = checkpoint.plan(source, tmp_path / "dst")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has 64 columns and the text 63 tokens"):
        calibrated._check_columns(model, groups, 63)


def test_layers_that_the_model_does_not_have_as_such(tmp_path, windows):
    model = load(dense(tmp_path / "src"))
    given = {"diagonal": True, "device": "cpu", "title": "", "progress": False}
    with pytest.raises(ValueError, match=r"model\.norm is no linear layer of Qwen3ForCausalLM"):
        walk.walk(model, windows, ["model.norm"], lambda *_: False, **given)
    model.model.layers = torch.nn.ModuleDict()
    with pytest.raises(ValueError, match="has no list of decoder layers"):
        walk.walk(model, windows, [], lambda *_: False, **given)


def test_given_weights_must_fit(tmp_path):
    source = dense(tmp_path / "src")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: its quantized weight is missing"):
        checkpoint.convert(source, tmp_path / "dst", scale_rule="gptq")
    t = nvfp4.quantize(torch.randn(64, 64))
    given = dict.fromkeys(checkpoint.plan(source, tmp_path / "dst"), t)
    with pytest.raises(ValueError, match="is of another shape or layout"):
        checkpoint.convert(source, tmp_path / "dst", scale_rule="gptq", quantized=given)
    with pytest.raises(ValueError, match="its quantized weight is given; it belongs to scale_rule 'gptq' alone"):
        checkpoint.convert(source, tmp_path / "dst", scale_rule="mse", quantized=given)


@pytest.mark.parametrize("rule", [*nvfp4.SCALE_RULES, "gptq"])
def test_a_device_that_is_not_there(tmp_path, text, rule, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    source = dense(tmp_path / "src")
    for device, message in (("cuda", "finds no CUDA GPU; supported here: cpu"), ("meta", "supported: cpu, cuda")):
        with pytest.raises(ValueError, match=message):
            calibrated.convert(source, tmp_path / "dst", scale_rule=rule, device=device)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [*nvfp4.SCALE_RULES, "gptq"])
@pytest.mark.parametrize("layout", nvfp4.LAYOUTS)
def test_on_a_gpu_as_on_a_cpu(tmp_path, text, rule, layout):
    source, noise = dense(tmp_path / "src"), {}
    given = {"text": text, "tokens": TOKENS} if rule in calibrated.RULES else {}
    for device in ("cpu", "cuda"):
        done = calibrated.convert(source, tmp_path / device, scale_rule=rule, layout=layout, device=device, **given)
        noise[device] = checkpoint.total(checkpoint.errors(done.path, source)).noise
    assert all(value.device.type == "cpu" for value in raw(tmp_path / "cuda").values())
    # Rounding the other way in a few places changes little; GPTQ passes it on.
    assert noise["cuda"] == pytest.approx(noise["cpu"], rel=0.02 if rule == "gptq" else 1e-3)


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("layout", nvfp4.LAYOUTS)
def test_gptq_goes_on_behind_the_layers_that_it_finished(tmp_path, text, monkeypatch, layout):
    source = dense(tmp_path / "src")
    options = {"scale_rule": "gptq", "text": [text], "tokens": TOKENS, "layout": layout, "ignore": ()}
    whole = calibrated.convert(source, tmp_path / "whole", **options)
    real, calls = gptq.quantize, []

    def until(most):
        def quantize(*args, **given):
            calls.append(args)
            if len(calls) > most:
                raise KeyboardInterrupt
            return real(*args, **given)

        calls.clear()
        monkeypatch.setattr(gptq, "quantize", quantize)

    # Four products of each decoder layer, and the head.
    for most, kept in ((6, 1), (4, 2)):
        until(most)
        with pytest.raises(KeyboardInterrupt):
            calibrated.convert(source, tmp_path / "dst", **options)
        (folder,) = tmp_path.glob(".dst.*.partial")
        assert len(list(folder.iterdir())) == kept
    until(1)
    done = calibrated.convert(source, tmp_path / "dst", **options)
    assert len(calls) == 1
    assert files(done.path) == files(whole.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src", "whole"]


def test_gptq_of_other_text_begins_anew_and_an_error_leaves_nothing(tmp_path, text, monkeypatch):
    source = dense(tmp_path / "src")
    real = gptq.quantize

    def stop(error, most):
        calls = []

        def quantize(*args, **given):
            calls.append(args)
            if len(calls) > most:
                raise error
            return real(*args, **given)

        monkeypatch.setattr(gptq, "quantize", quantize)
        return calls

    options = {"scale_rule": "gptq", "text": [text]}
    stop(KeyboardInterrupt(), 5)
    with pytest.raises(KeyboardInterrupt):
        calibrated.convert(source, tmp_path / "dst", tokens=TOKENS, **options)
    (first,) = tmp_path.glob(".dst.*.partial")
    calls = stop(ValueError("singular"), 5)
    with pytest.raises(ValueError, match="singular"):
        calibrated.convert(source, tmp_path / "dst", tokens=TOKENS - 1, **options)
    assert len(calls) == 6
    assert list(tmp_path.glob(".dst.*.partial")) == [first]
    descriptor = partial.lock(first, tmp_path / "dst")
    with pytest.raises(OSError, match=r"dst is being written by another process"):
        calibrated.convert(source, tmp_path / "dst", tokens=TOKENS, **options)
    os.close(descriptor)
    assert not (tmp_path / "dst").exists()
