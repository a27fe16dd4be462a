"""How vLLM's layers run NVFP4 weights: ``NVFP4Linear``, the kernels on a GPU and the reference on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from adallm import fp8, nvfp4
from adallm.formats import NVFP4_BLOCK
from adallm.linear import FP8Linear, NVFP4Linear
from adallm.vllm_plugin.report import Report
from adallm.vllm_plugin.weights import Names, Weights, shard_names


class NVFP4Layer:
    """What both layouts share: from parameters to ``layer.nvfp4``, an ``NVFP4Linear``.

    Args:
        names: of the layout.
        prefix: of the layer.
        packed_modules: of the quantization config, which shards a fused layer has.
        activations: ``"bf16"`` or ``"fp8"``.
        report: is told when the layer is ready.
    """

    def __init__(
        self, names: Names, prefix: str, packed_modules: Mapping[str, Sequence[str]], activations: str, report: Report
    ) -> None:
        self.names, self.prefix, self.packed_modules = names, prefix, packed_modules
        self.activations, self.report = activations, report

    def create(self, layer: nn.Module, columns: int, partitions: list[int], loader: Callable[..., None]) -> None:
        layer.logical_widths = partitions
        layer.input_size_per_partition, layer.output_size_per_partition = columns, sum(partitions)
        shards = shard_names(self.prefix, self.packed_modules, len(partitions))
        self.weights = Weights(self.names, self.prefix, partitions, shards)
        self.weights.create(layer, columns, loader)
        config = get_current_vllm_config_or_none()
        self.dummy = config is not None and config.load_config.load_format == "dummy"

    def process(self, layer: nn.Module) -> None:
        weight = self.weights.collect(layer, dummy=self.dummy)
        layer.nvfp4 = NVFP4Linear(weight, _own_bias(layer), activations=self.activations)
        self.report.processed(layer.nvfp4)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return _applied(layer.nvfp4, x, bias, self.prefix)


def unsupported(columns: int, partitions: list[int]) -> str | None:
    """Why our kernels do not run a layer of this size; None where they do."""
    if sum(partitions) % NVFP4_BLOCK or columns % NVFP4_BLOCK:
        return f"[{sum(partitions)}, {columns}] on this rank; supported: both multiples of {NVFP4_BLOCK}"
    return None


def _applied(linear: NVFP4Linear | FP8Linear, x: Tensor, bias: Tensor | None, prefix: str) -> Tensor:
    if (bias is None) != (linear.bias is None):
        raise ValueError(f"{prefix} is called {'without' if bias is None else 'with'} its bias")
    return linear(x)


def _own_bias(layer: nn.Module) -> Tensor | None:
    """What this rank adds: of a layer whose ranks sum up, the first does."""
    bias = getattr(layer, "bias", None)
    if bias is None or getattr(layer, "skip_bias_add", False):
        return None
    return None if isinstance(layer, RowParallelLinear) and layer.tp_rank > 0 else bias.data


@register_weight_loader_v2_supported_method
class AdaLLMNVFP4LinearMethod(LinearMethodBase):
    """A linear layer of a ModelOpt checkpoint.

    Args:
        layer: ours.
        fallback: makes what vLLM would run the layer with; called for a size that ours does not run. An error if it
            must not be.
    """

    def __init__(self, layer: NVFP4Layer, fallback: Callable[[str], Any]) -> None:
        self.layer, self._fallback = layer, fallback

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        reason = unsupported(input_size_per_partition, output_partition_sizes)
        if reason is not None:
            layer.quant_method = self._fallback(reason)
            layer.quant_method.create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **extra_weight_attrs,
            )
            return
        loader = extra_weight_attrs["weight_loader"]
        self.layer.create(layer, input_size_per_partition, list(output_partition_sizes), loader)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.layer.process(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.layer.apply(layer, x, bias)


class AdaLLMNVFP4Scheme(CompressedTensorsScheme):
    """A linear layer of a compressed-tensors checkpoint; the arguments are those of ``AdaLLMNVFP4LinearMethod``."""

    def __init__(self, layer: NVFP4Layer, fallback: Callable[[str], Any]) -> None:
        self.layer, self._fallback = layer, fallback

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    def create_weights(
        self,
        layer: nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **kwargs: Any,
    ) -> None:
        reason = unsupported(input_size_per_partition, output_partition_sizes)
        if reason is not None:
            layer.scheme = self._fallback(reason)
            layer.scheme.create_weights(
                layer=layer,
                output_partition_sizes=output_partition_sizes,
                input_size_per_partition=input_size_per_partition,
                params_dtype=params_dtype,
                weight_loader=weight_loader,
                **kwargs,
            )
            return
        self.layer.create(layer, input_size_per_partition, list(output_partition_sizes), weight_loader)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.layer.process(layer)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.layer.apply(layer, x, bias)


class AdaLLMHeadMethod(UnquantizedEmbeddingMethod):
    """An ``lm_head`` of 16 bits that is quantized when it is loaded: to NVFP4 (W4A16) or FP8 (W8A8).

    Args:
        kind: ``"nvfp4"`` or ``"fp8"``.
    """

    def __init__(self, kind: str, prefix: str, report: Report) -> None:
        self._kind, self._prefix, self._report = kind, prefix, report

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        made = self._make(layer)
        # Of a head that is tied to the embeddings they keep theirs.
        del layer.weight
        self._report.processed(made)

    def _make(self, layer: nn.Module) -> NVFP4Linear | FP8Linear:
        dense, bias = layer.weight.data, _own_bias(layer)
        if self._kind == "nvfp4":
            made = NVFP4Linear(nvfp4.quantize(dense), bias)
        elif dense.is_cuda and dense.dtype != torch.bfloat16:
            raise ValueError(f"{self._prefix} is {dense.dtype}; lm_head fp8 supports bfloat16 on a GPU")
        else:
            made = FP8Linear(fp8.quantize(dense, granularity="row"), bias)
        setattr(layer, self._kind, made)
        return made

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _applied(getattr(layer, self._kind), x, bias, self._prefix)


class AdaLLMTiedHeadMethod(AdaLLMHeadMethod):
    """An embedding that may be the ``lm_head`` too, as in some models of some releases of vLLM: it stays as it is, and
    beside it is what the ``lm_head`` is quantized to.

    Args:
        is_head: whether it is; called when the whole model is made.
        row: for the report, if so.
    """

    def __init__(
        self, kind: str, prefix: str, report: Report, is_head: Callable[[], bool], row: tuple[str, str, str]
    ) -> None:
        super().__init__(kind, prefix, report)
        self._is_head, self._row = is_head, row

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        made = None
        if self._is_head():
            self._report.add(*self._row)
            made = self._make(layer)
        self._report.processed(made)
