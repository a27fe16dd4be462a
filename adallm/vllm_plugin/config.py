"""The quantization config that vLLM knows by the name ``adallm``: which checkpoints it takes over.

vLLM asks every registered config whether it overrides the method that a checkpoint declares. This one does for NVFP4
in both layouts, and for mixed checkpoints with NVFP4 layers. The configs that run them are in ``layers.py``, which
imports what is slow to import.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from adallm.vllm_plugin.settings import Settings

logger = logging.getLogger("vllm.adallm")

NAME = "adallm"
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
# What a user may name whose checkpoint is taken over all the same.
_NAMES = (None, NAME, "modelopt", "modelopt_fp4", "modelopt_mixed", "compressed-tensors")


class NVFP4Config(QuantizationConfig):
    """Stands for the configs of ``layers.py`` until a checkpoint is known."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        if user_quant not in _NAMES:
            return None
        if kind_of(hf_quant_cfg) is None:
            if _algorithm_of(hf_quant_cfg) == "MIXED_PRECISION" and not _layers_of(hf_quant_cfg):
                logger.warning(
                    "adallm: config.json declares MIXED_PRECISION without quantized_layers, which say what is NVFP4; "
                    "the checkpoint is left to vLLM. Copy them there from hf_quant_config.json to have it taken over."
                )
            return None
        Settings.read()  # a choice that there is not is an error before anything is loaded
        return NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """A config of ``layers.py``.

        Raises:
            ValueError: the checkpoint has no NVFP4 weights.
        """
        from adallm.vllm_plugin import layers

        kind = kind_of(config)
        if kind is None:
            raise ValueError(
                f"quantization 'adallm' with a checkpoint of {config.get('quant_method')!r}; supported: NVFP4 in the "
                "layouts of ModelOpt and of compressed-tensors"
            )
        return layers.CONFIGS[kind].from_config(config)

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["hf_quant_config.json"]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        raise NotImplementedError("from_config makes the config that has methods")


def kind_of(config: Mapping[str, Any]) -> str | None:
    """``"modelopt"``, ``"mixed"`` or ``"compressed-tensors"``; None if there are no NVFP4 weights.

    Args:
        config: ``quantization_config`` of ``config.json``, or ``hf_quant_config.json``.
    """
    if (algorithm := _algorithm_of(config)) is not None:
        if algorithm in _ALGORITHMS:
            return "modelopt"
        layers = _layers_of(config).values()
        named = {str(layer.get("quant_algo", "")).upper() for layer in layers if isinstance(layer, Mapping)}
        return "mixed" if algorithm == "MIXED_PRECISION" and named & set(_ALGORITHMS) else None
    if config.get("quant_method") == "compressed-tensors":
        groups = config.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping) and (
                weights.get("num_bits"), weights.get("type"), weights.get("strategy"), weights.get("group_size")
            ) == (4, "float", "tensor_group", 16):  # fmt: skip
                return "compressed-tensors"
    return None


def _algorithm_of(config: Mapping[str, Any]) -> str | None:
    """Of ModelOpt; None for another producer."""
    if not str(config.get("quant_method", "")).lower().startswith("modelopt"):
        return None
    inner = config.get("quantization")
    return str((inner if isinstance(inner, Mapping) else config).get("quant_algo", "")).upper()


def _layers_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("quantization")
    layers = (inner if isinstance(inner, Mapping) else config).get("quantized_layers")
    return layers if isinstance(layers, Mapping) else {}


def register_config() -> None:
    """Once, or again: vLLM keeps one config by this name, and one backend as ``CUSTOM``."""
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(NVFP4Config)
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, "adallm.vllm_plugin.attention.AdaLLMAttentionBackend")
