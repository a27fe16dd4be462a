"""What an NVFP4 linear layer is compared with: each builder prepares one library's copies of a weight.

``marlin`` and ``humming`` multiply by the NVFP4 weight itself, ``cublas-bf16`` and ``scaled-mm-fp8`` by its values in
16 and 8 bits. A builder raises whatever its library raises where that is missing or refuses the shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adallm import fp8
from adallm.bench._cases import named
from adallm.nvfp4 import NVFP4Tensor

NVFP4_BITS = 4.5  # a code, and a sixteenth of a byte of scale

Copies = Callable[[int], int]


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight as quantized, and its values ``dense`` in FP32 ``[n, k]``."""

    nvfp4: NVFP4Tensor
    dense: Tensor

    @property
    def n(self) -> int:
        return self.dense.shape[0]

    @property
    def k(self) -> int:
        return self.dense.shape[1]


@dataclass(frozen=True, eq=False)
class Prepared:
    """An implementation, ready to run.

    Attributes:
        calls: one for each copy of the weight; ``call(*given(x))`` is the output ``[M, N]`` in BF16.
        nbytes, bits: of one copy of the weight, and for one of its elements.
        given: from x ``[M, K]`` in BF16 to what a call takes; not part of the time.
        activation_quant: ``"included"`` in the time or ``"not included"``; None where nothing is quantized.
        quantized: from x to what a call takes of activations that are FP8 already; None where no call does.
        path: M -> what runs, in a few words, or None.
        rounds: what makes an error above the limit, for the note in its row.
    """

    calls: Sequence[Callable[..., Tensor]]
    nbytes: int
    bits: float
    given: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x,)
    activation_quant: str | None = None
    quantized: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    path: Callable[[int], str | None] = lambda m: None
    rounds: str = ""


def cublas_bf16(weight: Weight, ms: Sequence[int], copies: Copies) -> Prepared:
    """``torch.nn.functional.linear`` by the dequantized weight in BF16."""
    w = weight.dense.bfloat16()
    weights = [w, *(w.clone() for _ in range(copies(w.nbytes) - 1))]
    calls = [partial(nn.functional.linear, weight=w) for w in weights]
    return Prepared(calls, w.nbytes, 16, path=lambda m: "torch.nn.functional.linear")


def scaled_mm_fp8(weight: Weight, ms: Sequence[int], copies: Copies) -> Prepared:
    """``torch._scaled_mm``: E4M3 activations and weight, scales by token and by row, fast accumulation."""
    w = fp8.quantize(weight.dense, granularity="row")
    weights = [w.data, *(w.data.clone() for _ in range(copies(w.nbytes) - 1))]
    row_scale = w.scale.view(1, -1)

    def call(data: Tensor, scale: Tensor, *, w: Tensor) -> Tensor:
        return torch._scaled_mm(
            data, w.t(), scale_a=scale, scale_b=row_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def given(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = fp8.quantize(x, granularity="token")
        return tokens.data, tokens.scale

    return Prepared(
        [partial(call, w=w) for w in weights],
        w.nbytes,
        8,
        given=given,
        activation_quant="not included",
        path=lambda m: "torch._scaled_mm, scales by token and row, fast accumulation",
        rounds="weight and activations are rounded to E4M3",
    )


def marlin(weight: Weight, ms: Sequence[int], copies: Copies) -> Prepared:
    """Marlin of vLLM, W4A16, prepared and called by the functions with which vLLM serves NVFP4."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

    def layer() -> nn.Module:
        module = _module(
            weight=weight.nvfp4.packed.clone(),
            weight_scale=weight.nvfp4.scale.clone(),
            weight_global_scale=weight.nvfp4.global_scale.clone(),
        )
        module.output_size_per_partition, module.input_size_per_partition = weight.n, weight.k
        module.params_dtype = torch.bfloat16
        marlin_utils_fp4.prepare_fp4_layer_for_marlin(module)
        return module

    def call(x: Tensor, *, module: nn.Module) -> Tensor:
        return marlin_utils_fp4.apply_fp4_marlin_linear(
            input=x,
            weight=module.weight,
            weight_scale=module.weight_scale,
            weight_global_scale=module.weight_global_scale,
            workspace=module.workspace,
            size_n=weight.n,
            size_k=weight.k,
        )

    nbytes = weight.nvfp4.nbytes
    layers = [layer() for _ in range(copies(nbytes))]
    name = f"{named('vllm')} marlin_gemm"
    return Prepared([partial(call, module=m) for m in layers], nbytes, NVFP4_BITS, path=lambda m: name)


def humming(weight: Weight, ms: Sequence[int], copies: Copies) -> Prepared:
    """Humming, W4A16, with the configurations that it chooses itself for these M.

    It compiles each configuration for each shape. Left alone it compiles those of every M up to 8192, which takes
    minutes, so it is given the part of its own table that ``ms`` need.
    """
    from humming.kernel.humming import HummingKernel
    from humming.layer import HummingMethod
    from humming.schema import BaseWeightSchema
    from humming.tune import get_heuristics_config

    compute = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"}

    def layer() -> tuple[nn.Module, Any]:
        schema, tensors = BaseWeightSchema.from_config(
            {"quant_method": "modelopt", "quant_algo": "nvfp4"}
        ).convert_humming(
            tensors={
                "weight": weight.nvfp4.packed.clone(),
                "weight_scale": weight.nvfp4.scale.clone(),
                "weight_scale_2": weight.nvfp4.global_scale.view(1),
            },
            shape_n_stacks=[weight.n],
            shape_k_stacks=[weight.k],
            param_dtype=torch.bfloat16,
        )
        module = _module(**tensors)
        meta = HummingMethod.prepare_layer_meta(
            module,
            shape_n=weight.n,
            shape_k=weight.k,
            weight_schema=schema,
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            torch_dtype=torch.bfloat16,
        )
        HummingMethod.transform_humming_layer(module)
        module.locks = torch.zeros(1024, dtype=torch.int32, device=weight.dense.device)
        return module, meta

    nbytes = weight.nvfp4.nbytes
    layers = [layer() for _ in range(copies(nbytes))]
    meta = layers[0][1]
    chosen = needed_ranges(get_heuristics_config(meta, **compute), ms)
    texts = {"compute_config": json.dumps(compute), "tuning_config": json.dumps(chosen)}
    HummingKernel.prepare_kernels(meta.to_str(), texts["compute_config"], texts["tuning_config"])
    name = named("humming-kernels")

    def path(m: int) -> str:
        config = next(config for low, high, config in chosen if low < m <= high)
        block, warp = ("x".join(map(str, config[name])) for name in ("block_shape", "warp_shape"))
        return f"{name}, block {block}, warp {warp}, {config['num_stages']} stages"

    calls = [partial(HummingMethod.forward_layer, module, **texts) for module, _ in layers]
    return Prepared(calls, nbytes, NVFP4_BITS, path=path)


def needed_ranges(entries: Sequence[Sequence[Any]], ms: Sequence[int]) -> list[list[Any]]:
    """The ``(low, high, value)`` with ``low < m <= high`` for one of ``ms``, stretched to cover all M without a gap.

    Every one of ``ms`` still meets its own entry. Humming looks up M = 1 before any other, so there must be no gap.
    """
    chosen: list[list[Any]] = []
    for low, high, value in entries:
        if any(low < m <= high for m in ms):
            chosen.append([chosen[-1][1] if chosen else 0, high, value])
    chosen[-1][1] = 1 << 30
    return chosen


def _module(**tensors: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return module


PEERS = {"cublas-bf16": cublas_bf16, "scaled-mm-fp8": scaled_mm_fp8, "marlin": marlin, "humming": humming}
