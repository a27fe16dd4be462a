"""The one error that a bad checkpoint gives, and files read without following it off a cliff."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

# A config of a mixture of experts that names every expert is a few MB.
_MAX_JSON_BYTES = 64 << 20


class CheckpointError(ValueError):
    """A checkpoint that is damaged, contradicts itself or is of an unsupported kind; names the file and the tensor."""


def fail(file: Path | str, message: str, *, tensor: str | None = None) -> NoReturn:
    """Raise ``CheckpointError("<file>: [tensor <name>: ]<message>")``."""
    if tensor is not None and not tensor.isprintable():
        tensor = repr(tensor)
    where = f"{file}: " if tensor is None else f"{file}: tensor {tensor}: "
    raise CheckpointError(where + message)


def regular_file_size(file: Path) -> int:
    """Size in bytes of a regular file or of the one that a link leads to (a hub cache is made of links).

    Raises:
        CheckpointError: missing, unreadable, or a directory, pipe or device, which could block a read forever.
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        fail(file, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if not stat.S_ISREG(status.st_mode):
        fail(file, "is not a regular file")
    return status.st_size


def parse_json_object(text: bytes, file: Path, what: str) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises:
        CheckpointError: not UTF-8, not JSON, NaN or Infinity, a repeated key, nested too deeply, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"{repeated!r} appears twice")
        return result

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        fail(file, f"{what} is nested too deeply")
    except ValueError as error:
        fail(file, f"{what} is not valid JSON: {str(error)[:200]}")
    if not isinstance(value, dict):
        fail(file, f"{what} is a JSON {type(value).__name__}, not an object")
    return value


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MB.

    Raises:
        CheckpointError: as ``regular_file_size`` and ``parse_json_object``, or larger than that.
    """
    size = regular_file_size(file)
    if size > _MAX_JSON_BYTES:
        fail(file, f"is {size} bytes; a JSON file of a checkpoint is at most {_MAX_JSON_BYTES}")
    try:
        text = file.read_bytes()
    except OSError as error:
        fail(file, f"cannot be read: {error.strerror or error}")
    return parse_json_object(text, file, "the file")
