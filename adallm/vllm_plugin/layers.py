"""The configs that run NVFP4 checkpoints: vLLM's own, in which the NVFP4 linear layers are ours.

Which layer is quantized how, by names, patterns and groups, stays vLLM's decision: what it would give an NVFP4 linear
method gets ours, and all else its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig, ModelOptNvFp4Config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from adallm.vllm_plugin import compat, fuse, linear
from adallm.vllm_plugin.report import Report
from adallm.vllm_plugin.settings import Settings
from adallm.vllm_plugin.weights import COMPRESSED_TENSORS, MODELOPT, Names

logger = logging.getLogger("vllm.adallm")

_HEADS = {"nvfp4": "W4A16", "fp8": "W8A8"}
_NAMES = {"bf16": "W4A16", "fp8": "W4A8", "auto": "W4A16, W4A8 for many tokens"}


class _Ours:
    """Mixed into a config of vLLM."""

    def _prepare(self) -> None:
        """When the first layer asks: only then is the config of the engine known."""
        if hasattr(self, "_report"):
            return
        config = get_current_vllm_config_or_none()
        self._settings = Settings.read(getattr(config, "additional_config", None))
        capability = compat.capability()
        self._activations = self._settings.kind(capability)
        self._where = "reference on a CPU" if capability is None else "Triton"
        # Among several GPUs vLLM has passes that join an RMSNorm with the sum over them.
        passes = getattr(getattr(config, "compilation_config", None), "pass_config", None)
        norms = not any(getattr(passes, name, False) for name in ("fuse_allreduce_rms", "enable_sp"))
        fuse.use(self._settings.fuse and capability is not None, norms=norms)  # on a CPU there is no such operator
        self._report = Report(config)
        self._experts: set[str] = set()  # methods of vLLM that were named in the log
        self._tied = _ties(config)
        self._has_head = False

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        self._prepare()
        method = super().get_quant_method(layer, prefix)
        if (ours := self._ours(layer, prefix, method)) is not None:
            self._report.add(*self._row(layer), ours=True)
            return ours
        kind = self._settings.lm_head
        self._has_head |= isinstance(layer, ParallelLMHead)
        if kind in _HEADS and _is_dense(method):
            row = ("lm_head", f"adallm {_HEADS[kind]}, {self._where}", f"lm_head {kind}: quantized here")
            if isinstance(layer, ParallelLMHead):
                self._report.add(*row, ours=True)
                return linear.AdaLLMHeadMethod(kind, prefix, self._report)
            if self._tied and type(layer) is VocabParallelEmbedding:
                self._report.expect()
                return linear.AdaLLMTiedHeadMethod(kind, prefix, self._report, lambda: not self._has_head, row)
        if isinstance(layer, RoutedExperts):
            name = type(method).__name__
            if name not in self._experts:
                logger.info("adallm: experts, of %s and other layers, run on vLLM's %s", prefix, name)
            self._experts.add(name)
            self._report.add("experts", f"vLLM {name}", "adallm has no kernel for experts")
        elif isinstance(layer, (LinearBase, ParallelLMHead)):
            why = "not quantized in the checkpoint" if _is_dense(method) else "another algorithm in the checkpoint"
            self._report.add(_kind(layer), f"vLLM {type(method).__name__}", why)
        return method

    def _ours(self, layer: nn.Module, prefix: str, method: Any) -> Any:
        """Our method in the place of vLLM's; None where that stays."""
        raise NotImplementedError

    def _row(self, layer: nn.Module) -> tuple[str, str, str]:
        name = f"adallm {_NAMES[self._activations]}, {self._where}"
        return f"NVFP4 {_kind(layer)}", name, f"activations {self._settings.activations}"

    def _fallback(self, layer: nn.Module, prefix: str, stock: Callable[[], Any]) -> Callable[[str], Any]:
        def fall_back(reason: str) -> Any:
            if not self._settings.allow_fallback:
                raise ValueError(
                    f"{prefix} is {reason}. Another tensor_parallel_size may divide it so; with "
                    "ADALLM_ALLOW_FALLBACK=1 vLLM's own kernel runs such layers"
                )
            method = stock()
            logger.warning("adallm: %s is %s; vLLM's %s runs it", prefix, reason, type(method).__name__)
            self._report.moved(self._row(layer), (f"NVFP4 {_kind(layer)}", f"vLLM {type(method).__name__}", reason))
            return method

        return fall_back

    def _layer(self, names: Names, prefix: str) -> linear.NVFP4Layer:
        return linear.NVFP4Layer(names, prefix, self.packed_modules_mapping, self._activations, self._report)


def _ties(config: VllmConfig | None) -> bool:
    """Whether the embedding may be what this rank multiplies by in the end."""
    if config is None or config.model_config is None or not get_pp_group().is_last_rank:
        return False
    return bool(getattr(config.model_config.hf_text_config, "tie_word_embeddings", False))


def _kind(layer: nn.Module) -> str:
    return "lm_head" if isinstance(layer, ParallelLMHead) else type(layer).__name__


def _is_dense(method: Any) -> bool:
    return method is None or type(method).__name__.startswith("Unquantized")


class _ModelOpt(_Ours):
    def _ours(self, layer: nn.Module, prefix: str, method: Any) -> Any:
        if not isinstance(layer, (LinearBase, ParallelLMHead)) or not compat.is_nvfp4(method):
            return None
        fallback = self._fallback(layer, prefix, lambda: method)
        return linear.AdaLLMNVFP4LinearMethod(self._layer(MODELOPT, prefix), fallback)


class ModelOptConfig(_ModelOpt, ModelOptNvFp4Config):
    """All in NVFP4 but what is excluded."""


class MixedConfig(_ModelOpt, ModelOptMixedPrecisionConfig):
    """An algorithm for each layer."""


class CompressedConfig(_Ours, CompressedTensorsConfig):
    """Groups of layers, each with its scheme."""

    def _get_scheme_from_parts(self, weight_quant: Any, input_quant: Any, *args: Any, **kwargs: Any) -> Any:
        def stock() -> Any:
            return CompressedTensorsConfig._get_scheme_from_parts(self, weight_quant, input_quant, *args, **kwargs)

        if not self._is_nvfp4_format(weight_quant) or not (input_quant is None or self._is_nvfp4_format(input_quant)):
            return stock()
        prefix = kwargs.get("layer_name") or ""
        return linear.AdaLLMNVFP4Scheme(
            self._layer(COMPRESSED_TENSORS, prefix), lambda reason: self._fallback(self._asked, prefix, stock)(reason)
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        self._asked = layer
        return super().get_quant_method(layer, prefix)

    def _ours(self, layer: nn.Module, prefix: str, method: Any) -> Any:
        return method if isinstance(getattr(layer, "scheme", None), linear.AdaLLMNVFP4Scheme) else None


CONFIGS = {"modelopt": ModelOptConfig, "mixed": MixedConfig, "compressed-tensors": CompressedConfig}
