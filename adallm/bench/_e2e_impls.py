"""What the end-to-end benchmark compares: how vLLM is started for each implementation, and what must then be found.

vLLM may fall back to another kernel than the one asked for, with a line in its log. So what runs is looked up in the
engine and compared with ``EXPECTED``: a row is of what it says, or there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adallm.vllm_plugin.compat import GRAPH_SIZES

MAX_LEN = 8448  # tokens of a sequence: the longest prompt, 8192, and what is generated


@dataclass(frozen=True)
class Impl:
    """An implementation.

    Attributes:
        quantized: whether the checkpoint is NVFP4.
        kv_cache: ``--kv-cache-dtype``; with ``"auto"``, the cache is BF16 and attention what vLLM takes for it.
        options: further ones of ``vllm.LLM``.
        expected: what each fact of ``_e2e_extension`` must begin with; one that is not here may be anything.
        ours: whether the plugin is on.
    """

    quantized: bool
    kv_cache: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False


def _stock(linear: str, kernel: str, attention: str | None) -> Impl:
    expected = {"quantization": "modelopt", "linear": kernel, "head": "Unquantized"}
    return _with(attention, Impl(True, options={"linear_backend": linear}, expected=expected))


def _ours(activations: str, linear: str, head: str = "checkpoint", attention: str | None = "CUSTOM") -> Impl:
    settings = {"activations": activations, "lm_head": head}
    expected = {
        "quantization": "adallm",
        "linear": linear,
        "head": "adallm W4A16" if head == "nvfp4" else "Unquantized",
    }
    options = {"additional_config": {"adallm": settings}}
    return _with(attention, Impl(True, options=options, expected=expected, ours=True))


def _with(attention: str | None, impl: Impl) -> Impl:
    """With a kernel for attention over an FP8 KV cache; None for a BF16 cache and the kernel that vLLM takes."""
    if attention is None:
        return replace(impl, expected={**impl.expected, "kv_cache": "auto"})
    options = {**impl.options, "attention_backend": attention}
    return replace(
        impl, kv_cache="fp8", options=options, expected={**impl.expected, "attention": attention, "kv_cache": "fp8"}
    )


def _graphs(impl: Impl) -> Impl:
    return replace(impl, options={**impl.options, "cudagraph_capture_sizes": list(GRAPH_SIZES)})


_BF16 = Impl(False, expected={"quantization": "None", "linear": "Unquantized", "head": "Unquantized"})
IMPLS = {
    "bf16": _BF16,
    "bf16-fp8kv": _with("TRITON_ATTN", _BF16),
    "stock-marlin-flashinfer": _stock("marlin", "MarlinNvFp4", "FLASHINFER"),
    "stock-marlin-triton": _stock("marlin", "MarlinNvFp4", "TRITON_ATTN"),
    "stock-humming-flashinfer": _stock("humming", "HummingNvFp4", "FLASHINFER"),
    "stock-humming-triton": _stock("humming", "HummingNvFp4", "TRITON_ATTN"),
    "stock-humming-flashinfer-graphs": _graphs(_stock("humming", "HummingNvFp4", "FLASHINFER")),
    "stock-humming-triton-graphs": _graphs(_stock("humming", "HummingNvFp4", "TRITON_ATTN")),
    "stock-humming-bf16kv": _stock("humming", "HummingNvFp4", None),
    "adallm-w4a16-bf16kv": _ours("bf16", "adallm W4A16", attention=None),
    "adallm-w4a8-bf16kv": _ours("fp8", "adallm W4A8", attention=None),
    "adallm-w4a16": _ours("bf16", "adallm W4A16"),
    "adallm-w4a8": _ours("fp8", "adallm W4A8"),
    "adallm-auto": _ours("auto", "adallm W4A"),
    "adallm-auto-graphs": _graphs(_ours("auto", "adallm W4A")),
    "adallm-auto-lm-head": _ours("auto", "adallm W4A", "nvfp4"),
    "adallm-auto-lm-head-graphs": _graphs(_ours("auto", "adallm W4A", "nvfp4")),
}
# Ratios are of implementations with NVFP4 weights and an FP8 KV cache.
OURS = tuple(name for name, impl in IMPLS.items() if impl.ours and impl.kv_cache == "fp8")
# Of those the ones that multiply by the checkpoint's own lm_head, as stock vLLM does.
SAME_HEAD = tuple(name for name in OURS if IMPLS[name].expected["head"] == "Unquantized")
STOCK = tuple(name for name, impl in IMPLS.items() if impl.quantized and not impl.ours and impl.kv_cache == "fp8")
BF16 = "bf16"


def options(impl: Impl) -> dict[str, Any]:
    """All options of ``vllm.LLM`` but the model."""
    common = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": MAX_LEN,
        # A prompt that comes again must be computed again.
        "enable_prefix_caching": False,
        "seed": 0,
    }
    return common | ({} if impl.kv_cache == "auto" else {"kv_cache_dtype": impl.kv_cache}) | dict(impl.options)


def environment(impl: Impl, given: Mapping[str, str], caches: Path) -> dict[str, str]:
    """Of the process that runs an implementation: ``given``, without what it says to the plugin.

    Args:
        caches: where it keeps what it compiles, so that it finds nothing of others'.
    """
    kept = {name: value for name, value in given.items() if not name.startswith("ADALLM_")}
    # The model is on the disk, and nobody is told of it.
    kept |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # Greedy sampling does not use FlashInfer's, which would be compiled at each start.
    kept["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    for name in ("TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE", "HUMMING_CACHE_DIR"):
        kept[name] = str(caches / name.partition("_")[0].lower())
    return kept if impl.ours else kept | {"ADALLM_DISABLE": "1"}


def mismatch(expected: Mapping[str, str], facts: Mapping[str, Any]) -> str | None:
    """How what runs differs from what is claimed; None where it does not.

    Args:
        expected: as in ``Impl``.
        facts: names, or lists of them, of ``_e2e_extension``; a list must not be empty.
    """
    for name, start in expected.items():
        found = facts[name] if isinstance(facts[name], list) else [facts[name]]
        if not found or not all(entry.startswith(start) for entry in found):
            return f"{name} is {', '.join(found) or 'nothing'}; it must be {start}"
    return None


def path(facts: Mapping[str, Any]) -> str:
    """What runs, for the row."""
    heads = [f"head {name}" for name in facts["head"]]
    caches = [f"KV cache {name}" for name in facts["kv_cache"]]
    return ", ".join([*facts["linear"], *heads, *facts["attention"], *caches])
