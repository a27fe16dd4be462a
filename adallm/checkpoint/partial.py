"""Hidden directories beside a destination, in which an interrupted process finds what it has done already."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def partial_path(destination: Path, key: str) -> Path:
    """``.<name>.<key>.partial`` beside ``destination``; the key stands for all that its content depends on."""
    return destination.absolute().parent / f".{destination.name}.{key}.partial"


def lock(path: Path, destination: Path) -> int:
    """Make the directory, if it is not there, and lock it until the descriptor that this returns is closed.

    Raises:
        OSError: another process has locked it; it names ``destination``.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(f"{destination} is being written by another process") from None
    return descriptor


@contextlib.contextmanager
def partial_directory(destination: Path, key: str) -> Iterator[Path]:
    """A directory that an interrupt, or a kill, leaves for a later call with the same key, and nothing else.

    Raises:
        OSError: another process is in there.
    """
    path = partial_path(destination, key)
    descriptor = lock(path, destination)
    interrupted = False
    try:
        yield path
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if not interrupted:
            shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)
