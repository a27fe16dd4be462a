"""A checkpoint directory: ``config.json`` and safetensors files that agree exactly with their index.

``model.safetensors``, or ``model.safetensors.index.json`` whose ``weight_map`` names the file of every tensor. A file
name in the index is a plain name inside the directory; what the name links to may lie elsewhere, as in a hub cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adallm.checkpoint.errors import fail, read_json_object
from adallm.checkpoint.header import Entry, Header, read_header

CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Directory:
    """An opened directory: headers by file name, all read and checked; tensors are still on disk."""

    path: Path
    config: dict[str, Any]
    hf_quant_config: dict[str, Any] | None
    headers: dict[str, Header]
    indexed: bool

    @cached_property
    def files(self) -> dict[str, str]:
        """The file name of every tensor, in the order of the files."""
        return {name: file for file, header in self.headers.items() for name in header.tensors}

    @property
    def config_file(self) -> Path:
        return self.path / CONFIG

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    def file(self, tensor: str) -> Path:
        """The file that holds a tensor, for messages."""
        return self.path / self.files[tensor]

    def entry(self, tensor: str) -> Entry:
        return self.headers[self.files[tensor]].tensors[tensor]


def open_directory(path: str | Path) -> Directory:
    """Read the configs, the index and every header.

    Raises:
        CheckpointError: anything missing, unreadable or malformed; a file name in the index that is no plain name; a
            tensor that the index and the files do not place alike; a file of the model that the index does not name.
    """
    path = Path(path)
    if not path.is_dir():
        fail(path, "is not a directory")
    config = read_json_object(path / CONFIG)
    if not isinstance(config.get("model_type"), str | None):
        fail(path / CONFIG, f"model_type {str(config['model_type'])[:80]!r} is not a name")
    quant_file = path / HF_QUANT_CONFIG
    quant = read_json_object(quant_file) if quant_file.exists() else None
    index = path / INDEX
    if not index.exists():
        if not (path / SINGLE).exists():
            fail(path, f"has neither {SINGLE} nor {INDEX}; only safetensors are read, never pickles (*.bin, *.pt)")
        _check_no_other_file(path, {SINGLE})
        return Directory(path, config, quant, {SINGLE: read_header(path / SINGLE)}, indexed=False)
    weight_map = _weight_map(index)
    _check_no_other_file(path, set(weight_map.values()))
    headers = {}
    for name in sorted(set(weight_map.values())):
        if not (path / name).exists():
            tensor = next(tensor for tensor, file in weight_map.items() if file == name)
            fail(path / name, f"is missing, but {INDEX} names it", tensor=tensor)
        headers[name] = read_header(path / name)
    _check_index(path, weight_map, headers)
    return Directory(path, config, quant, headers, indexed=True)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fail(index, "weight_map is not an object that names a file for every tensor")
    for tensor, name in weight_map.items():
        # Never joined to the path before this: a name that climbs out must not even be looked up.
        plain = isinstance(name, str) and name.endswith(".safetensors") and not name.startswith(".")
        if not plain or any(character in name for character in "/\\:\0"):
            fail(
                index, f"names the file {str(name)[:200]!r}, not a plain *.safetensors name inside the directory",
                tensor=tensor,
            )  # fmt: skip
    return weight_map


def _check_no_other_file(path: Path, expected: set[str]) -> None:
    # Other names, like Mistral's consolidated.safetensors, are a second copy that no reader of this layout opens.
    for file in sorted(path.glob("model*.safetensors")):
        if file.name not in expected:
            fail(file, f"lies beside {', '.join(sorted(expected)[:3])}, but no index names it")


def _check_index(path: Path, weight_map: dict[str, str], headers: dict[str, Header]) -> None:
    for name, header in headers.items():
        for tensor in header.tensors:
            if tensor not in weight_map:
                fail(path / name, f"is not in {INDEX}", tensor=tensor)
            if weight_map[tensor] != name:
                fail(path / name, f"{INDEX} places it in {weight_map[tensor]}", tensor=tensor)
    for tensor, name in weight_map.items():
        if tensor not in headers[name].tensors:
            fail(path / name, f"is missing, but {INDEX} places it here", tensor=tensor)
