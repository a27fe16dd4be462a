"""Read a checkpoint into memory: as NVFP4 tensors, or as dense weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adallm.checkpoint.errors import fail
from adallm.checkpoint.exact import original_of, unpack_originals
from adallm.checkpoint.header import open_tensors
from adallm.checkpoint.layers import Layer
from adallm.checkpoint.names import modelopt_kv_name
from adallm.checkpoint.opened import Checkpoint, open_checkpoint
from adallm.checkpoint.quantization import COMPRESSED_TENSORS, MODELOPT
from adallm.checkpoint.values import check_scale
from adallm.nvfp4 import NVFP4Tensor, dequantize


def load(path: str | Path) -> dict[str, NVFP4Tensor | Tensor]:
    """All tensors: ``<module>.weight`` is an ``NVFP4Tensor`` for each NVFP4 layer, the others are as stored.

    The names are those of ModelOpt whatever the layout: the calibrated activation scale of an NVFP4 layer is
    ``<module>.input_scale``, float32 ``[]``, a multiplier (``input_global_scale`` of compressed-tensors is its
    reciprocal), and the KV-cache scales are ``<attention>.k_proj.k_scale`` and ``.v_proj.v_scale``, float32 ``[]``. FP8
    layers keep ``weight`` (float8_e4m3fn) and ``weight_scale`` as stored; ``w = weight * weight_scale``.

    The values are those that other readers of the layout compute. From compressed-tensors an ``NVFP4Tensor`` has the
    stored ``divisor``, and ``dequantize`` gives ``e2m1 * (scale / divisor)``; from ModelOpt it has none and gives
    ``e2m1 * (scale * global_scale)``. The two may differ in the last bit of an FP32 number.

    Raises:
        CheckpointError: anything that is damaged or contradicts itself, naming the file and the tensor.
    """
    checkpoint = open_checkpoint(path)
    result: dict[str, NVFP4Tensor | Tensor] = {}
    for layer, tensors in _stream(checkpoint):
        if layer is not None and layer.format == "nvfp4":
            result[layer.weight_name] = _nvfp4_tensor(layer, tensors)
            if "input_scale" in layer.parts:
                result[f"{layer.weight_name.removesuffix('weight')}input_scale"] = tensors["input_scale"].multiplier
        elif layer is not None:
            result.update((layer.parts[role], part.value) for role, part in tensors.items())
        else:
            result.update(_other(name, part.value, checkpoint) for name, part in tensors.items())
    return result


def load_dense(path: str | Path, dtype: torch.dtype | None = torch.bfloat16) -> dict[str, Tensor]:
    """The state dict of the plain model: every layer dequantized, the scales left out.

    Tied models have no ``lm_head.weight``, as in a dense directory.

    Args:
        path: a directory of any supported kind, a dense one included.
        dtype: of all floating-point tensors; None leaves dense tensors as stored and dequantizes to float32.

    Raises:
        CheckpointError: as ``load``.
    """
    checkpoint = open_checkpoint(path)
    result: dict[str, Tensor] = {}
    for layer, tensors in _stream(checkpoint):
        if layer is None:
            for name, part in tensors.items():
                if checkpoint.role(name) is None:
                    convert = dtype is not None and part.value.is_floating_point()
                    result[name] = part.value.to(dtype) if convert else part.value
        elif layer.format == "dense":
            weight = tensors["weight"].value
            result[layer.weight_name] = weight if dtype is None else weight.to(dtype)
        else:
            result[layer.weight_name] = _dequantized(layer, tensors, dtype or torch.float32)
    return result


def dequantized(checkpoint: Checkpoint) -> Iterator[tuple[Layer, Tensor]]:
    """The quantized layers and their weights, float32 ``[N, K]``; one file is read at a time."""
    for layer, tensors in _stream(checkpoint):
        if layer is not None and layer.format != "dense":
            yield layer, _dequantized(layer, tensors, torch.float32)


def _dequantized(layer: Layer, tensors: dict[str, _Part], dtype: torch.dtype) -> Tensor:
    if layer.format == "nvfp4":
        return dequantize(_nvfp4_tensor(layer, tensors), dtype)
    scale = tensors["fp8_scale"].value.float()
    scale = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    return (tensors["weight"].value.float() * scale).to(dtype)


@dataclass(frozen=True)
class _Part:
    """A stored tensor; for a scale that compressed-tensors stores as a divisor, its multiplier too."""

    value: Tensor
    multiplier: Tensor | None = None
    divisor: Tensor | None = None


def _stream(checkpoint: Checkpoint) -> Iterator[tuple[Layer | None, dict[str, _Part]]]:
    """Whole layers and other tensors, one file at a time; a layer waits for parts that lie in a later file."""
    waiting: dict[str, dict[str, _Part]] = {}
    for header in checkpoint.directory.headers.values():
        originals = unpack_originals(header.metadata)
        with open_tensors(header) as file:
            for name in header.tensors:
                part = _part(checkpoint, name, file.get_tensor(name), originals)
                layer = checkpoint.layer_of.get(name)
                if layer is None:
                    yield None, {name: part}
                    continue
                parts = waiting.setdefault(layer.module, {})
                parts[checkpoint.role(name)] = part
                if len(parts) == len(layer.parts):
                    yield layer, waiting.pop(layer.module)


def _part(checkpoint: Checkpoint, name: str, value: Tensor, originals: dict[str, Tensor]) -> _Part:
    role = checkpoint.role(name)
    if role is not None and role != "weight":
        check_scale(checkpoint.directory.file(name), name, role, value)
    if role not in ("global_scale", "input_scale"):
        return _Part(value)
    scalar = value.reshape(())
    if checkpoint.quantization.layout == MODELOPT:
        return _Part(value, scalar)
    kept = original_of(name, value, role, COMPRESSED_TENSORS, originals)
    multiplier = scalar.reciprocal() if kept is None else kept.reshape(())
    if not torch.isfinite(multiplier) or multiplier == 0:
        fail(checkpoint.directory.file(name), f"is {float(scalar)}, whose reciprocal is no FP32 number", tensor=name)
    return _Part(value, multiplier, scalar)


def _nvfp4_tensor(layer: Layer, tensors: dict[str, _Part]) -> NVFP4Tensor:
    scale = tensors["global_scale"]
    return NVFP4Tensor(tensors["weight"].value, tensors["scale"].value, scale.multiplier, scale.divisor)


def _other(name: str, value: Tensor, checkpoint: Checkpoint) -> tuple[str, Tensor]:
    if checkpoint.role(name) != "kv_scale" or value.numel() != 1:
        return name, value
    return modelopt_kv_name(name), value.float().reshape(())
