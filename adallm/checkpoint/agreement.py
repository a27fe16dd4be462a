"""Hold the tensors of a directory against the dimensions in its ``config.json``.

For the model types in ``_DEFAULTS`` the shapes of embeddings, norms, attention and MLP follow from the config; for the
dense ones among them the set of tensors does too. For every model the 16-bit floats have the config's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from adallm.checkpoint.directory import CONFIG, INDEX, SINGLE, Directory
from adallm.checkpoint.errors import fail
from adallm.checkpoint.header import same_stored_bytes
from adallm.checkpoint.layers import FLOATS, Layer
from adallm.checkpoint.names import natural_key

# What transformers takes where a config leaves it out (None: derived from the number of attention heads).
_DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None},
    "mistral": {"num_key_value_heads": 8, "head_dim": None},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen2_moe": {"num_key_value_heads": 16, "head_dim": None},
    "qwen3_moe": {"num_key_value_heads": 4, "head_dim": None},
    "mixtral": {"num_key_value_heads": 8, "head_dim": None},
}
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_INV_FREQ = re.compile(r".*\brotary_emb\.inv_freq")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Dimensions:
    """The sizes that the shapes follow from."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    key_value: int
    head: int
    vocabulary: int
    experts: int | None = None
    expert: int | None = None
    shared_expert: int | None = None


def check_agreement(directory: Directory, layers: dict[str, Layer]) -> None:
    """Check dtypes, shapes and, for dense llama-like models, that every tensor is there.

    Raises:
        CheckpointError: a dimension that the config lacks; a tensor that is missing, unexpected, or has another dtype
            or shape than the config says; a tied ``lm_head`` with values of its own.
    """
    _check_dtypes(directory, layers)
    _check_tied_head(directory)
    kind = directory.config.get("model_type")
    if kind not in _DEFAULTS or directory.text_config is not directory.config:
        return
    sizes = _dimensions(directory, kind)
    shapes = {layer.parts["weight"]: layer.shape for layer in layers.values()}
    logical = {_logical(name): name for name in directory.files}
    for name in directory.files:
        expected = _expected_shape(_logical(name).removeprefix("model."), sizes)
        shape, dtype = shapes.get(name, directory.entry(name).shape), directory.entry(name).dtype
        if expected is not None and name not in shapes and dtype not in FLOATS:
            fail(directory.file(name), f"is {dtype}, not a floating-point number", tensor=name)
        if expected is not None and shape != expected:
            fail(directory.file(name), f"stands for {list(shape)}, but {CONFIG} says {list(expected)}", tensor=name)
    if kind in _DENSE:
        _check_set(directory, kind, sizes, logical)


def _logical(name: str) -> str:
    return name.removesuffix("_packed") if name.endswith(".weight_packed") else name


def _check_dtypes(directory: Directory, layers: dict[str, Layer]) -> None:
    stated = next(
        (
            config[key]
            for config in (directory.config, directory.text_config)
            for key in ("dtype", "torch_dtype")
            if config.get(key) is not None
        ),
        None,
    )
    expected = None
    if stated is not None:
        expected = _CONFIG_DTYPES.get(str(stated).removeprefix("torch."))
        if expected is None:
            fail(directory.config_file, f"dtype {str(stated)[:80]!r} is not one of {', '.join(_CONFIG_DTYPES)}")
    scales = {name for layer in layers.values() for role, name in layer.parts.items() if role != "weight"}
    for name in directory.files:
        dtype = directory.entry(name).dtype
        if dtype not in ("BF16", "F16") or name in scales or name.endswith((".k_scale", ".v_scale", ".q_scale")):
            continue
        expected = expected or dtype
        if dtype != expected:
            fail(directory.file(name), f"is {dtype}, but the dtype of {CONFIG} is {stated or expected}", tensor=name)


def _dimensions(directory: Directory, kind: str) -> Dimensions:
    config = directory.config

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 1 << 40:
            fail(directory.config_file, f"{key} is {str(value)[:80]!r}, not a positive integer")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    default = _DEFAULTS[kind]
    head = size("head_dim", default["head_dim"] or hidden // heads)
    moe = kind not in _DENSE
    intermediate = size("intermediate_size")
    return Dimensions(
        hidden=hidden,
        intermediate=intermediate,
        layers=size("num_hidden_layers"),
        query=heads * head,
        key_value=size("num_key_value_heads", default["num_key_value_heads"] or heads) * head,
        head=head,
        vocabulary=size("vocab_size"),
        # transformers 5 writes num_local_experts where older ones wrote num_experts.
        experts=size("num_experts" if "num_experts" in config else "num_local_experts") if moe else None,
        expert=None if not moe else intermediate if kind == "mixtral" else size("moe_intermediate_size"),
        shared_expert=size("shared_expert_intermediate_size") if kind == "qwen2_moe" else None,
    )


def _expected_shape(name: str, sizes: Dimensions) -> tuple[int, ...] | None:
    """The shape that the config gives a tensor, without ``model.`` before its name, or None if it gives none."""
    if name in ("embed_tokens.weight", "lm_head.weight"):
        return (sizes.vocabulary, sizes.hidden)
    match = _LAYER.fullmatch(name)
    suffix = match.group(2) if match else name
    if suffix in ("norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight"):
        return (sizes.hidden,)
    if suffix in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        return (sizes.head,)
    if suffix in ("mlp.gate.weight", "block_sparse_moe.gate.weight") and sizes.experts:
        return (sizes.experts, sizes.hidden)
    module, _, parameter = suffix.rpartition(".")
    parent, _, last = module.rpartition(".")
    if parent == "self_attn":
        outputs, inputs = {
            "q_proj": (sizes.query, sizes.hidden),
            "k_proj": (sizes.key_value, sizes.hidden),
            "v_proj": (sizes.key_value, sizes.hidden),
            "o_proj": (sizes.hidden, sizes.query),
        }.get(last, (None, None))
    else:
        width = sizes.intermediate if parent == "mlp" else None
        if re.fullmatch(r"(mlp|block_sparse_moe)\.experts\.\d+", parent):
            width = sizes.expert
        elif parent == "mlp.shared_expert":
            width = sizes.shared_expert
        wide = last in ("gate_proj", "up_proj", "w1", "w3")
        known = wide or last in ("down_proj", "w2")
        outputs, inputs = (None, None) if not known else (width, sizes.hidden) if wide else (sizes.hidden, width)
    if outputs is None or inputs is None or parameter not in ("weight", "bias"):
        return None
    return (outputs, inputs) if parameter == "weight" else (outputs,)


def _layer_tensors(kind: str, config: dict) -> Iterator[str]:
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    yield from (f"self_attn.{name}.weight" for name in attention)
    yield from (f"mlp.{name}.weight" for name in mlp)
    yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
    if kind == "qwen3":
        yield from ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    if kind == "qwen2":
        yield from (f"self_attn.{name}.bias" for name in attention[:3])
    if kind in ("llama", "qwen3") and config.get("attention_bias"):
        yield from (f"self_attn.{name}.bias" for name in attention)
    if kind == "llama" and config.get("mlp_bias"):
        yield from (f"mlp.{name}.bias" for name in mlp)


def _check_set(directory: Directory, kind: str, sizes: Dimensions, logical: dict[str, str]) -> None:
    config = directory.config
    prefix = "model." if any(name.startswith("model.") for name in logical) else ""
    in_layer = set(_layer_tensors(kind, config))
    for name, stored in sorted(logical.items(), key=lambda item: natural_key(item[0])):
        match = _LAYER.fullmatch(name)
        if match is None or _INV_FREQ.fullmatch(name):
            continue
        if int(match.group(1)) >= sizes.layers:
            fail(
                directory.file(stored),
                f"is in a layer beyond num_hidden_layers {sizes.layers} of {CONFIG}",
                tensor=stored,
            )
        if name.endswith((".weight", ".bias")) and match.group(2) not in in_layer:
            fail(directory.file(stored), f"is no part of a {kind} model with this {CONFIG}", tensor=stored)
    architectures = config.get("architectures") or ["ForCausalLM"]
    head = prefix and isinstance(architectures, list) and any("ForCausalLM" in str(name) for name in architectures)
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        fail(directory.config_file, f"tie_word_embeddings is {str(tied)[:80]!r}, not true or false")
    required = [f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"]
    required += ["lm_head.weight"] if head and not tied else []
    # One layer after the other, so that a num_hidden_layers of a billion ends at the first missing tensor.
    for name in required:
        _require(directory, name, logical)
    for i in range(sizes.layers):
        for suffix in sorted(in_layer):
            _require(directory, f"{prefix}layers.{i}.{suffix}", logical)


def _require(directory: Directory, name: str, logical: dict[str, str]) -> None:
    if name not in logical:
        file = directory.path / (INDEX if directory.indexed else SINGLE)
        fail(file, f"is missing, but {CONFIG} calls for it", tensor=name)


def _check_tied_head(directory: Directory) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if directory.config.get("tie_word_embeddings") is not True or embedding not in directory.files:
        return
    packed = f"{head}_packed"
    if packed in directory.files:
        fail(directory.file(packed), f"is there although {CONFIG} ties it to the embedding", tensor=packed)
    if head in directory.files and not same_stored_bytes(
        directory.headers[directory.files[head]], head, directory.headers[directory.files[embedding]], embedding
    ):
        fail(directory.file(head), f"differs from {embedding}, to which {CONFIG} ties it", tensor=head)
