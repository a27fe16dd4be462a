"""Turn a directory into an NVFP4 one: quantize a dense directory, or store an NVFP4 one in the other layout."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adallm import nvfp4
from adallm.checkpoint.directory import Directory
from adallm.checkpoint.emit import quantization_configs
from adallm.checkpoint.names import Patterns, split
from adallm.checkpoint.opened import Checkpoint, open_checkpoint
from adallm.checkpoint.quantization import MODELOPT
from adallm.checkpoint.quantize import QuantizePlan
from adallm.checkpoint.relayout import RelayoutPlan
from adallm.checkpoint.rewrite import rewrite
from adallm.checkpoint.writer import check_absent
from adallm.nvfp4 import LAYOUTS, NVFP4Tensor

DEFAULT_IGNORE = ("lm_head",)
# What a file depends on, beside this folder.
_CODE = ("formats", "nvfp4", "quantizers", "rows")


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did: where the result is, how many weights are NVFP4, and tensor bytes before and after."""

    path: Path
    layout: str
    quantized: int
    source_bytes: int
    nbytes: int


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    layout: str = MODELOPT,
    scale_rule: str = "max",
    ignore: Iterable[str] = DEFAULT_IGNORE,
    kv_cache: str | None = None,
    share_scales: bool = True,
    importance: Mapping[str, Tensor] | None = None,
    quantized: Mapping[str, NVFP4Tensor] | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> Conversion:
    """``dst`` = ``src`` in NVFP4: a BF16, FP16 or FP32 directory is quantized, an NVFP4 one changes its layout.

    Quantized are the 2-D weights of linear layers: no embeddings, norms, biases, convolutions or routers. They are
    quantized one file at a time with the arithmetic of the layout's producer; FP16 weights in FP32, because
    compressed-tensors' ``2688 / amax`` overflows in FP16. Files keep their names. A change of layout is lossless: there
    and back gives every tensor byte for byte. After an interrupt, or when it was killed, the same call goes on behind
    the last file that was finished; errors leave nothing.

    Args:
        src: a directory that ``load`` reads.
        dst: must not exist; appears only when it is whole.
        layout: ``"modelopt"`` or ``"compressed-tensors"``.
        scale_rule: how ``nvfp4.quantize`` chooses scales, of ``quantizers.RULES``, or ``"gptq"``.
        ignore: patterns of modules that stay dense: names, shell patterns, or ``re:`` and a regular expression; see
            ``names.Patterns``. A name stands for the modules inside it too.
        kv_cache: ``"fp8"`` declares an FP8 KV cache with scales of 1.0; None leaves it as the source has it.
        share_scales: one global scale for q, k, v and one for gate and up, as if they were one matrix, as ModelOpt and
            llm-compressor write: vLLM runs them as one matrix with one global scale.
        importance: for ``"imatrix"``, of the columns of each layer, ``[K]`` by the name of the module.
        quantized: for ``"gptq"``, each layer's weight by the name of the module. ``calibrated.convert`` computes both.
        device: ``"cpu"`` or a GPU, ``"cuda"``, which searches scales faster; as with the producers, a few bytes may
            differ between the two (``nvfp4.py``).
        progress: show a bar on stderr.

    Raises:
        CheckpointError: the source is damaged or contradicts itself; a weight cannot be quantized (its columns are no
            multiple of 16, it is all zeros or not finite), naming the file and the tensor.
        ValueError: an option that is not supported, or that means nothing for a source that is NVFP4 already.
        FileExistsError: ``dst`` exists.
        OSError: not enough disk space.
    """
    check_device(device)
    checkpoint, patterns = _opened(src, dst, layout, ignore, kv_cache)
    plan: QuantizePlan | RelayoutPlan
    if checkpoint.quantization is None:
        plan = QuantizePlan(
            checkpoint, layout, scale_rule, patterns, kv_cache, share_scales, importance or {}, quantized or {}, device
        )
        _warn(checkpoint.directory, patterns)
    else:
        if scale_rule != "max" or importance or quantized or patterns.patterns != DEFAULT_IGNORE:
            raise ValueError(
                f"{src} is quantized already: scale_rule, importance and ignore mean nothing for a change of layout"
            )
        plan = RelayoutPlan(checkpoint, layout, kv_cache)
    weights = sum(scheme.format == "nvfp4" for scheme in plan.schemes.values())
    if not weights:
        raise ValueError(f"{src} has no linear layer that would be NVFP4")
    configs = _configs(checkpoint.directory, plan, layout)
    given = {
        "importance": importance or {},
        "quantized": {k: (t.packed, t.scale, t.global_scale.reshape(1)) for k, t in (quantized or {}).items()},
    }
    key = key_of(checkpoint.directory.path, [scale_rule, share_scales, device, *configs], given)
    nbytes = rewrite(checkpoint.directory, plan, Path(dst), *configs, progress=progress, key=key)
    source_bytes = sum(header.nbytes for header in checkpoint.directory.headers.values())
    return Conversion(Path(dst), layout, weights, source_bytes, nbytes)


def check_device(device: str) -> None:
    """Raise ValueError for another than ``cpu`` and ``cuda``, or a GPU that is not there."""
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}; supported: cpu, cuda")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}, but torch finds no CUDA GPU; supported here: cpu")


def key_of(source: Path, options: Any, given: Mapping[str, Mapping[str, Any]], code: Sequence[str] = ()) -> str:
    """Stands for all that files depend on: those of the source, options, tensors, and this package's code.

    Args:
        options: what JSON takes.
        given: tensors, or tuples of them, by name.
        code: modules of the package, beside those of a conversion.
    """
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for file in sorted((*source.rglob("*.safetensors"), *source.glob("*.json"))):
        stat = file.stat()
        digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for part, tensors in given.items():
        for name, found in sorted(tensors.items()):
            digest.update(f"{part} {name}\n".encode())
            for tensor in found if isinstance(found, tuple) else (found,):
                digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    package = Path(nvfp4.__file__).parent
    for source in (
        *sorted((package / "checkpoint").glob("*.py")),
        *(package / f"{name}.py" for name in (*_CODE, *code)),
    ):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def plan(
    src: str | Path,
    dst: str | Path | None,
    *,
    layout: str = MODELOPT,
    ignore: Iterable[str] = DEFAULT_IGNORE,
    kv_cache: str | None = None,
    share_scales: bool = True,
) -> dict[str, tuple[str, ...]]:
    """The modules of a dense directory that ``convert`` would quantize, each with those that share its global scale.

    Args:
        dst: None if nothing will be written; the other arguments are those of ``convert``.

    Raises:
        ValueError, FileExistsError: as ``convert``; and a source that is quantized already.
    """
    checkpoint, patterns = _opened(src, dst, layout, ignore, kv_cache)
    if checkpoint.quantization is not None:
        raise ValueError(f"{src} is quantized already")
    found = QuantizePlan(checkpoint, layout, "max", patterns, kv_cache, share_scales).groups
    if not found:
        raise ValueError(f"{src} has no linear layer that would be NVFP4")
    return found


def _opened(
    src: str | Path, dst: str | Path | None, layout: str, ignore: Iterable[str], kv_cache: str | None
) -> tuple[Checkpoint, Patterns]:
    if isinstance(ignore, str):
        raise ValueError(f"ignore is the string {ignore!r}; it must be a sequence of patterns")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}; supported: {', '.join(LAYOUTS)}")
    if kv_cache not in (None, "fp8"):
        raise ValueError(f"kv_cache {kv_cache!r}; supported: fp8, None")
    patterns = Patterns(ignore)
    if dst is not None:
        check_absent(Path(dst))
    return open_checkpoint(src), patterns


def _configs(
    directory: Directory, plan: QuantizePlan | RelayoutPlan, layout: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    quantization, hf_quant_config = quantization_configs(layout, plan.schemes, plan.dense, plan.kv_cache)
    config = copy.deepcopy(directory.config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    config["quantization_config"] = quantization
    return config, hf_quant_config


def _warn(directory: Directory, patterns: Patterns) -> None:
    modules = {split(name)[0] for name in directory.files}
    for pattern in patterns.patterns:
        # A tied model has no lm_head, and the default pattern is not the caller's mistake.
        if pattern not in DEFAULT_IGNORE and not any(Patterns([pattern]).match(module) for module in modules):
            warnings.warn(f"ignore pattern {pattern!r} matches no module of {directory.path}", stacklevel=3)
    if "auto_map" in directory.config:
        warnings.warn(f"{directory.path} uses code of its own (auto_map); *.py files are not copied", stacklevel=3)
