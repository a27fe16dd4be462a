"""What the end-to-end benchmark adds to a worker of vLLM, in whichever process that is: questions, and dummy weights.

vLLM imports this module where the worker is made (``worker_extension_cls``), before the model is built. Its own dummy
weights make block scales of an NVFP4 checkpoint zero or negative, which no checkpoint has; those that are put in their
place are what the plugin takes: random codes, block scales of 1 and a global scale of 1/64.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

GLOBAL_SCALE = 1 / 64
_GIB = 2**30


def fill(layer: nn.Module) -> None:
    """Give an NVFP4 layer in ModelOpt's layout weights that a checkpoint could have; nothing to any other."""
    found = dict(layer.named_parameters(recurse=False))
    if "weight_scale_2" in found and found["weight"].dtype == torch.uint8:
        found["weight"].data.random_(0, 256)
        found["weight_scale"].data.fill_(1.0)
        found["weight_scale_2"].data.fill_(GLOBAL_SCALE)
        found["input_scale"].data.fill_(1.0)


@register_model_loader("dummy")
class Loader(DummyModelLoader):
    """vLLM's, but for NVFP4 layers."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        super().load_weights(model, model_config)
        for layer in model.modules():
            fill(layer)


class Extension:
    """Methods of the worker, for ``LLM.collective_rpc``."""

    def adallm_bench_facts(self) -> dict[str, Any]:
        """What runs, by name: ``quantization``, and lists ``linear``, ``head``, ``attention`` and ``kv_cache``.

        ``weights_gib`` is what vLLM counts as the model's memory; None on a CPU, where it does not count.
        """
        modules = list(self.model_runner.get_model().modules())
        attention = list(_attention(self.vllm_config))
        nbytes = getattr(self.model_runner, "model_memory_usage", None)
        return {
            "quantization": str(self.vllm_config.model_config.quantization),
            "linear": _names(m for m in modules if isinstance(m, LinearBase)),
            "head": _names(m for m in modules if isinstance(m, ParallelLMHead)),
            "attention": sorted({layer.attn_backend.get_name() for layer in attention}),
            "kv_cache": sorted({str(layer.kv_cache_dtype) for layer in attention}),
            "weights_gib": None if nbytes is None else nbytes / _GIB,
        }

    def adallm_bench_reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def adallm_bench_peak_gib(self) -> float:
        """The most that PyTorch had allocated since the reset, without the KV cache, which fills what is free."""
        storages = {}
        for layer in _attention(self.vllm_config):
            caches = layer.kv_cache if isinstance(layer.kv_cache, (list, tuple)) else [layer.kv_cache]
            storages |= {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches}
        return (torch.cuda.max_memory_allocated() - sum(storages.values())) / _GIB


def _attention(config: Any) -> Iterable[Any]:
    layers = config.compilation_config.static_forward_context.values()
    return (layer for layer in layers if hasattr(layer, "attn_backend"))


def _names(layers: Iterable[nn.Module]) -> list[str]:
    """Of the kernels of linear layers, each once."""
    return sorted({_kernel(layer) for layer in layers})


def _kernel(layer: nn.Module) -> str:
    if (ours := getattr(layer, "nvfp4", None)) is not None:
        return "adallm W4A8" if ours.activations == "fp8" else "adallm W4A16"
    if hasattr(layer, "fp8"):
        return "adallm W8A8"
    kernel = getattr(layer.quant_method, "kernel", None)
    return type(layer.quant_method if kernel is None else kernel).__name__
