"""vLLM's attention backend ``CUSTOM``: our cache write and decode attention, vLLM's kernels for prefill.

In a step, sequences with the same few query tokens come first and are ours; those behind them are prompts, which are
FlashAttention's (``prefill.py``) where it is there, else vLLM's Triton kernel's.
The cache has vLLM's layout, keys and values of a head side by side, which ours read by strides. Queries stay in 16
bits. Full CUDA graphs hold decode steps, speculative ones included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from adallm.attention import Workspace, paged_decode, write_kv
from adallm.kernels.decode_choice import WRITES_UP_TO
from adallm.paged import BLOCK_SIZES, HEAD_SIZES, MAX_GQA, MAX_QUERIES, Shape
from adallm.vllm_plugin import prefill
from adallm.vllm_plugin.compat import FIRST, LAST
from adallm.vllm_plugin.prefill import Beginning, Continued, FlashAttention, beginning, continued
from adallm.vllm_plugin.settings import Settings


@dataclass
class Metadata(TritonAttentionMetadata):
    """Of a step.

    Attributes:
        decodes: sequences that are ours, the first ones, each with ``queries`` query tokens.
        workspace: for our kernel.
        prompts: of the sequences behind them; None if there are none.
        beginning: the last of those, as far as they begin in this step; None if they do not.
        continued: the prompts before ``beginning``; None if there are none.
    """

    decodes: int = 0
    queries: int = 0
    workspace: Workspace | None = None
    prompts: TritonAttentionMetadata | None = None
    beginning: Beginning | None = None
    continued: Continued | None = None


class MetadataBuilder(TritonAttentionMetadataBuilder):
    """Splits steps, and keeps the workspace that the layers of a model share."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        if self.reorder_batch_threshold > MAX_QUERIES:
            self.reorder_batch_threshold = 1
        self._workspace = None
        if device.type == "cuda":
            heads, size = kv_cache_spec.num_kv_heads, kv_cache_spec.head_size
            q = torch.empty(
                1, self.reorder_batch_threshold, self.num_heads_q, size, dtype=torch.bfloat16, device=device
            )
            cache = torch.empty(1, kv_cache_spec.block_size, heads, size, dtype=kv_cache_spec.dtype, device=device)
            self._workspace = Workspace.of(q, cache)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        step = super().build(common_prefix_len, common_attn_metadata, fast_build)
        decodes, prefills, tokens, _ = split_decodes_and_prefills(
            common_attn_metadata, decode_threshold=self.reorder_batch_threshold, require_uniform=True
        )
        starts = common_attn_metadata.query_start_loc_cpu
        queries = int(starts[1] - starts[0]) if decodes else 0
        found = Metadata(**vars(step), decodes=decodes, queries=queries, workspace=self._workspace)
        if prefills:
            found.prompts = _part(step, decodes, common_attn_metadata.num_reqs, tokens, step.num_actual_tokens)
            found.beginning = begins = beginning(common_attn_metadata, decodes)
            end = common_attn_metadata.num_reqs if begins is None else begins.first
            if end > decodes:
                part = found.prompts
                if begins is not None:
                    part = _part(step, decodes, end, tokens, begins.first_token)
                found.continued = continued(common_attn_metadata, part, decodes, end)
        return found

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Metadata:
        step = self.build(0, common_attn_metadata)
        # The shortest that there is; the longest would make a capture slow.
        step.seq_lens.fill_(max(step.queries, 1))
        return step


def _part(step: TritonAttentionMetadata, first: int, end: int, first_token: int, end_token: int) -> Any:
    """Of some sequences of a step, and their tokens."""
    return replace(
        step,
        num_actual_tokens=end_token - first_token,
        query_start_loc=step.query_start_loc[first : end + 1] - first_token,
        seq_lens=step.seq_lens[first:end],
        block_table=step.block_table[first:end],
        slot_mapping=step.slot_mapping[first_token:end_token],
    )


class Impl(TritonAttentionImpl):
    """One layer's attention."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *args: Any, **kwargs: Any):
        super().__init__(num_heads, head_size, scale, num_kv_heads, *args, **kwargs)
        # Queries come as they are, where vLLM would round them to E4M3 for its own kernel.
        self.supports_quant_query_input = False
        self._quantized = self.kv_cache_dtype.startswith("fp8")
        back = self.sliding_window[0]
        self._window = None if back < 0 else back + 1
        self._sinks = self._slopes = None
        config = get_current_vllm_config_or_none()
        settings = Settings.read(getattr(config, "additional_config", None))
        self._ours = num_heads // num_kv_heads <= MAX_GQA and not self.use_alibi_sqrt and self.chunk_lookback < 0
        if not self._ours and not settings.allow_fallback:
            raise ValueError(
                f"attention with {num_heads} query and {num_kv_heads} KV heads, alibi_sqrt {self.use_alibi_sqrt}, "
                f"chunk_lookback {self.chunk_lookback}; supported: up to {MAX_GQA} query heads for a KV head, none of "
                "the other two. With ADALLM_ALLOW_FALLBACK=1 vLLM's Triton kernel runs such layers"
            )
        # What another layer has left in the cache is not in this one's keys and values.
        self._writes = self.kv_sharing_target_layer_name is None
        alone = self._ours and self._writes
        given = {"alibi": self.alibi_slopes is not None, "sinks": self.sinks is not None}
        self._version = prefill.version(head_size, **given) if alone else None
        self._flash: FlashAttention | None = None
        # What has passed the checks of our kernels and needs them no more: steps by their sizes, and writes.
        self._steps: dict[tuple[int, int, bool], Shape] = {}
        self._written = False
        # The cache of the last step, and its keys and values.
        self._seen: Tensor | None = None
        self._views: tuple[Tensor, Tensor] | None = None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Our kernel writes 16 bits."""
        return False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks are there now, and the device is known."""
        super().process_weights_after_loading(act_dtype)
        if self.sinks is not None:
            self._sinks = self.sinks.detach().float()
        if self.alibi_slopes is not None:
            self._slopes = self.alibi_slopes.to(current_platform.device_type)
        if self._version is not None:
            given = (self.scale, self.sliding_window, self.logits_soft_cap)
            self._flash = FlashAttention(self._version, *given, alibi=self._slopes, sinks=self.sinks)

    @property
    def runs(self) -> str:
        """What runs this layer, in a few words."""
        if not self._ours:
            return "vLLM Triton"
        if self._version is None:
            return "adallm decode, vLLM Triton prefill"
        most = prefill.most_tokens(self.num_kv_heads, self.head_size)
        return f"adallm decode, vLLM FlashAttention {self._version} prefill, Triton past {most} tokens behind prefixes"

    def _caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[num_blocks, block_size, Hkv, D]`` of vLLM's ``[num_blocks, Hkv, block_size, 2 D]``."""
        if kv_cache is not self._seen:
            k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            if self._quantized and k_cache.dtype != self.fp8_dtype:
                k_cache, v_cache = k_cache.view(self.fp8_dtype), v_cache.view(self.fp8_dtype)
            self._seen, self._views = kv_cache, (k_cache, v_cache)
            self._steps, self._written = {}, False
        return self._views

    def _scales(self, layer: Any) -> dict[str, Any]:
        if not self._quantized:
            return {}
        if layer.calculate_kv_scales:
            return {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
        return {"k_scale": layer._k_scale_float, "v_scale": layer._v_scale_float}

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        step = attn_metadata
        if step is None or not self._ours:
            if step is not None:
                self._write(layer, key, value, self._caches(kv_cache), step, 0)
            return super().forward(layer, query, key, value, kv_cache, step, output, output_scale, output_block_scale)
        caches = self._caches(kv_cache)
        tokens = step.decodes * step.queries
        new = {}
        if self._writes and 0 < step.decodes <= WRITES_UP_TO:
            shape = (step.decodes, step.queries, self.num_kv_heads, self.head_size)
            new = {"k": key[:tokens].view(shape), "v": value[:tokens].view(shape)}
            new["slot_mapping"] = step.slot_mapping[:tokens]
        self._write(layer, key, value, caches, step, tokens if new else 0)
        if step.decodes:
            self._decode(layer, query, caches, step, output, new)
        others = step.prompts
        if self._flash is not None:
            others = None if step.continued is None else step.continued.step
            if step.beginning is not None:
                self._flash.begin(query, key, value, output, step.beginning)
        if others is not None:
            first = step.decodes * step.queries
            of = slice(first, first + others.num_actual_tokens)
            q, out = query[of], output[of]
            if self._flash is None or not self._flash.go_on(q, caches, out, step.continued, self._scales(layer)):
                super().forward(layer, q, key[of], value[of], kv_cache, others, out)
        return output

    def _decode(
        self,
        layer: Any,
        query: Tensor,
        caches: tuple[Tensor, Tensor],
        step: Metadata,
        output: Tensor,
        new: dict[str, Tensor],
    ) -> None:
        tokens = step.decodes * step.queries
        q = query[:tokens].view(step.decodes, step.queries, self.num_heads, self.head_size)
        sizes = (step.decodes, step.queries, bool(new))
        paged_decode(
            q,
            *caches,
            step.block_table[: step.decodes],
            step.seq_lens[: step.decodes],
            scale=self.scale,
            **self._scales(layer),
            window=self._window,
            soft_cap=self.logits_soft_cap,
            sinks=self._sinks,
            alibi_slopes=self._slopes,
            **new,
            out=output[:tokens].view(q.shape),
            workspace=step.workspace,
            checked=self._steps.get(sizes),
        )
        if sizes not in self._steps:
            self._steps[sizes] = Shape.of(q, caches[0])

    def _write(
        self,
        layer: Any,
        key: Tensor,
        value: Tensor,
        caches: tuple[Tensor, Tensor],
        step: TritonAttentionMetadata,
        first: int,
    ) -> None:
        """Keys and values from a token on to their slots, unless another layer has written those of this one."""
        if self._writes and step.num_actual_tokens > first:
            slots = step.slot_mapping
            if first or len(slots) < len(key):
                of = slice(first, len(slots))
                key, value, slots = key[of], value[of], slots[of]
            write_kv(key, value, *caches, slots, **self._scales(layer), checked=self._written)
            self._written = True


class AdaLLMAttentionBackend(TritonAttentionBackend):
    """Decoders with heads, blocks and caches that our kernels take."""

    # Decode attention writes new keys and values itself.
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return list(BLOCK_SIZES)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or any(block_size % size == 0 for size in BLOCK_SIZES)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in HEAD_SIZES

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return FIRST <= (capability.major, capability.minor) <= LAST
