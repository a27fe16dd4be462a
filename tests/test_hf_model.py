"""``hf_model.py``: what each format changes in a model, and that it changes nothing else."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from adallm import baselines, checkpoint, fp8, hf_model
from adallm.hf_model import FORMATS
from adallm.linear import DenseLinear, NVFP4Linear

LAYERS = 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("dense") / "model"
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


@pytest.mark.parametrize("name", FORMATS)
def test_every_linear_layer_runs_its_format(directory, name):
    form = FORMATS[name]
    model = hf_model.load(directory, form)
    source = checkpoint.load_dense(directory)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (DenseLinear, NVFP4Linear))}
    assert len(linears) == 7 * LAYERS + 1
    assert not [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    head = linears.pop("lm_head")
    assert head.activations == "bf16"
    assert torch.equal(head.dense_weight(), source["lm_head.weight"].float())
    for module, linear in linears.items():
        weight = source[f"{module}.weight"]
        assert linear.activations == form.activations
        assert isinstance(linear, NVFP4Linear) == (form.weights == "nvfp4")
        if form.weights == "bf16":
            expected = weight.float()
        elif form.weights == "fp8":
            expected = fp8.dequantize(fp8.quantize(weight, granularity="row"))
        elif form.weights != "nvfp4":
            expected = baselines.FORMATS[form.weights](weight, dtype=torch.float32)
        else:
            continue
        assert torch.equal(linear.dense_weight(), expected)


def test_bf16_is_the_model_as_transformers_runs_it(directory, ids):
    ours = logits(hf_model.load(directory, FORMATS["bf16"]), ids)
    theirs = logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), ids)
    assert (ours - theirs).norm() <= 2**-6 * theirs.norm()


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_a_stored_nvfp4_model_runs_its_own_weights(directory, ids, tmp_path, layout):
    checkpoint.convert(directory, tmp_path / "q", layout=layout)
    stored = checkpoint.load(tmp_path / "q")
    model = hf_model.load(tmp_path / "q", FORMATS["nvfp4"])
    for name, module in model.named_modules():
        if isinstance(module, NVFP4Linear):
            assert torch.equal(module.packed, stored[f"{name}.weight"].packed)
    if layout == "modelopt":
        assert torch.equal(logits(model, ids), logits(hf_model.load(directory, FORMATS["nvfp4"]), ids))
    dense = tmp_path / "dense"
    plain = Qwen3ForCausalLM(model.config)
    plain.load_state_dict(checkpoint.load_dense(tmp_path / "q", torch.float32))
    plain.to(torch.bfloat16).save_pretrained(dense)
    difference = logits(model, ids) - logits(hf_model.load(dense, FORMATS["bf16"]), ids)
    assert difference.norm() <= 2**-6 * logits(model, ids).norm()


def test_a_stored_model_that_hf_quant_config_alone_declares(directory, ids, tmp_path):
    path = checkpoint.convert(directory, tmp_path / "q").path
    expected = logits(hf_model.load(path, FORMATS["nvfp4"]), ids)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(hf_model.load(path, FORMATS["nvfp4"]), ids), expected)


def test_activations_and_kv_cache_change_the_result_a_little(directory, ids):
    base = logits(hf_model.load(directory, FORMATS["nvfp4"]), ids)
    for name in ("nvfp4-w4a8", "nvfp4-fp8kv", "nvfp4-fp8kv-token"):
        changed = logits(hf_model.load(directory, FORMATS[name]), ids)
        assert 0 < (changed - base).norm() < 0.2 * base.norm()


def test_the_fp8_cache_rounds_keys_and_values_and_nothing_else():
    module = torch.nn.Module()
    module._adallm_k_scale, module._adallm_v_scale = 0.5, 1.0
    module.is_causal = True
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 8, 16, generator=g) for _ in range(3))
    out, _ = hf_model._fp8_kv_attention(module, q, k, v, None, scaling=0.25)
    rounded = [fp8.to_e4m3(k / 0.5).float() * 0.5, fp8.to_e4m3(v).float()]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *rounded, is_causal=True, scale=0.25)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)


def test_the_fp8_cache_by_token_has_a_scale_for_each_token_and_head():
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 8, 16, generator=g) for _ in range(3))
    k[0, 1, 3] *= 1e4  # beyond 448: a scale for a layer would take the others down
    v[0, 0, 5] *= 1e-4
    module = torch.nn.Module()
    module.is_causal = True
    out, _ = hf_model._fp8_kv_token_attention(module, q, k, v, None, scaling=0.25)
    rounded = []
    for x in (k, v):
        scale = x.abs().amax(-1, keepdim=True) / 448
        rounded.append(fp8.to_e4m3(x / scale).float() * scale)
    expected = torch.nn.functional.scaled_dot_product_attention(q, *rounded, is_causal=True, scale=0.25)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)


def test_no_program_of_a_directory_runs(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked whether to run it"))
    shutil.copytree(directory, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "program.C", "AutoModelForCausalLM": "program.M"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "program.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf_model.load(tmp_path / "model", FORMATS["bf16"])


def test_a_stored_model_refuses_other_weights(directory, tmp_path):
    checkpoint.convert(directory, tmp_path / "q")
    with pytest.raises(ValueError, match=r"format 'mxfp4' needs a BF16 model.*nvfp4, nvfp4-w4a8, nvfp4-fp8kv"):
        hf_model.load(tmp_path / "q", FORMATS["mxfp4"])
