"""lm-eval language models over our formats, with transformers or vLLM underneath, that keep every window they score."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from adallm import calibrated, checkpoint, hf_model
from adallm.hf_model import Format
from adallm.vllm_command import any_build

# Windows of published WikiText perplexities; shorter where a model's context is.
MAX_LENGTH = 2048


class _KeepsWindows:
    """Mixed into an lm-eval model: ``windows`` holds ``(tokens, nats)`` of all that was scored, in order."""

    windows: list[tuple[int, float]]
    title: str
    progress: bool
    _bar: tqdm | None = None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        total = sum(len(self.tok_encode(request.args[0])) for request in requests)
        self._bar = tqdm(total=total, unit=" tokens", unit_scale=True, desc=self.title, disable=not self.progress)
        with self._bar:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs: Any) -> list:
        quiet = disable_tqdm or self._bar is not None or not self.progress
        scored = super()._loglikelihood_tokens(requests, disable_tqdm=quiet, **kwargs)
        for (_, _, continuation), (loglikelihood, _) in zip(requests, scored, strict=True):
            self.windows.append((len(continuation), -float(loglikelihood)))
            if self._bar is not None:
                self._bar.update(len(continuation))
        return scored


def vllm_formats() -> tuple[str, ...]:
    """The formats that vLLM runs from storage here, NVFP4 by our plugin."""
    nvfp4 = ("nvfp4", "nvfp4-w4a8")
    if torch.cuda.is_available():
        return ("bf16", "fp8", *nvfp4, "nvfp4-fp8kv")
    # The CPU build has an FP8 KV cache where there is AVX-512.
    return ("bf16", *nvfp4, *(["nvfp4-fp8kv"] if torch.cpu._is_avx512_supported() else []))


class _HF(_KeepsWindows, HFLM):
    pass


def max_length(directory: Path) -> int:
    """Tokens in a window."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()
    return min(getattr(config, "max_position_embeddings", None) or MAX_LENGTH, MAX_LENGTH)


def hf(directory: Path, form: Format, *, scale_rule: str, progress: bool) -> HFLM:
    """The reference: transformers, with every linear layer replaced (``hf_model.load``)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = _HF(
        pretrained=hf_model.load(directory, form, scale_rule=scale_rule, device=device),
        tokenizer=AutoTokenizer.from_pretrained(directory, trust_remote_code=False),
        batch_size=1 if device == "cpu" else 4,
        max_length=max_length(directory),
        softmax_dtype="float32",
    )
    lm.windows, lm.title, lm.progress = [], form.title, progress
    return lm


def vllm(directory: Path, form: Format, *, scale_rule: str, scratch: Path, progress: bool) -> Any:
    """vLLM with the weights in their stored form: an NVFP4 directory is written into ``scratch`` where needed.

    Raises:
        ValueError: a format that vLLM has no storage for, or vLLM is not installed.
    """
    if form.name not in vllm_formats():
        where = "a GPU" if torch.cuda.is_available() else "a CPU"
        raise ValueError(f"format {form.name!r} with vLLM on {where}; supported there: {', '.join(vllm_formats())}")
    if checkpoint.quantization_of(directory) is None:
        if form.weights == "nvfp4":
            target = scratch / f"{directory.name}-nvfp4-{scale_rule}"
            if not target.exists():
                calibrated.convert(directory, target, layout="modelopt", scale_rule=scale_rule, progress=progress)
            directory = target
    elif form.weights != "nvfp4":
        raise ValueError(f"{directory} holds NVFP4 weights; format {form.name!r} needs a BF16 model")
    model_class = _vllm_class()
    options: dict[str, Any] = {"max_model_len": max_length(directory), "seed": 0}
    if form.weights == "fp8":
        options["quantization"] = "fp8"
    if form.weights == "nvfp4":
        options["additional_config"] = {"adallm": {"activations": form.activations}}
    if form.kv_cache == "fp8":
        options["kv_cache_dtype"] = "fp8"
        if torch.cuda.is_available():
            options["attention_backend"] = "CUSTOM"
    if not torch.cuda.is_available():
        options |= {"enforce_eager": True, "distributed_executor_backend": "uni"}
    lm = model_class(pretrained=str(directory), dtype="auto", batch_size="auto", **options)
    lm.windows, lm.title, lm.progress = [], f"{form.title} (vLLM)", progress
    return lm


def _vllm_class() -> type:
    if not torch.cuda.is_available():
        # One process, no pinning, a small cache: what a laptop can give.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        # lm-eval asks for the version of a distribution called vllm.
        with any_build():
            from lm_eval.models.vllm_causallms import VLLM
    except ImportError as error:
        raise ValueError(f"BACKEND=vllm needs vLLM, which cannot be imported ({error})") from None

    class _VLLM(_KeepsWindows, VLLM):
        pass

    return _VLLM
