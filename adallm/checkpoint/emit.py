"""Write the configs that declare a quantization, as the readers of each layout expect them.

Sources: what ModelOpt 0.42 writes to ``hf_quant_config.json`` and ``config.json``; the NVFP4, NVFP4A16, FP8 and
FP8_DYNAMIC presets of compressed-tensors 0.17; vLLM's ``modelopt.py`` and ``compressed_tensors.py``, which read them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from adallm.checkpoint.parse import MIXED_PRECISION, MODELOPT_SCHEMES, NVFP4_FORMAT
from adallm.checkpoint.quantization import COMPRESSED_TENSORS, MODELOPT, Scheme
from adallm.formats import NVFP4_BLOCK

# E4M3 with one scale for the keys of a layer and one for its values.
_MODELOPT_FP8_KV = {"dynamic": False, "num_bits": 8, "type": "float"}
_COMPRESSED_TENSORS_FP8_KV = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}


def quantization_configs(
    layout: str, schemes: Mapping[str, Scheme], dense: Iterable[str], kv_cache: str | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """``quantization_config`` for ``config.json``, and the content of ``hf_quant_config.json`` (None: no such file).

    Args:
        layout: ``"modelopt"`` or ``"compressed-tensors"``.
        schemes: of every quantized module.
        dense: linear modules that are not quantized.
        kv_cache: ``"fp8"`` or None.

    Raises:
        ValueError: a scheme or KV cache that the layout has no word for.
    """
    dense = list(dense)
    # A tied model has no lm_head tensor but a Linear of that name, which readers would expect to be quantized.
    if not any(module.endswith("lm_head") for module in (*schemes, *dense)):
        dense.append("lm_head")
    if kv_cache not in (None, "fp8"):
        raise ValueError(f"a KV cache in {kv_cache!r} cannot be declared; supported: fp8")
    if layout == MODELOPT:
        return _modelopt(schemes, dense, kv_cache)
    return _compressed_tensors(schemes, dense, kv_cache), None


def with_fp8_kv_cache(
    layout: str, config: dict[str, Any], hf_quant_config: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Copies of ``config.json`` and ``hf_quant_config.json`` that declare an FP8 KV cache; all else is as it was.

    Args:
        layout: ``"modelopt"`` or ``"compressed-tensors"``, in which they declare a quantization already.
    """
    config, hf_quant_config = copy.deepcopy(config), copy.deepcopy(hf_quant_config)
    places = [hf_quant_config]
    for holder in (config, config.get("text_config")):
        places.append(holder.get("quantization_config") if isinstance(holder, dict) else None)
    for place in places:
        if not isinstance(place, dict):
            continue
        inner = place.get("quantization", place)
        if layout == COMPRESSED_TENSORS:
            place["kv_cache_scheme"] = dict(_COMPRESSED_TENSORS_FP8_KV)
        elif inner is place:
            place["kv_cache_scheme"] = dict(_MODELOPT_FP8_KV)
            # Not ModelOpt's word here; where it stands, readers may look at it first.
            if "kv_cache_quant_algo" in place:
                place["kv_cache_quant_algo"] = "FP8"
        else:
            inner["kv_cache_quant_algo"] = "FP8"
    return config, hf_quant_config


def _modelopt(
    schemes: Mapping[str, Scheme], dense: list[str], kv_cache: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    names = {scheme: name for name, scheme in MODELOPT_SCHEMES.items()}
    for module, scheme in schemes.items():
        if scheme not in names:
            raise ValueError(f"{module} has the scheme {scheme}, for which {MODELOPT} has no algorithm")
    different = set(schemes.values())
    quantization: dict[str, Any] = {"kv_cache_quant_algo": None if kv_cache is None else "FP8"}
    flat: dict[str, Any] = {"quant_method": MODELOPT}
    if len(different) == 1 and next(iter(different)).format == "nvfp4":
        (scheme,) = different
        quantization |= {"quant_algo": "NVFP4", "group_size": NVFP4_BLOCK}
        numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK}
        # Null activations are how vLLM tells weights-only NVFP4, which keeps BF16 activations.
        inputs = None if scheme.activations is None else numbers
        flat["config_groups"] = {"group_0": {"input_activations": inputs, "weights": numbers, "targets": ["Linear"]}}
    else:
        quantization |= {
            "quant_algo": MIXED_PRECISION,
            "quantized_layers": {
                module: {"quant_algo": names[scheme]}
                | ({"group_size": NVFP4_BLOCK} if scheme.format == "nvfp4" else {})
                for module, scheme in schemes.items()
            },
        }
        flat["quantized_layers"] = quantization["quantized_layers"]
    quantization["exclude_modules"] = sorted(dense)
    producer = {"name": "adallm", "version": _version()}
    flat |= {"quant_algo": quantization["quant_algo"], "ignore": sorted(dense), "producer": producer}
    if kv_cache is not None:
        flat["kv_cache_scheme"] = dict(_MODELOPT_FP8_KV)
    return flat, {"producer": producer, "quantization": quantization}


def _compressed_tensors(schemes: Mapping[str, Scheme], dense: list[str], kv_cache: str | None) -> dict[str, Any]:
    groups: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        groups.setdefault(scheme, []).append(module)
    config_groups = {}
    for i, (scheme, modules) in enumerate(groups.items()):
        others = [*dense, *(module for module in schemes if schemes[module] != scheme)]
        # By name, since vLLM's class for it is no Linear.
        heads = [module for module in modules if module.rpartition(".")[2] == "lm_head"]
        config_groups[f"group_{i}"] = {
            "targets": ["Linear", *heads] if len(groups) == 1 else _targets(modules, others),
            "weights": _weights(scheme),
            "input_activations": _activations(scheme.activations),
            "output_activations": None,
            "format": _format(scheme),
        }
    formats = {_format(scheme) for scheme in groups}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": sorted(dense),
        "kv_cache_scheme": None if kv_cache is None else dict(_COMPRESSED_TENSORS_FP8_KV),
        # An object, as ModelOpt has it: vLLM asks any producer for its name.
        "producer": {"name": "adallm", "version": _version()},
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    if scheme.format == "nvfp4":
        numbers = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_BLOCK}
    else:
        numbers = {"num_bits": 8, "type": "float", "strategy": scheme.granularity}
    return numbers | {"symmetric": True, "dynamic": False}


def _activations(kind: str | None) -> dict[str, Any] | None:
    if kind is None:
        return None
    if kind == "nvfp4":
        numbers = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_BLOCK}
        return numbers | {"symmetric": True, "dynamic": "local"}
    token = kind == "fp8-token"
    strategy = "token" if token else "tensor"
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": token}


def _format(scheme: Scheme) -> str:
    if scheme.format == "nvfp4":
        return NVFP4_FORMAT
    return "naive-quantized" if scheme.activations is None else "float-quantized"


def _targets(modules: list[str], others: list[str]) -> list[str]:
    """One regular expression for modules that differ only in numbers; their names where it would catch others."""
    taken = {re.sub(r"\d+", "0", module) for module in others}
    targets: dict[str, None] = {}
    for module in modules:
        if re.sub(r"\d+", "0", module) in taken:
            targets[module] = None
        else:
            targets["re:^" + r"\d+".join(re.escape(part) for part in re.split(r"\d+", module)) + "$"] = None
    return list(targets)


def _version() -> str:
    try:
        return version("adallm")
    except PackageNotFoundError:
        return "unknown"
