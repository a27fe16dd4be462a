"""How far the layers of a quantized directory are from those of the model that it was made from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adallm.checkpoint.errors import fail
from adallm.checkpoint.header import open_tensors
from adallm.checkpoint.layers import FLOATS
from adallm.checkpoint.opened import Checkpoint, open_checkpoint
from adallm.checkpoint.reader import dequantized
from adallm.rows import row_pieces


@dataclass(frozen=True)
class LayerError:
    """A quantized layer against its reference ``w``, in FP32 and summed in FP64.

    Attributes:
        name: ``<module>.weight``.
        format: ``"nvfp4"`` or ``"fp8"``.
        shape: ``[N, K]``.
        signal, noise: ``sum w^2`` and ``sum (w - w')^2``.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    signal: float
    noise: float

    @property
    def relative(self) -> float:
        """``sqrt(noise / signal)``; infinite where there is noise alone."""
        if not self.noise:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf

    @property
    def sqnr_db(self) -> float:
        """``10 log10(signal / noise)``, in decibels; without noise infinite, without signal the negative."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def errors(path: str | Path, reference: str | Path) -> list[LayerError]:
    """Each quantized layer of ``path`` against the same weight of ``reference``, the worst first.

    One file's layers are in memory at a time.

    Raises:
        CheckpointError: as ``load``, for either; a weight that ``reference`` does not have, or has in another shape;
            one that is NaN or infinite.
        ValueError: ``path`` is not quantized, or ``reference`` is.
    """
    checkpoint, other = open_checkpoint(path), open_checkpoint(reference)
    if checkpoint.quantization is None:
        raise ValueError(f"{path} is not quantized; its error is that of no layer")
    if other.quantization is not None:
        raise ValueError(f"{reference} is quantized; the reference must be a BF16, FP16 or FP32 model")
    quantized = [layer for layer in checkpoint.layers.values() if layer.format != "dense"]
    for layer in quantized:
        _check(other, layer.weight_name, layer.shape)
    return sorted(_errors(checkpoint, other), key=lambda error: (-error.relative, error.name))


def total(found: list[LayerError]) -> LayerError:
    """All of them as one."""
    signal, noise = (math.fsum(getattr(error, part) for error in found) for part in ("signal", "noise"))
    return LayerError("total", "", (sum(math.prod(error.shape) for error in found),), signal, noise)


def _errors(checkpoint: Checkpoint, other: Checkpoint) -> Iterator[LayerError]:
    for layer, weight in dequantized(checkpoint):
        name = layer.weight_name
        with open_tensors(other.directory.headers[other.directory.files[name]]) as file:
            expected = file.get_tensor(name)
        signal, noise = _sums(expected, weight)
        if not math.isfinite(signal + noise):
            fail(other.directory.file(name), "or its quantized counterpart is not finite", tensor=name)
        yield LayerError(name, layer.format, layer.shape, signal, noise)


def _sums(expected: Tensor, weight: Tensor) -> tuple[float, float]:
    signal = noise = 0.0
    for rows, piece in row_pieces(expected):
        w = piece.double()
        signal += float(w.square().sum())
        noise += float((w - weight[rows].double()).square().sum())
    return signal, noise


def _check(other: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    directory = other.directory
    if name not in directory.files:
        fail(directory.path, "is missing, but the quantized model has it", tensor=name)
    entry = directory.entry(name)
    if tuple(entry.shape) != tuple(shape) or entry.dtype not in FLOATS:
        what = f"is {entry.dtype} {list(entry.shape)}; it must be floating {list(shape)}, as the quantized model has it"
        fail(directory.file(name), what, tensor=name)
