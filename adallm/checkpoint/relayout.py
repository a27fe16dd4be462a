"""The plan for an NVFP4 directory: the same bytes under the names of the other layout, scales turned around."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from adallm.checkpoint.errors import fail
from adallm.checkpoint.exact import original_of, same_bytes, translate, unpack_originals
from adallm.checkpoint.layers import NVFP4_PARTS, Layer
from adallm.checkpoint.names import compressed_tensors_kv_name, is_linear_weight, modelopt_kv_name, split
from adallm.checkpoint.opened import Checkpoint
from adallm.checkpoint.quantization import MODELOPT, Scheme
from adallm.checkpoint.quantize import kv_scale_names, kv_scale_of_one
from adallm.checkpoint.values import check_scale


class RelayoutPlan:
    """Store a quantized checkpoint in ``layout``; the attributes are those of ``QuantizePlan``.

    Raises:
        ValueError: an FP8 KV cache for a model without k_proj.
    """

    def __init__(self, checkpoint: Checkpoint, layout: str, kv_cache: str | None) -> None:
        self._checkpoint, self._layout = checkpoint, layout
        self._directory, quantization = checkpoint.directory, checkpoint.quantization
        self._source = quantization.layout
        self.kv_cache = kv_cache or quantization.kv_cache
        self.schemes = {
            module: _scheme(layer, quantization.scheme_of(module))
            for module, layer in checkpoint.layers.items()
            if layer.format != "dense"
        }
        self.dense = [
            module
            for module, layer in checkpoint.layers.items()
            if layer.format == "dense" and is_linear_weight(layer.weight_name, layer.shape)
        ]
        add = kv_cache is not None and quantization.kv_cache is None
        self._add_kv = kv_scale_names(self._directory.files, layout) if add else {}
        self._originals = {
            name: value
            for header in self._directory.headers.values()
            for name, value in unpack_originals(header.metadata).items()
        }
        self.work = sum(header.nbytes for header in self._directory.headers.values())
        # Scalars may grow from 2 bytes to 4, and the kept numbers take about 100 bytes in the header.
        self.nbytes = self.work + 128 * len(self._directory.files)

    def prepare(self, progress: Callable[[int], object]) -> None:
        """Nothing to prepare."""

    def convert(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """The tensors that take the place of one, each with the number to keep beside it."""
        if name in self._add_kv:
            yield self._add_kv[name], kv_scale_of_one(self._layout), None
        role = self._checkpoint.role(name)
        file = self._directory.file(name)
        if role is not None and role != "weight":
            check_scale(file, name, role, value)
        if role is None or role in ("weight", "scale"):
            yield self._name(name, role), value, None
            return
        kept = original_of(name, value, role, self._source, self._originals)
        if self._layout == self._source:
            yield name, value, kept
            return
        if kept is not None:
            yield self._name(name, role), kept, None
            return
        try:
            new = translate(value, role, self._layout)
            exact = same_bytes(translate(new, role, self._source), value)
        except ValueError as error:
            fail(file, str(error), tensor=name)
        yield self._name(name, role), new, None if exact else value

    def _name(self, name: str, role: str | None) -> str:
        if role == "kv_scale":
            return modelopt_kv_name(name) if self._layout == MODELOPT else compressed_tensors_kv_name(name)
        layer = self._checkpoint.layer_of.get(name)
        if layer is None or layer.format != "nvfp4":
            return name
        return f"{split(name)[0]}.{NVFP4_PARTS[self._layout][role]}".removeprefix(".")


def _scheme(layer: Layer, declared: Scheme) -> Scheme:
    # Whether activations were calibrated is what the tensors say: config and file need not agree about it.
    if layer.format == "nvfp4":
        return replace(declared, activations="nvfp4" if "input_scale" in layer.parts else None)
    return declared
