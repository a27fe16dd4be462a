"""The standard library of the running Python as a text corpus, split by file.

The bundled model is trained and evaluated on text that every reader already has. Three splits:

* ``train``: what the weights see;
* ``validation``: chooses epochs, dropout and schedule;
* ``heldout``: reported, never used for a choice.

The split is a pure function of the path. A file's *topic* is its module name without ``test_`` and
underscores, so that ``datetime.py``, ``_datetime.py`` and ``test/test_datetime.py`` fall on the same side; the
SHA-256 of the topic chooses the split. Files of ``train`` that share more than a tenth of their five-line
shingles with ``validation`` or ``heldout``, and files of ``validation`` that do so with ``heldout``, are dropped.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "validation", "heldout")
SHINGLE_LINES = 5
MAX_SHARED = 0.1

_VALIDATION_PERCENT = 3
_HELDOUT_PERCENT = 5
# Installed packages; files that differ from build to build and name the builder's paths.
_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")
_TEST_DIRECTORIES = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the library, with forward slashes, and its text."""

    path: str
    text: str


def topic(path: str) -> str:
    """The name that decides a file's split: both ``json/decoder.py`` and ``test/test_json/test_decoder.py`` give
    ``decoder``. ``__init__.py`` and ``__main__.py`` take the name of their package; ``encodings``, a family of
    generated tables, is one topic.
    """
    if path.startswith("encodings/"):
        return "encodings"
    names = [_plain(part) for part in path.removesuffix(".py").split("/") if part not in _TEST_DIRECTORIES]
    names = [name for name in names if name not in ("init", "main")]
    return names[-1] if names else "test"


def _plain(name: str) -> str:
    return name.strip("_").removeprefix("test").strip("_").lower()


def split_of(path: str) -> str:
    """The split of a file, from its topic alone: the same on every machine and for every Python version."""
    draw = int.from_bytes(hashlib.sha256(topic(path).encode()).digest()[:8], "big") % 100
    if draw < _HELDOUT_PERCENT:
        return "heldout"
    return "validation" if draw < _HELDOUT_PERCENT + _VALIDATION_PERCENT else "train"


def is_test(path: str) -> bool:
    """Whether the file belongs to a test suite, which some Python installations leave out."""
    return not _TEST_DIRECTORIES.isdisjoint(path.split("/")[:-1])


def library_files(root: Path | None = None) -> Iterator[Document]:
    """Every UTF-8 ``.py`` file of the standard library, sorted by path. Files that are not UTF-8 are left out."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if _SKIPPED_DIRECTORIES.intersection(parts) or any(p.startswith(_SKIPPED_PREFIXES) for p in parts):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document("/".join(parts), text.replace("\r\n", "\n"))


def _shingles(text: str) -> set[int]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = max(len(lines) - SHINGLE_LINES + 1, 1)
    return {hash(tuple(lines[i : i + SHINGLE_LINES])) for i in range(last)}


def _without_shared(documents: Iterable[Document], seen: set[int]) -> list[Document]:
    kept = []
    for document in documents:
        own = _shingles(document.text)
        if len(own & seen) <= MAX_SHARED * len(own):
            kept.append(document)
    return kept


def load(root: Path | None = None) -> dict[str, list[Document]]:
    """All three splits, near-duplicates across splits removed.

    Returns:
        ``{"train": [...], "validation": [...], "heldout": [...]}``, each sorted by path.
    """
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in library_files(root):
        splits[split_of(document.path)].append(document)
    seen = {shingle for document in splits["heldout"] for shingle in _shingles(document.text)}
    splits["validation"] = _without_shared(splits["validation"], seen)
    seen |= {shingle for document in splits["validation"] for shingle in _shingles(document.text)}
    splits["train"] = _without_shared(splits["train"], seen)
    return splits


def sha256(documents: Iterable[Document]) -> str:
    """SHA-256 over the paths and texts, in order: identifies the exact text in every record."""
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.path, document.text):
            data = field.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def describe(documents: list[Document]) -> dict[str, object]:
    """Provenance of one split: Python version, number of files, bytes, SHA-256."""
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "files": len(documents),
        "bytes": sum(len(d.text.encode()) for d in documents),
        "sha256": sha256(documents),
    }
