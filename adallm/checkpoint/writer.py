"""Write a checkpoint directory that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from adallm.checkpoint.directory import CONFIG, HF_QUANT_CONFIG, INDEX
from adallm.checkpoint.errors import CheckpointError
from adallm.checkpoint.header import read_header
from adallm.checkpoint.partial import lock, partial_path

# What belongs to a model beside its weights. A list of what is copied, so that no pickle or program comes along.
_COPIED_SUFFIXES = {".json", ".jinja", ".jsonl", ".md", ".model", ".tiktoken", ".txt", ".vocab"}
_COPIED_NAMES = ("LICENSE", "NOTICE", "README", "USE_POLICY")
_NOT_COPIED = {CONFIG, HF_QUANT_CONFIG}
_MARGIN_BYTES = 1 << 20


class DirectoryWriter:
    """Context manager: files go to a hidden sibling of ``destination``, renamed to it at the end.

    On an exception the hidden directory is deleted; one that a killed process left behind has no ``config.json``, which
    is written last. With a ``key``, which stands for all that the files depend on, an interrupt leaves it too, and a
    writer with the same key goes on from its ``finished`` files.

    Raises:
        FileExistsError: the destination exists, whatever it is.
        OSError: not enough free space for ``nbytes``; another process is writing with the same key.
    """

    def __init__(self, destination: str | Path, *, nbytes: int, key: str | None = None) -> None:
        self.destination = Path(destination)
        self._nbytes, self._key = nbytes, key
        self._lock: int | None = None
        self._config: dict[str, Any] = {}
        self._weight_map: dict[str, str] = {}
        self.nbytes = 0  # of the tensors that are written

    def __enter__(self) -> DirectoryWriter:
        check_absent(self.destination)
        parent = self.destination.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        if self._key is None:
            self._check_space(parent, 0)
            prefix = f".{self.destination.name}."
            self.path = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent))
            return self
        self.path = partial_path(self.destination, self._key)
        there = sum(file.stat().st_size for file in self.path.glob("*")) if self.path.is_dir() else 0
        self._check_space(parent, there)
        self._lock = lock(self.path, self.destination)
        return self

    def _check_space(self, parent: Path, there: int) -> None:
        free, needed = shutil.disk_usage(parent).free, self._nbytes + _MARGIN_BYTES - there
        if free < needed:
            raise OSError(f"{parent} has {free} bytes free, but {self.destination.name} needs {needed}")

    def finished(self, name: str) -> bool:
        """Whether an earlier writer with this key wrote the safetensors file; then it belongs to this one."""
        file = self.path / name
        if not file.is_file():
            return False
        try:
            header = read_header(file)
        except CheckpointError:
            return False
        self._count(name, {tensor: entry.nbytes for tensor, entry in header.tensors.items()})
        return True

    def add_shard(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write one safetensors file; ``metadata`` is added to ``{"format": "pt"}``."""
        partial = self.path / f"{name}.partial"
        save_file(dict(tensors), partial, metadata={"format": "pt", **metadata})
        partial.rename(self.path / name)
        self._count(name, {tensor: value.nbytes for tensor, value in tensors.items()})

    def _count(self, name: str, nbytes: Mapping[str, int]) -> None:
        self._weight_map.update(dict.fromkeys(nbytes, name))
        self.nbytes += sum(nbytes.values())

    def add_index(self) -> None:
        """Write the index of all shards so far."""
        weight_map = dict(sorted(self._weight_map.items()))
        self._write_json(INDEX, {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map})

    def add_configs(self, config: dict[str, Any], hf_quant_config: dict[str, Any] | None) -> None:
        """``hf_quant_config.json`` now, ``config.json`` when all else is there."""
        self._config = config
        if hf_quant_config is not None:
            self._write_json(HF_QUANT_CONFIG, hf_quant_config)

    def copy_companions(self, source: Path) -> None:
        """Copy tokenizer, generation config, chat templates, model card and licence."""
        for file in sorted(source.iterdir()):
            if file.is_dir() and file.name == "additional_chat_templates":
                (self.path / file.name).mkdir()
                for template in sorted(file.glob("*.jinja")):
                    shutil.copyfile(template, self.path / file.name / template.name)
            elif file.is_file() and is_companion(file.name):
                shutil.copyfile(file, self.path / file.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            # After the rename there is nothing of this name to delete.
            if self._key is None or kind is None or not issubclass(kind, KeyboardInterrupt):
                shutil.rmtree(self.path, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)

    def _finish(self) -> None:
        self._write_json(CONFIG, self._config)
        # mkdtemp makes a directory that others may not read; give it what mkdir would have given.
        mask = os.umask(0)
        os.umask(mask)
        self.path.chmod(0o777 & ~mask)
        for file in self.path.iterdir():
            if file.is_file():
                # The safetensors library makes files that only their owner may read.
                file.chmod(0o666 & ~mask)
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        check_absent(self.destination)
        self.path.rename(self.destination)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_absent(destination: Path) -> None:
    """Raise FileExistsError if there is anything at the destination, a dangling link included."""
    if os.path.lexists(destination):
        raise FileExistsError(f"{destination} already exists")


def is_companion(name: str) -> bool:
    """Whether a file of this name is copied beside converted weights: no weights, no index, no pickle, no program."""
    if name in _NOT_COPIED or name.endswith(".index.json") or name.startswith("."):
        return False
    return Path(name).suffix.lower() in _COPIED_SUFFIXES or name.upper().startswith(_COPIED_NAMES)
