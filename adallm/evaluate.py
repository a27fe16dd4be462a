"""Perplexity of a model under several formats, measured by lm-eval on the same text and windows.

Standard errors come from the windows of the rolling log-likelihood (``MAX_LENGTH`` tokens each). For a ratio
``r = sum(nats) / sum(tokens)`` the error of the sum is ``sqrt(n/(n-1) * sum((nats_i - r * tokens_i)^2))``; for the
difference to the first format, ``nats_i`` is the difference in the same window, so that what the two have in common
cancels.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from adallm import calibrated, checkpoint, lm, results, text
from adallm.hf_model import FORMATS
from adallm.tasks import stdlib_ppl
from adallm.tiny import corpus

BUNDLED_MODEL = Path(__file__).resolve().parent / "tiny" / "model"
BUNDLED_NAME = "adallm-tiny"
TASKS = Path(__file__).resolve().parent / "tasks"
DEFAULT_TASK = "stdlib_ppl"
DEFAULT_FORMATS = ("bf16", "fp8", "nvfp4", "nvfp4-w4a8", "nvfp4-fp8kv", "mxfp4", "int4-g128")
BACKENDS = ("hf", "vllm")
# The code that a measurement depends on: a change in any of it makes the cache miss.
_MEASURED_WITH = (
    "formats",
    "rows",
    "nvfp4",
    "quantizers",
    "gptq",
    "calibrated",
    "walk",
    "windows",
    "fp8",
    "baselines",
    "linear",
    "checkpoint",
    "hf_model",
    "lm",
    "evaluate",
    "tasks",
)
_WEIGHT_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"]


def cache_directory() -> Path:
    """``$ADALLM_CACHE``, or ``adallm`` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ADALLM_CACHE") or Path(home) / "adallm")


def resolve(model: str | Path | None) -> tuple[str, Path]:
    """Name and directory of a model: the bundled one for None, a directory, or a name on the Hugging Face hub.

    Raises:
        ValueError: neither a directory, nor cached, nor to be downloaded.
    """
    if model is None:
        return BUNDLED_NAME, BUNDLED_MODEL
    directory = Path(model)
    if directory.is_dir():
        return directory.resolve().name, directory
    from huggingface_hub import snapshot_download

    try:
        return str(model), Path(snapshot_download(str(model), allow_patterns=_WEIGHT_FILES))
    except Exception as error:
        raise ValueError(
            f"model {str(model)!r} is neither a directory here nor in the local Hugging Face cache, and downloading it "
            f"failed ({type(error).__name__}: {error}); with no network, give a directory with config.json, the "
            "tokenizer and *.safetensors"
        ) from None


def perplexity(
    model_dir: str | Path,
    *,
    task: str = DEFAULT_TASK,
    limit: int | None = None,
    format: str | None = None,
    scale_rule: str = "max",
    backend: str = "hf",
    progress: bool = False,
) -> dict[str, Any]:
    """Run one lm-eval task on one model under one format.

    Args:
        model_dir: a BF16 model or an NVFP4 one of either layout.
        task: any lm-eval task; ``stdlib_ppl`` needs no download.
        limit: documents to use, all by default.
        format: a key of ``hf_model.FORMATS``; by default what the directory holds, ``"bf16"`` or ``"nvfp4"``.
        scale_rule: for a BF16 model quantized here.
        backend: ``"hf"`` (the reference) or ``"vllm"``.
        progress: show a progress bar on stderr.

    Returns:
        ``task``, ``format``, ``metrics`` (lm-eval's own), ``seconds``; for a perplexity task also ``tokens``,
        ``bytes``, ``bits_per_byte``, ``stderr``, ``byte_perplexity``, ``word_perplexity``, ``perplexity`` (of a
        token) and ``windows``, a list of ``[tokens, nats]``.

    Raises:
        ValueError: a format, backend or task that is not supported, a task whose data cannot be had, a damaged model.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    if format is None:
        format = "bf16" if checkpoint.quantization_of(directory) is None else "nvfp4"
    _check(format, backend, limit)
    _quiet()
    manager = _task_manager(task)
    start = time.monotonic()
    if backend == "hf":
        model = lm.hf(directory, FORMATS[format], scale_rule=scale_rule, progress=progress)
        measured = _run(model, task, manager, limit)
    else:
        with tempfile.TemporaryDirectory(prefix="adallm-eval-") as scratch:
            model = lm.vllm(directory, FORMATS[format], scale_rule=scale_rule, scratch=Path(scratch), progress=progress)
            measured = _run(model, task, manager, limit)
    return {"task": task, "format": format, **measured, "seconds": round(time.monotonic() - start, 1)}


def compare(
    model: str | Path | None = None,
    *,
    tasks: Sequence[str] = (DEFAULT_TASK,),
    formats: Sequence[str] | None = None,
    limit: int | None = None,
    scale_rule: str = "max",
    backend: str = "hf",
    progress: bool = True,
    root: Path | None = None,
) -> Path:
    """Run tasks under formats, the first format being what the others are compared with; write the record.

    What was measured before with the same files, text, code and versions is taken from the cache.

    Returns:
        Path of the record, ``results/eval/<slug>.json``, with the table beside it as Markdown; other models than the
        bundled one, and runs of a part, have the model's name behind the slug.
    """
    name, directory = resolve(model)
    if formats is None:
        dense = checkpoint.quantization_of(directory) is None
        formats = [f for f in DEFAULT_FORMATS if dense or FORMATS[f].weights == "nvfp4"]
        if backend == "vllm":
            formats = [f for f in formats if f in lm.vllm_formats()]
    for form in formats:
        _check(form, backend, limit)
    provenance = results.provenance(seed=0)
    rows = []
    for task in tasks:
        baseline = None
        for form in formats:
            options = {"task": task, "limit": limit, "format": form, "scale_rule": scale_rule, "backend": backend}
            measured = cached(directory, options, progress)
            baseline = baseline or measured
            rows += _rows(name, scale_rule, backend, measured, baseline)
    whole = name == BUNDLED_NAME and limit is None and backend == "hf" and tuple(tasks) == (DEFAULT_TASK,)
    slug = results.slug(provenance["gpu"])
    record_name = slug if whole and tuple(formats) == DEFAULT_FORMATS else f"{slug}-{results.slug(name)}"
    source = corpus.describe(documents()) if DEFAULT_TASK in tasks else None
    path = results.write("eval", rows, provenance=provenance, name=record_name, root=root, corpus=source, limit=limit)
    path.with_suffix(".md").write_text(table(rows, markdown=True) + "\n")
    return path


def _check(form: str, backend: str, limit: int | None) -> None:
    if form not in FORMATS:
        raise ValueError(f"format {form!r}; supported: {', '.join(FORMATS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}; supported: {', '.join(BACKENDS)}")
    if backend == "vllm" and form not in lm.vllm_formats():
        raise ValueError(f"format {form!r} with vLLM on this machine; supported: {', '.join(lm.vllm_formats())}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}; it must be a positive number of documents")


def _quiet() -> None:
    for noisy in ("lm_eval", "transformers", "datasets", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lm_eval|transformers|datasets|torch)\b")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _task_manager(task: str) -> TaskManager:
    # Reading the thousands of task files that lm-eval brings takes half a minute; ours needs none of them.
    ours = (TASKS / f"{task}.yaml").is_file()
    manager = TaskManager(include_path=str(TASKS), include_defaults=not ours)
    if task not in manager.all_tasks:
        raise ValueError(f"task {task!r} is not known to lm-eval {importlib.metadata.version('lm_eval')}")
    try:
        manager.load([task])
    except Exception as error:
        raise ValueError(
            f"task {task!r}: its data set is not in the local cache and could not be loaded "
            f"({type(error).__name__}: {error}); with no network, TASKS={DEFAULT_TASK} needs no download"
        ) from None
    return manager


def _run(model: Any, task: str, manager: TaskManager, limit: int | None) -> dict[str, Any]:
    with torch.no_grad():
        done = simple_evaluate(
            model=model, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    metrics = {
        key.removesuffix(",none"): value
        for key, value in done["results"][task].items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    measured: dict[str, Any] = {"metrics": metrics}
    if "bits_per_byte" in metrics:
        nats, tokens = sum(w[1] for w in model.windows), sum(w[0] for w in model.windows)
        n_bytes = round(nats / math.log(2) / metrics["bits_per_byte"])
        measured |= {
            "tokens": tokens,
            "bytes": n_bytes,
            "bits_per_byte": metrics["bits_per_byte"],
            "stderr": ratio_stderr([w[1] for w in model.windows], [w[0] for w in model.windows], n_bytes),
            "byte_perplexity": metrics["byte_perplexity"],
            "word_perplexity": metrics["word_perplexity"],
            "perplexity": math.exp(nats / tokens),
            "windows": [list(w) for w in model.windows],
        }
    return measured


def ratio_stderr(nats: Sequence[float], tokens: Sequence[int], n_bytes: int) -> float:
    """``sqrt(n/(n-1) * sum((nats_i - r tokens_i)^2)) / (ln 2 * bytes)`` with ``r = sum(nats) / sum(tokens)``.

    Returns:
        Standard error in bits per byte over the windows; 0 for a single window.
    """
    n, ratio = len(nats), sum(nats) / sum(tokens)
    if n < 2:
        return 0.0
    squares = sum((x - ratio * t) ** 2 for x, t in zip(nats, tokens, strict=True))
    return math.sqrt(n / (n - 1) * squares) / math.log(2) / n_bytes


def difference(measured: dict[str, Any], baseline: dict[str, Any]) -> tuple[float, float]:
    """Bits per byte above those of a baseline on the same windows, and the standard error of that."""
    nats = [a[1] - b[1] for a, b in zip(measured["windows"], baseline["windows"], strict=True)]
    tokens = [w[0] for w in measured["windows"]]
    error = ratio_stderr(nats, tokens, measured["bytes"])
    return measured["bits_per_byte"] - baseline["bits_per_byte"], error


def _rows(name: str, rule: str, backend: str, measured: dict, baseline: dict) -> list[dict[str, Any]]:
    form = FORMATS[measured["format"]]
    row = {
        "model": name,
        "task": measured["task"],
        "format": form.name,
        "title": form.title,
        "rule": rule if form.weights == "nvfp4" else None,
        "backend": backend,
        "run": form.run if backend == "hf" else "stored",
        "bits_per_weight": form.bits_per_weight,
        "seconds": measured["seconds"],
    }
    if "bits_per_byte" not in measured:
        return [
            row | {"metric": key, "value": value, "stderr": measured["metrics"].get(f"{key}_stderr")}
            for key, value in measured["metrics"].items()
            if not key.endswith("_stderr")
        ]
    delta, delta_stderr = difference(measured, baseline)
    fields = ("tokens", "bytes", "bits_per_byte", "stderr", "byte_perplexity", "word_perplexity", "perplexity")
    return [
        row
        | {field: measured[field] for field in fields}
        | {
            "windows": len(measured["windows"]),
            "delta": delta,
            "delta_stderr": delta_stderr,
        }
    ]


def table(rows: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """The perplexity rows of a record as a table; rows of other metrics follow in one of their own."""
    perplexity_rows = [row for row in rows if "bits_per_byte" in row]
    parts = []
    if perplexity_rows:
        base = perplexity_rows[0]["title"]
        header = (
            "format",
            "run",
            "bits a weight",
            "bits per byte",
            f"above {base}",
            "byte ppl",
            "word ppl",
            "token ppl",
        )
        lines = [
            (
                row["title"],
                row["run"],
                f"{row['bits_per_weight']:.4g}",
                f"{row['bits_per_byte']:.4f} ± {row['stderr']:.4f}",
                f"{row['delta']:+.4f} ± {row['delta_stderr']:.4f}" if row["title"] != base else "",
                f"{row['byte_perplexity']:.4f}",
                f"{row['word_perplexity']:.2f}",
                f"{row['perplexity']:.3f}",
            )
            for row in perplexity_rows
        ]
        parts.append(text.table(header, lines, align="llrrrrrr", markdown=markdown))
    others = [row for row in rows if "metric" in row]
    if others:
        lines = [
            (row["task"], row["title"], row["metric"], f"{row['value']:.4f}", f"{row['stderr'] or 0:.4f}")
            for row in others
        ]
        parts.append(text.table(("task", "format", "metric", "value", "±"), lines, align="lllrr", markdown=markdown))
    return "\n\n".join(parts)


@cache
def documents() -> list[corpus.Document]:
    """The held-out text."""
    return stdlib_ppl.documents()


def cached(directory: Path, options: dict[str, Any], progress: bool) -> dict[str, Any]:
    """``perplexity`` with these options, from the cache where nothing that it depends on has changed."""
    path = cache_directory() / "eval" / f"{_key(directory, options)}.json"
    if path.is_file():
        if progress:
            print(
                f"{FORMATS[options['format']].title}, {options['scale_rule']}: unchanged, taken from {path.parent}",
                flush=True,
            )
        return json.loads(path.read_text())
    measured = perplexity(directory, progress=progress, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(measured))
    partial.replace(path)
    return measured


def _key(directory: Path, options: dict[str, Any]) -> str:
    """SHA-256 of all that a measurement depends on: model files, options, text, our code, versions, device."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    files = [p for p in sorted(directory.iterdir()) if p.suffix in (".safetensors", ".json", ".jinja", ".model")]
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    package = Path(__file__).resolve().parent
    for part in _MEASURED_WITH:
        for source in sorted((package / part).rglob("*.py")) or [package / f"{part}.py"]:
            digest.update(source.read_bytes())
    for task in sorted(TASKS.glob("*.yaml")):
        digest.update(task.read_bytes())
    if options["task"] == DEFAULT_TASK:
        digest.update(corpus.sha256(documents()).encode())
    for package in ("torch", "transformers", "lm_eval", "tokenizers"):
        digest.update(importlib.metadata.version(package).encode())
    if options["scale_rule"] in calibrated.RULES:
        # The text that they read is of the running Python.
        digest.update(sys.version.encode())
    digest.update((torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu").encode())
    return digest.hexdigest()
