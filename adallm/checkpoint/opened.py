"""A checkpoint whose configs, index and headers were read and found to agree."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adallm.checkpoint.agreement import check_agreement
from adallm.checkpoint.directory import Directory, open_directory
from adallm.checkpoint.errors import fail
from adallm.checkpoint.layers import Layer, group_layers
from adallm.checkpoint.names import compressed_tensors_kv_name, modelopt_kv_name, split
from adallm.checkpoint.parse import read_quantization
from adallm.checkpoint.quantization import COMPRESSED_TENSORS, MODELOPT, Quantization

_KV_SCALES = ("k_scale", "v_scale", "q_scale")


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose configs, index and headers were read and agree; the tensors are still on disk."""

    directory: Directory
    quantization: Quantization | None
    layers: dict[str, Layer]
    layer_of: dict[str, Layer]

    def role(self, tensor: str) -> str | None:
        """The role of a tensor: one of its layer's (layers.py), ``kv_scale``, or None."""
        if tensor in self.layer_of:
            return next(role for role, name in self.layer_of[tensor].parts.items() if name == tensor)
        return "kv_scale" if split(tensor)[1] in _KV_SCALES and self.quantization is not None else None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check everything but the tensors' values.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    directory = open_directory(path)
    quantization, second = read_quantization(directory)
    layers, layer_of = group_layers(directory, quantization, second)
    check_agreement(directory, layers)
    checkpoint = Checkpoint(directory, quantization, layers, layer_of)
    _check_kv_scales(checkpoint)
    return checkpoint


def quantization_of(path: str | Path) -> Quantization | None:
    """How a directory is quantized, None for a dense one; its headers are checked, its values are not read.

    Raises:
        CheckpointError: as ``load``, but for values.
    """
    return open_checkpoint(path).quantization


def _check_kv_scales(checkpoint: Checkpoint) -> None:
    quantization, directory = checkpoint.quantization, checkpoint.directory
    seen: dict[str, str] = {}
    for name in directory.files:
        if checkpoint.role(name) != "kv_scale":
            continue
        file, entry = directory.file(name), directory.entry(name)
        if quantization.kv_cache is None:
            fail(file, f"is there, but {quantization.files[0]} declares no quantized KV cache", tensor=name)
        one = entry.numel == 1 or (quantization.layout == COMPRESSED_TENSORS and entry.numel)
        if entry.dtype not in ("F32", "BF16", "F16") or not one:
            what = f"is {entry.dtype} {list(entry.shape)}; a KV-cache scale is one floating-point number"
            fail(file, what, tensor=name)
        common = modelopt_kv_name(name)
        if common in seen:
            fail(file, f"is there twice, {seen[common]} being the other", tensor=name)
        seen[common] = name
    # Without a scale readers take 1.0. That is right if no layer has one, and wrong if a single one got lost.
    alike = {_without_numbers(name) for name in seen}
    for module in checkpoint.layers:
        last = split(module)[1]
        common = f"{module}.{last[:1]}_scale"
        if (
            last in ("k_proj", "v_proj")
            and common not in seen
            and {_without_numbers(common), _twin(common)} & {*alike, *seen}
        ):
            name = common if quantization.layout == MODELOPT else compressed_tensors_kv_name(common)
            fail(directory.file(checkpoint.layers[module].parts["weight"]), "is missing beside others", tensor=name)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _twin(name: str) -> str:
    """The K scale for a V scale and the reverse, under ModelOpt's names."""
    end = "k_proj.k_scale"
    return f"{name.removesuffix(end)}v_proj.v_scale" if name.endswith(end) else f"{name[: -len(end)]}{end}"
