"""NVFP4 checkpoints by rules that know the inputs of a layer from text: ``imatrix`` and ``gptq``.

``imatrix`` weighs the error of a weight by E[x^2] of its column's input, as the model gives it before anything is
quantized (``quantizers.py``). ``gptq`` goes through the layers in order: the inputs of a layer come from those before
it as they were quantized (``gptq.py``). Layers that are run as one have one global scale, as with all rules. What GPTQ
has made of a decoder layer is kept beside the destination until the whole is there: after an interrupt the same call
runs the text through those layers and goes on behind them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adallm import checkpoint, gptq, nvfp4, quantizers
from adallm.checkpoint import Conversion
from adallm.checkpoint.convert import DEFAULT_IGNORE, check_device, key_of
from adallm.checkpoint.partial import partial_directory
from adallm.rows import finite_amax
from adallm.walk import Moments, walk
from adallm.windows import TOKENS, check_tokens, read_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RULES = ("imatrix", "gptq")
_PARTS = ("packed", "scale", "global_scale", "divisor")
# What GPTQ's results depend on, beside what all conversions do.
_CODE = ("calibrated", "gptq", "walk", "windows")


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    scale_rule: str,
    text: Sequence[str | Path] = (),
    tokens: int = TOKENS,
    layout: str = "modelopt",
    ignore: Iterable[str] = DEFAULT_IGNORE,
    kv_cache: str | None = None,
    share_scales: bool = True,
    device: str = "cpu",
    progress: bool = False,
) -> Conversion:
    """``checkpoint.convert``, which has the other arguments and errors, with the rules of ``RULES`` too.

    Args:
        scale_rule: of ``quantizers.RULES``, or ``"gptq"``.
        src: a BF16, FP16 or FP32 directory, with its tokenizer; the whole model is in memory.
        text, tokens: of ``windows.read_windows``. For ``gptq`` at least as many tokens as the widest layer has columns.

    Raises:
        ValueError: an option that is not supported; text, tokenizer or model, as in ``windows.py`` and ``walk.py``;
            inputs whose second moments are singular. A layer is named.
    """
    options = {
        "layout": layout,
        "ignore": ignore if isinstance(ignore, str) else list(ignore),
        "kv_cache": kv_cache,
        "share_scales": share_scales,
    }
    if scale_rule not in RULES:
        if text or tokens != TOKENS:
            raise ValueError(f"scale_rule {scale_rule!r} reads no text; those that do: {', '.join(RULES)}")
        return checkpoint.convert(src, dst, scale_rule=scale_rule, **options, device=device, progress=progress)
    check_device(device)
    source = Path(src)
    groups = checkpoint.plan(source, dst, **options)
    model, windows = _opened(source, text, tokens)
    given = {"device": device, "title": Path(dst).name, "progress": progress}
    convert_as = {"scale_rule": scale_rule, **options, "device": device, "progress": progress}
    if scale_rule == "imatrix":
        importance = _importance(model, windows, groups, **given)
        del model
        return checkpoint.convert(src, dst, importance=importance, **convert_as)
    _check_columns(model, groups, sum(map(len, windows)))
    key = key_of(source, [groups, layout, device, windows], {}, _CODE)
    with partial_directory(Path(dst), key) as folder:
        quantized = _quantized(model, windows, groups, layout, folder, **given)
        del model
        return checkpoint.convert(src, dst, quantized=quantized, **convert_as)


def moments(
    src: str | Path,
    *,
    text: Sequence[str | Path] = (),
    tokens: int = TOKENS,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Tensor]:
    """``sum x x^T`` of what enters each layer that ``convert`` would quantize, float64 ``[K, K]`` on the CPU.

    The arguments and errors are those of ``convert``. The moments of all layers are in memory at a time.
    """
    check_device(device)
    source = Path(src)
    groups = checkpoint.plan(source, None)
    model, windows = _opened(source, text, tokens)
    found: dict[str, Tensor] = {}

    def visit(of_layers: Moments, _: Callable[[str], nn.Linear]) -> bool:
        for first, total in of_layers.items():
            found.update(dict.fromkeys(groups[first], total.cpu()))
        return False

    given = {"diagonal": False, "device": device, "title": source.name, "progress": progress}
    walk(model, windows, _first(groups), visit, **given)
    return found


def _opened(source: Path, text: Sequence[str | Path], tokens: int) -> tuple[PreTrainedModel, list[list[int]]]:
    """The model, and text for it."""
    windows = read_windows(source, [text] if isinstance(text, str | Path) else text, tokens)
    model = _load(source)
    check_tokens(source, windows, model.get_input_embeddings().num_embeddings)
    return model, windows


def _load(source: Path) -> PreTrainedModel:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    return model.eval()


def _check_columns(model: nn.Module, groups: dict[str, tuple[str, ...]], tokens: int) -> None:
    for name, module in model.named_modules():
        if name in groups and module.weight.shape[1] > tokens:
            raise ValueError(
                f"{name} has {module.weight.shape[1]} columns and the text {tokens} tokens; 'gptq' needs as many tokens"
            )


def _importance(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    groups: dict[str, tuple[str, ...]],
    **given: object,
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def visit(moments: Moments, _: Callable[[str], nn.Linear]) -> bool:
        for first, total in moments.items():
            if not total.any():
                raise ValueError(f"{first} is given zeros alone; ignore it, or take another rule")
            found.update(dict.fromkeys(groups[first], (total / total.mean()).float().cpu()))
        return False

    walk(model, windows, _first(groups), visit, diagonal=True, **given)
    return found


def _quantized(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    groups: dict[str, tuple[str, ...]],
    layout: str,
    folder: Path,
    **given: object,
) -> dict[str, nvfp4.NVFP4Tensor]:
    found: dict[str, nvfp4.NVFP4Tensor] = {}

    def file(firsts: Iterable[str]) -> Path:
        return folder / f"{min(firsts)}.safetensors"

    def ready(firsts: Sequence[str], module: Callable[[str], nn.Linear]) -> bool:
        if not file(firsts).is_file():
            return False
        tensors = load_file(file(firsts))
        for name in itertools.chain.from_iterable(groups[first] for first in firsts):
            found[name] = nvfp4.NVFP4Tensor(*(tensors.get(f"{name} {part}") for part in _PARTS))
            weight = module(name).weight
            weight.copy_(nvfp4.dequantize(found[name].to(weight.device)))
        return True

    def visit(moments: Moments, module: Callable[[str], nn.Linear]) -> bool:
        for first, total in moments.items():
            group = groups[first]
            weights = [module(name).weight.detach() for name in group]
            together = _quantize(group, weights, total, layout)
            for name, weight, rows in zip(group, weights, _rows(weights), strict=True):
                part = nvfp4.NVFP4Tensor(
                    together.packed[rows], together.scale[rows], together.global_scale, together.divisor
                )
                weight.copy_(nvfp4.dequantize(part))
                found[name] = part.to("cpu")
        names = itertools.chain.from_iterable(groups[first] for first in moments)
        _store(file(moments), {name: found[name] for name in names})
        return True

    walk(model, windows, _first(groups), visit, ready=ready, diagonal=False, **given)
    return found


def _store(file: Path, weights: dict[str, nvfp4.NVFP4Tensor]) -> None:
    tensors = {f"{name} {part}": getattr(t, part) for name, t in weights.items() for part in _PARTS}
    # Parts of one tensor share its memory, which a file cannot.
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    partial = file.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(file)


def _first(groups: dict[str, tuple[str, ...]]) -> list[str]:
    """A layer of each group: all of it are given the same input."""
    return list(dict.fromkeys(group[0] for group in groups.values()))


def _quantize(group: tuple[str, ...], weights: list[Tensor], moments: Tensor, layout: str) -> nvfp4.NVFP4Tensor:
    amaxes = []
    for name, weight in zip(group, weights, strict=True):
        try:
            amaxes.append(finite_amax(weight).float())
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from None
    try:
        amax = torch.stack(amaxes).amax()
        importance = moments.diagonal().float()
        quantizers.check_importance("imatrix", importance, len(importance))
        best = quantizers.best_global_scale(weights, amax, "imatrix", importance)
        return gptq.quantize(torch.cat(weights), moments, global_scale=best, layout=layout)
    except ValueError as error:
        raise ValueError(f"{group[0]}: {error}") from None


def _rows(weights: Sequence[Tensor]) -> list[slice]:
    ends = torch.tensor([0, *(len(weight) for weight in weights)]).cumsum(0).tolist()
    return [slice(first, end) for first, end in itertools.pairwise(ends)]
