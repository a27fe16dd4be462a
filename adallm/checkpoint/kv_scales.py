"""Put KV-cache scales into a quantized checkpoint, under the names from which vLLM loads them.

==================  ==========================================  ===========================================
                    ModelOpt                                    compressed-tensors
==================  ==========================================  ===========================================
tensors             ``<attention>.k_proj.k_scale`` F32 [],      ``<attention>.k_scale`` F32 [1],
                    ``<attention>.v_proj.v_scale`` F32 []       ``<attention>.v_scale`` F32 [1]
declared by         ``kv_cache_quant_algo: "FP8"`` and          ``kv_cache_scheme``
                    ``kv_cache_scheme``
==================  ==========================================  ===========================================

vLLM makes a place for the scales of a layer where the quantization config of the model declares an FP8 KV cache. A
model that is not quantized has no such config, and ModelOpt's cannot declare a KV cache alone: vLLM wants a
``quant_algo``. What it loads from ModelOpt's layout it holds in the dtype of the model: rounded to BF16 mostly.

Sources: vLLM's ``kv_cache.py``, ``modelopt.py``, ``compressed_tensors.py`` and ``maybe_remap_kv_scale_name``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from adallm.checkpoint.emit import with_fp8_kv_cache
from adallm.checkpoint.exact import unpack_originals
from adallm.checkpoint.names import compressed_tensors_kv_name, modelopt_kv_name, natural_key, split
from adallm.checkpoint.opened import Checkpoint, open_checkpoint
from adallm.checkpoint.quantization import COMPRESSED_TENSORS, MODELOPT
from adallm.checkpoint.quantize import kv_scale_names
from adallm.checkpoint.rewrite import rewrite
from adallm.checkpoint.writer import check_absent


def attention_layers(path: str | Path) -> list[str]:
    """The attention modules of a checkpoint that ``write_kv_scales`` supports, layer 10 behind layer 2.

    Raises:
        CheckpointError: as ``load``, but for values.
        ValueError: not quantized; a KV cache that is declared as something else than FP8 with one scale for a layer; a
            layer with only one of k_proj and v_proj, or no layer with them.
    """
    return _attention_layers(open_checkpoint(path))


def write_kv_scales(src: str | Path, dst: str | Path, scales: Mapping[str, float], *, progress: bool = False) -> Path:
    """``dst`` = ``src`` with these KV-cache scales in place of what it has, and an FP8 KV cache declared.

    All other tensors are copied bit for bit, in the files in which they are.

    Args:
        src: a quantized directory of either layout.
        dst: must not exist; appears only when it is whole.
        scales: the multiplier of the E4M3 cache for every layer, by the name that ``load`` has for it in either layout:
            ``<attention>.k_proj.k_scale`` and ``<attention>.v_proj.v_scale``.
        progress: show a bar on stderr.

    Raises:
        CheckpointError: the source is damaged or contradicts itself.
        ValueError: as ``attention_layers``; not exactly one scale for k and for v of each; a scale that is not a
            finite and positive FP32 number.
        FileExistsError: ``dst`` exists.
        OSError: not enough disk space.
    """
    check_absent(Path(dst))
    checkpoint = open_checkpoint(src)
    expected = {f"{layer}.{side}_proj.{side}_scale" for layer in _attention_layers(checkpoint) for side in "kv"}
    if wrong := sorted(expected ^ set(scales), key=natural_key):
        raise ValueError(f"{src}: {wrong[0]} is {'missing' if wrong[0] in expected else 'no scale of this model'}")
    tensors = {name: torch.tensor(scale, dtype=torch.float32) for name, scale in scales.items()}
    for name, value in tensors.items():
        if not 0 < float(value) < math.inf:
            raise ValueError(f"{name} is {scales[name]}; a scale is a finite and positive FP32 number")
    directory, layout = checkpoint.directory, checkpoint.quantization.layout
    configs = with_fp8_kv_cache(layout, directory.config, directory.hf_quant_config)
    rewrite(directory, _KVScalePlan(checkpoint, tensors), Path(dst), *configs, progress=progress)
    return Path(dst)


def _attention_layers(checkpoint: Checkpoint) -> list[str]:
    path, quantization, files = checkpoint.directory.path, checkpoint.quantization, checkpoint.directory.files
    if quantization is None:
        raise ValueError(
            f"{path} is not quantized, so that no config can declare its KV cache to vLLM; supported: quantized "
            f"checkpoints in the layouts {MODELOPT} and {COMPRESSED_TENSORS}, as `adallm quantize` writes them"
        )
    if quantization.kv_cache not in (None, "fp8"):
        raise ValueError(f"{path} declares a KV cache in {quantization.kv_cache!r}; supported: fp8, or none yet")
    for name in files:
        if checkpoint.role(name) == "kv_scale" and checkpoint.directory.entry(name).numel != 1:
            shape = list(checkpoint.directory.entry(name).shape)
            raise ValueError(f"{path}: {name} has shape {shape}; supported: one KV-cache scale for a layer")
    try:
        scales = set(kv_scale_names(files, MODELOPT).values())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    layers = sorted({split(split(name)[0])[0] for name in scales}, key=natural_key)
    for layer in layers:
        for side in "kv":
            if f"{layer}.{side}_proj.{side}_scale" not in scales:
                raise ValueError(f"{path}: {layer} has no {side}_proj; supported: attention with k_proj and v_proj")
    return layers


class _KVScalePlan:
    """Replace or add the scales; the attributes are those of ``rewrite.Plan``."""

    def __init__(self, checkpoint: Checkpoint, scales: Mapping[str, Tensor]) -> None:
        self._checkpoint, self._scales = checkpoint, scales
        headers, files = checkpoint.directory.headers, checkpoint.directory.files
        stored = {modelopt_kv_name(name) for name in files if checkpoint.role(name) == "kv_scale"}
        beside = kv_scale_names(files, MODELOPT)
        self._beside = {weight: name for weight, name in beside.items() if name not in stored}
        self._originals = {
            name: value for header in headers.values() for name, value in unpack_originals(header.metadata).items()
        }
        self.work = sum(header.nbytes for header in headers.values())
        self.nbytes = self.work + 4 * len(scales)

    def prepare(self, progress: Callable[[int], object]) -> None:
        """Nothing to prepare."""

    def convert(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """The tensor, or the new scale in its place; before a k_proj or v_proj without a scale, its scale."""
        if name in self._beside:
            yield self._scale(self._beside[name])
        common = modelopt_kv_name(name)
        if self._checkpoint.role(name) == "kv_scale" and common in self._scales:
            yield self._scale(common)
        else:
            yield name, value, self._originals.get(name)

    def _scale(self, name: str) -> tuple[str, Tensor, None]:
        if self._checkpoint.quantization.layout == MODELOPT:
            return name, self._scales[name], None
        return compressed_tensors_kv_name(name), self._scales[name].reshape(1), None
