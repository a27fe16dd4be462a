"""A Hugging Face causal language model under a number format: every ``nn.Linear`` replaced by one that runs it.

``lm_head`` stays in BF16 in every format, as in published checkpoints. All formats share the arithmetic of
``linear.ReferenceLinear``, so that two of them differ by what is quantized alone. On a GPU, NVFP4 layers run the
kernels, which take BF16 and FP16 models and round the weight of W4A8 too (``linear.NVFP4Linear``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adallm import baselines, calibrated, checkpoint, fp8
from adallm.formats import BITS_PER_WEIGHT
from adallm.linear import DenseLinear, NVFP4Linear
from adallm.nvfp4 import NVFP4Tensor

# Kind of cache -> attention that rounds keys and values as it does.
_KV_ATTENTION = {"fp8": "adallm_fp8_kv", "fp8-token": "adallm_fp8_kv_token"}


@dataclass(frozen=True)
class Format:
    """What is quantized to what.

    Attributes:
        name: as given on the command line.
        title: as printed.
        weights: a key of ``formats.BITS_PER_WEIGHT``.
        activations: ``"bf16"`` or ``"fp8"`` (E4M3, one scale for a token).
        kv_cache: ``"bf16"``, ``"fp8"`` (E4M3, one scale for a layer: the checkpoint's, or 1) or ``"fp8-token"`` (E4M3,
            a scale of amax / 448 for each token and head).
    """

    name: str
    title: str
    weights: str
    activations: str = "bf16"
    kv_cache: str = "bf16"

    @property
    def run(self) -> str:
        """How the reference runs it: ``"stored"``, ``"packed"`` or ``"QDQ"`` (quantized and dequantized: simulated)."""
        if self.weights == "bf16":
            return "stored"
        if self.weights != "nvfp4":
            return "QDQ"
        return "packed" if self.kv_cache == "bf16" else "packed, KV QDQ"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight of the quantized layers, block scales included."""
        return BITS_PER_WEIGHT[self.weights]


FORMATS = {
    f.name: f
    for f in (
        Format("bf16", "BF16", "bf16"),
        Format("fp8", "FP8 W8A8", "fp8", activations="fp8"),
        Format("nvfp4", "NVFP4 W4A16", "nvfp4"),
        Format("nvfp4-w4a8", "NVFP4 W4A8", "nvfp4", activations="fp8"),
        Format("nvfp4-fp8kv", "NVFP4 W4A16, FP8 KV cache", "nvfp4", kv_cache="fp8"),
        Format("nvfp4-fp8kv-token", "NVFP4 W4A16, FP8 KV cache by token", "nvfp4", kv_cache="fp8-token"),
        Format("mxfp4", "MXFP4 W4A16", "mxfp4"),
        Format("int4-g128", "INT4 g128 W4A16", "int4-g128"),
        Format("int4-g128-sym", "INT4 g128 symmetric W4A16", "int4-g128-sym"),
    )
}


def load(directory: Path, form: Format, *, scale_rule: str = "max", device: str = "cpu") -> PreTrainedModel:
    """The model in ``directory`` under ``form``, in eval mode on ``device``.

    Args:
        directory: a BF16 model, or an NVFP4 model of either layout, whose own weights are used. Of a BF16 model the
            NVFP4 formats run exactly the weights that ``adallm quantize`` would write.
        scale_rule: how NVFP4 scales are chosen for a BF16 model; those of ``calibrated.RULES`` read the bundled text.

    Raises:
        ValueError: an NVFP4 model with a format of other weights; experts that are not ``nn.Linear``; whatever
            ``checkpoint.load`` and ``checkpoint.convert`` find wrong.
    """
    stored: dict[str, Tensor | NVFP4Tensor] = {}
    if checkpoint.quantization_of(directory) is None:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        if form.weights == "nvfp4":
            with tempfile.TemporaryDirectory(prefix="adallm-") as scratch:
                calibrated.convert(directory, Path(scratch) / "nvfp4", scale_rule=scale_rule)
                stored = checkpoint.load(Path(scratch) / "nvfp4")
        elif form.weights != "bf16":
            _no_fused_experts(model)
    else:
        if form.weights != "nvfp4":
            raise ValueError(
                f"{directory} holds NVFP4 weights; format {form.name!r} needs a BF16 model. Supported here: "
                + ", ".join(name for name, f in FORMATS.items() if f.weights == "nvfp4")
            )
        stored = checkpoint.load(directory)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        # Absent where only hf_quant_config.json declares it.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        dense = checkpoint.load_dense(directory, config.dtype or torch.bfloat16)
        model = _model_class(directory, config).from_pretrained(
            None, config=config, state_dict=dense, dtype=config.dtype
        )
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            model.set_submodule(name, _linear(name, linear, form, stored))
    if form.kv_cache != "bf16":
        _quantize_kv(model, form.kv_cache, stored)
    return model.eval().to(device)


def _model_class(directory: Path, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that the config names, out of transformers itself: no code from the directory."""
    for name in config.architectures or ():
        if isinstance(found := getattr(transformers, name, None), type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(f"{directory / 'config.json'}: architectures {config.architectures} are not in transformers")


def _linear(name: str, linear: nn.Linear, form: Format, stored: dict[str, Tensor | NVFP4Tensor]) -> nn.Module:
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    packed = stored.get(f"{name}.weight")
    if isinstance(packed, NVFP4Tensor):
        return NVFP4Linear(packed, bias, activations=form.activations)
    if form.weights in ("bf16", "nvfp4") or name == "lm_head":
        return DenseLinear(weight, bias)
    return DenseLinear(_qdq(weight, form.weights), bias, activations=form.activations)


def _no_fused_experts(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name:
            raise ValueError(
                f"{name} {list(parameter.shape)} holds experts in one tensor, which this evaluation does not quantize; "
                "supported: dense models"
            )


def _qdq(weight: Tensor, weights: str) -> Tensor:
    """The dequantized values in FP32, which unlike BF16 holds all of them exactly."""
    if weights == "fp8":
        return fp8.dequantize(fp8.quantize(weight, granularity="row"))
    return baselines.FORMATS[weights](weight, dtype=torch.float32)


def _quantize_kv(model: PreTrainedModel, kind: str, stored: dict) -> None:
    """Round keys and values to E4M3 where they would enter the cache, after the rotary embedding."""
    for name, module in model.named_modules():
        for side in ("k", "v"):
            scales = (f"{name}.{side}_proj.{side}_scale", f"{name}.{side}_scale")
            scale = next((stored[key] for key in scales if key in stored), None)
            setattr(module, f"_adallm_{side}_scale", 1.0 if scale is None else float(scale))
    attend(model, _KV_ATTENTION[kind], _fp8_kv_attention if kind == "fp8" else _fp8_kv_token_attention)


def attend(model: PreTrainedModel, name: str, function: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Let a model's attention be ``function``, which takes what transformers' ``sdpa_attention_forward`` takes.

    Args:
        name: for transformers, of this function alone.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def _fp8_kv_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
    key = (fp8.to_e4m3(key.float() / module._adallm_k_scale).float() * module._adallm_k_scale).to(key.dtype)
    value = (fp8.to_e4m3(value.float() / module._adallm_v_scale).float() * module._adallm_v_scale).to(value.dtype)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _fp8_kv_token_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs
):
    # [B, Hkv, tokens, D]: a scale for each vector along D.
    return sdpa_attention_forward(module, query, fp8.qdq(key), fp8.qdq(value), mask, **kwargs)
