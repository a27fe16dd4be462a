"""The table of ``adallm inspect``: what each layer of a directory is stored as."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from adallm.checkpoint.names import natural_key
from adallm.checkpoint.opened import open_checkpoint


@dataclass(frozen=True)
class Row:
    """One line of ``inspect``: a weight with its scales, or another tensor.

    Attributes:
        name: ``<module>.weight``, or the tensor's own name.
        format: ``nvfp4``, ``fp8``, or the dtype of a dense tensor in lower case.
        shape: of what it stands for, so that a packed weight has its K columns.
        bits_per_weight: ``8 * nbytes / elements``, scales included.
        nbytes: stored bytes, scales included.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    bits_per_weight: float
    nbytes: int


def inspect(path: str | Path) -> list[Row]:
    """One row for each weight and other tensor, layer 10 behind layer 2; only headers are read.

    Raises:
        CheckpointError: as ``load``, but for values.
    """
    checkpoint = open_checkpoint(path)
    directory, rows = checkpoint.directory, []
    for layer in checkpoint.layers.values():
        entries = [directory.entry(name) for name in layer.parts.values()]
        kind = entries[0].dtype.lower() if layer.format == "dense" else layer.format
        rows.append(_row(layer.weight_name, kind, layer.shape, sum(entry.nbytes for entry in entries)))
    for name in directory.files:
        if name not in checkpoint.layer_of:
            entry = directory.entry(name)
            rows.append(_row(name, entry.dtype.lower(), entry.shape, entry.nbytes))
    return sorted(rows, key=lambda row: natural_key(row.name))


def _row(name: str, kind: str, shape: tuple[int, ...], nbytes: int) -> Row:
    elements = math.prod(shape)
    return Row(name, kind, shape, 8 * nbytes / elements if elements else 0.0, nbytes)
