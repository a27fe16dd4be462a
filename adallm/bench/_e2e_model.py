"""The model of the end-to-end benchmark: a directory with a ``config.json`` and no weights, which vLLM makes up."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adallm.checkpoint.emit import quantization_configs
from adallm.checkpoint.parse import MODELOPT_SCHEMES
from adallm.checkpoint.quantization import MODELOPT
from adallm.models import MODELS

NAME = "Qwen3-8B"
QWEN3_8B: Mapping[str, Any] = {
    **MODELS[NAME],
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": MODELS[NAME]["num_hidden_layers"],
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}


def config(model: Path | None, layers: int | None) -> tuple[str, dict[str, Any]]:
    """Name and ``config.json`` of a dense model.

    Args:
        model: a directory with a ``config.json``, of which a quantization is left out; None for Qwen3-8B.
        layers: how many are kept; None for all.

    Raises:
        ValueError: no such file, one that names no number of layers, or more layers than there are.
    """
    if model is None:
        name, found = NAME, copy.deepcopy(dict(QWEN3_8B))
    else:
        path = model / "config.json"
        if not path.is_file():
            raise ValueError(f"{model} has no config.json")
        name, found = model.resolve().name, json.loads(path.read_text(encoding="utf-8"))
    found.pop("quantization_config", None)
    count = found.get("num_hidden_layers")
    if not isinstance(count, int):
        raise ValueError(f"config.json of {name} has no num_hidden_layers; supported: models of text alone")
    if layers is not None:
        if not 1 <= layers <= count:
            raise ValueError(f"{layers} layers of {name}; supported: 1 to {count}")
        found["num_hidden_layers"] = layers
        if isinstance(found.get("layer_types"), list):
            found["layer_types"] = found["layer_types"][:layers]
    return name, found


def write(directory: Path, dense: Mapping[str, Any], *, quantized: bool) -> None:
    """Write ``config.json``; ``quantized`` declares NVFP4 in ModelOpt's layout, ``lm_head`` left in 16 bits.

    It is what ModelOpt calls NVFP4, with activations of 4 bits: vLLM would run weights-only NVFP4 by Marlin alone.
    """
    declared, _ = quantization_configs(MODELOPT, {"model.layers.0": MODELOPT_SCHEMES["NVFP4"]}, ["lm_head"], None)
    content = dict(dense) | ({"quantization_config": declared} if quantized else {})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
