"""The header of a safetensors file, checked before anything else looks at the file.

``file = length (8 bytes, little endian) | JSON header | tensor bytes``; the header maps a tensor's name to its dtype,
shape and byte range behind the header, and the ranges cover the rest of the file without hole or overlap.

The safetensors library checks most of this as well, but its messages name neither the file nor the tensor.

Source: the format description in the README of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from adallm.checkpoint.errors import fail, parse_json_object, regular_file_size

# The library refuses longer headers too.
MAX_HEADER_BYTES = 100_000_000
_PIECE = 1 << 20

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: safetensors dtype name, shape, and bytes ``start`` to ``end`` behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The checked header of one file: its tensors in the order of the header, and its ``__metadata__``."""

    file: Path
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


def read_header(file: Path) -> Header:
    """Read and check the header; no tensor is read.

    Raises:
        CheckpointError: the file is unreadable or truncated, the header is too long or is no JSON object, or a tensor's
            dtype, shape and byte range do not fit each other, the other tensors or the file.
    """
    size = regular_file_size(file)
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8:
                fail(file, f"is {size} bytes, too short for a safetensors file")
            if length > min(MAX_HEADER_BYTES, size - 8):
                fail(file, f"announces a header of {length} bytes in a file of {size}: {_guess(start)}")
            text = stream.read(length)
    except OSError as error:
        fail(file, f"cannot be read: {error.strerror or error}")
    if not text.startswith(b"{"):
        fail(file, f"the header does not begin with '{{': {_guess(start)}")
    fields = parse_json_object(text, file, "the header")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        fail(file, "__metadata__ is not an object of strings")
    tensors = {name: _entry(file, name, value) for name, value in fields.items()}
    _check_ranges(file, tensors, size - 8 - length)
    return Header(file, tensors, metadata, data_start=8 + length)


@contextmanager
def open_tensors(header: Header) -> Iterator[Any]:
    """The file behind a checked header, opened with the safetensors library (``get_tensor``, ``get_slice``).

    Raises:
        CheckpointError: what the library refuses although the header was accepted.
    """
    try:
        with safe_open(header.file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        fail(header.file, f"the safetensors library refuses it: {error}")


def same_stored_bytes(header: Header, name: str, other: Header, other_name: str) -> bool:
    """Whether two tensors have the same dtype, shape and bytes, read a piece at a time."""
    a, b = header.tensors[name], other.tensors[other_name]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with header.file.open("rb") as stream, other.file.open("rb") as other_stream:
        stream.seek(header.data_start + a.start)
        other_stream.seek(other.data_start + b.start)
        for done in range(0, a.nbytes, _PIECE):
            size = min(_PIECE, a.nbytes - done)
            if stream.read(size) != other_stream.read(size):
                return False
    return True


def _guess(start: bytes) -> str:
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")):
        return "it looks like a pickle, which is never read"
    return "it is truncated or no safetensors file"


def _entry(file: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        fail(file, "its header entry is not dtype, shape and data_offsets", tensor=name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        fail(file, f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}", tensor=name)
    if not _is_sizes(shape):
        fail(file, f"shape {str(shape)[:80]} is not a list of sizes", tensor=name)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail(file, f"data_offsets {str(offsets)[:80]} are not a start and an end", tensor=name)
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        fail(
            file,
            f"{dtype} {shape} takes {nbytes} bytes, but its data_offsets hold {offsets[1] - offsets[0]}",
            tensor=name,
        )
    return Entry(dtype, tuple(shape), *offsets)


def _is_sizes(value: Any) -> bool:
    # bool is an int to isinstance, and JSON's true is no size.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_ranges(file: Path, tensors: dict[str, Entry], available: int) -> None:
    position, before = 0, None
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            relation = "overlaps" if entry.start < position else "leaves a hole behind"
            fail(
                file,
                f"begins at byte {entry.start} and {relation} {before or 'the header'}, which ends at {position}",
                tensor=name,
            )
        if entry.end > available:
            fail(file, f"ends at byte {entry.end}, but the file has {available} bytes: it is truncated", tensor=name)
        position, before = entry.end, name
    if position != available:
        fail(file, f"has {available - position} bytes that belong to no tensor")
