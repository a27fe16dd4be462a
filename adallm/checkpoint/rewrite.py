"""Write a directory anew, file by file, with every tensor replaced as a plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from adallm.checkpoint.directory import Directory
from adallm.checkpoint.exact import pack_originals
from adallm.checkpoint.header import open_tensors
from adallm.checkpoint.writer import DirectoryWriter


class Plan(Protocol):
    """What becomes of each tensor.

    Attributes:
        nbytes: an upper bound for the tensor bytes written.
        work: bytes read, for the progress bar.
    """

    nbytes: int
    work: int

    def prepare(self, progress: Callable[[int], object]) -> None:
        """Read beforehand what ``convert`` needs."""

    def convert(self, name: str, value: Tensor) -> Iterable[tuple[str, Tensor, Tensor | None]]:
        """The tensors that take the place of one, each with the number to keep beside it (exact.py)."""


def rewrite(
    directory: Directory,
    plan: Plan,
    dst: Path,
    config: dict[str, Any],
    hf_quant_config: dict[str, Any] | None,
    *,
    progress: bool,
    key: str | None = None,
) -> int:
    """Write ``dst``, which appears only when it is whole; files keep their names.

    Args:
        key: as in ``DirectoryWriter``: what an interrupted run with the same key has written is not written again.

    Returns:
        Tensor bytes written.

    Raises:
        CheckpointError: what the plan finds wrong with a tensor.
        FileExistsError: ``dst`` exists.
        OSError: not enough disk space.
    """
    with (
        DirectoryWriter(dst, nbytes=plan.nbytes, key=key) as writer,
        tqdm(total=plan.work, unit="B", unit_scale=True, desc=dst.name, disable=not progress) as bar,
    ):
        plan.prepare(bar.update)
        for name, header in directory.headers.items():
            if key is not None and writer.finished(name):
                bar.update(header.nbytes)
                continue
            # Bound anew for each file before anything is read: the tensors of one file at a time are in memory.
            tensors: dict[str, Tensor] = {}
            originals: dict[str, Tensor] = {}
            with open_tensors(header) as file:
                for stored, entry in header.tensors.items():
                    for new, value, original in plan.convert(stored, file.get_tensor(stored)):
                        tensors[new] = value
                        if original is not None:
                            originals[new] = original
                    bar.update(entry.nbytes)
            writer.add_shard(name, tensors, pack_originals(originals))
        if directory.indexed:
            writer.add_index()
        writer.copy_companions(directory.path)
        writer.add_configs(config, hf_quant_config)
    return writer.nbytes
