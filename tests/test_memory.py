"""``memory.py`` and ``models.py``: bytes are those of real tensors and files, and what fits is just what fits."""

import json

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adallm import checkpoint, evaluate, hardware, memory, nvfp4, results
from adallm.bench import _e2e_model
from adallm.hardware import GPUS
from adallm.memory import CACHES, GIB, cache_bytes, fit, weight_bytes
from adallm.models import MODELS

CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
}
# Of the hub's safetensors headers.
PUBLISHED = {
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}


def bundled():
    return json.loads((evaluate.BUNDLED_MODEL / "config.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_weights_in_bf16_are_all_parameters_of_the_model(name):
    config_class, model_class = CLASSES[MODELS[name]["model_type"]]
    config = config_class(**{k: v for k, v in MODELS[name].items() if k != "model_type"})
    with torch.device("meta"):
        model = model_class(config)
    assert weight_bytes(MODELS[name], "bf16") == 2 * sum(p.numel() for p in model.parameters())
    assert PUBLISHED.get(name, weight_bytes(MODELS[name], "bf16") // 2) * 2 == weight_bytes(MODELS[name], "bf16")
    windows = hardware._windows(MODELS[name], config.num_hidden_layers)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    assert [w is not None for w in windows] == [kind == "sliding_attention" for kind in types]


def test_weights_are_those_of_the_files(tmp_path):
    written = checkpoint.convert(evaluate.BUNDLED_MODEL, tmp_path / "nvfp4").path
    for weights, path in (("bf16", evaluate.BUNDLED_MODEL), ("nvfp4", written)):
        files = [file for file in path.iterdir() if file.suffix == ".safetensors"]
        headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
        assert weight_bytes(bundled(), weights) == sum(file.stat().st_size for file in files) - headers


def test_weights_are_near_what_an_engine_measured():
    """vLLM holds a few buffers beside the weights."""
    rows = results.read(results.default_root() / "vllm_e2e" / "h200.json")["rows"]
    for weights, impl in (("bf16", "bf16"), ("nvfp4", "adallm-w4a16")):
        (row,) = [r for r in rows if (r["model"], r["metric"], r["impl"]) == ("Qwen3-8B", "weights_gib", impl)]
        assert 0.98 * row["value"] < weight_bytes(MODELS["Qwen3-8B"], weights) / GIB <= row["value"]


def test_the_benchmark_has_the_same_qwen3_8b():
    assert {k: _e2e_model.QWEN3_8B[k] for k in MODELS["Qwen3-8B"]} == MODELS["Qwen3-8B"]


def test_a_cache_in_nvfp4_takes_the_bytes_of_its_tensors():
    config, tokens = MODELS["Qwen3-8B"], 32
    side = nvfp4.quantize(torch.randn(tokens, config["num_key_value_heads"], config["head_dim"]), global_scale=1e-3)
    taken = 2 * config["num_hidden_layers"] * (side.packed.nbytes + side.scale.nbytes)
    assert cache_bytes(config, tokens, "nvfp4") == taken
    assert cache_bytes(config, tokens, "fp8") * 9 // 16 == taken


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("gpu", ["RTX 4090", "L40S", "L4"])
@pytest.mark.parametrize("model", MODELS)
def test_one_block_or_one_sequence_more_does_not_fit(model, gpu, cache):
    config = MODELS[model]
    for weights in memory.WEIGHTS:
        found = fit(config, GPUS[gpu], weights=weights, cache=cache, tokens=2048)
        assert found.weights + found.room == int(0.9 * GPUS[gpu].memory_mib * 2**20) - 2 * GIB
        if found.room < 0:
            assert (found.bound, found.context, found.batch) == ("weights", 0, 0)
            continue
        assert cache_bytes(config, found.context, cache) <= found.room
        assert found.context <= config["max_position_embeddings"]
        if found.bound == "memory":
            assert found.context % 16 == 0
            assert cache_bytes(config, found.context + 1, cache) > found.room
        else:
            assert found.context == config["max_position_embeddings"]
        each = cache_bytes(config, 2048, cache)
        assert found.batch * each <= found.room < (found.batch + 1) * each


def test_the_options_of_a_fit():
    config, gpu = MODELS["Llama-3.1-8B"], GPUS["L4"]
    options = {"weights": "nvfp4", "cache": "fp8", "tokens": 1 << 17}
    base = fit(config, gpu, **options)
    assert fit(config, gpu, **options, share=1.0).room - base.room == pytest.approx(0.1 * gpu.memory_mib * 2**20, abs=2)
    assert fit(config, gpu, **options, reserved=0).room - base.room == 2 * GIB
    # Longer than the model: no batch of it, whatever the memory.
    assert fit(config, GPUS["L40S"], **options | {"tokens": (1 << 17) + 1}).batch == 0
    with pytest.raises(ValueError, match="tokens 0"):
        fit(config, gpu, **options | {"tokens": 0})


def test_sliding_layers_stop_growing():
    gemma = MODELS["Gemma3-27B"]
    short, long = (cache_bytes(gemma, n, "bf16") for n in (65_536, 131_072))
    full = 62 // 6
    assert long - short == 65_536 * 2 * full * 16 * 128 * 2
    rows = {(r["model"], r["cache"]): r["bytes"] for r in memory.per_token()}
    assert rows["Gemma3-27B", "bf16"] == 2 * 62 * 16 * 128 * 2
    assert rows["Qwen3-8B", "fp8-token"] - rows["Qwen3-8B", "fp8"] == 2 * 36 * 8 * 4


def test_rows_of_figures():
    rows = list(memory.fits(["L4"], tokens=4096, models=["Qwen3-8B"]))
    assert [(row["weights"], row["cache"]) for row in rows] == [(w, c) for w in memory.WEIGHTS for c in CACHES]
    assert rows[0]["weight_bytes"] == weight_bytes(MODELS["Qwen3-8B"], "bf16")
    lengths = {row["tokens"] for row in memory.by_context((32768, 65536), ["Qwen3-8B"])}
    assert lengths == {32768}, "no row beyond the model's positions"


def test_what_is_not_supported():
    qwen = MODELS["Qwen3-8B"]
    with pytest.raises(ValueError, match="weights 'int4'; supported: bf16, nvfp4"):
        weight_bytes(qwen, "int4")
    with pytest.raises(ValueError, match="model_type 'mixtral'; supported without biases: llama, qwen3, gemma3_text"):
        weight_bytes({**qwen, "model_type": "mixtral"}, "bf16")
    with pytest.raises(ValueError, match="supported without biases"):
        weight_bytes({**qwen, "attention_bias": True}, "bf16")
    with pytest.raises(ValueError, match=r"layers of 4096, 4096 and 12290 columns .* multiples of 16"):
        weight_bytes({**qwen, "intermediate_size": 12290}, "nvfp4")
    with pytest.raises(ValueError, match="cache 'int8'; supported: bf16, fp8, fp8-token, nvfp4"):
        cache_bytes(qwen, 1, "int8")
