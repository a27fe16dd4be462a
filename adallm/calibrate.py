"""KV-cache scales from text: ``scale = clip / 448`` for the keys, and for the values, of each attention layer.

An E4M3 cache stands for ``cache * scale``, and what is beyond ``448 * scale`` saturates. ``clip`` is taken over ``|x|``
of all tokens, heads and channels of the layer, as ``x`` enters the cache: keys behind their norm and rotary embedding.

- ``max``: the largest ``|x|``. On this text nothing saturates.
- ``percentile``: the smallest ``|x|`` that at least ``percentile`` % of all ``|x|`` do not exceed.

A ``clip`` of 0 gives a scale of 1. The model runs with its stored weights, 16-bit activations and an unquantized cache.

The percentile comes from a count of each of the 2^15 magnitudes that a 16-bit float can have: exact for BF16 and FP16
keys and values, in 256 KB for each side of a layer, however long the text. FP32 ones are rounded to BF16 first, for
this method alone.

ModelOpt, whose names the tensors have, computes amax / 448 too, but writes at least 1.0 for an FP8 cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from adallm import checkpoint, fp8, hf_model, text
from adallm.checkpoint.writer import check_absent
from adallm.formats import E4M3_MAX
from adallm.hf_model import FORMATS
from adallm.windows import TOKENS, check_tokens, read_windows

METHODS = ("max", "percentile")
PERCENTILE = 99.99
_MAGNITUDES = 1 << 15


@dataclass(frozen=True)
class LayerScales:
    """What was found for one attention layer.

    Attributes:
        name: of the attention module.
        k_amax, v_amax: the largest magnitude.
        k_scale, v_scale: FP32 multipliers of the cache.
        k_saturated, v_saturated: share of the elements beyond ``448 * scale``, from 0 to 1.
    """

    name: str
    k_amax: float
    v_amax: float
    k_scale: float
    v_scale: float
    k_saturated: float
    v_saturated: float


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` did: where the result is, tokens and windows that the model read, and layers in order."""

    path: Path
    tokens: int
    windows: int
    layers: tuple[LayerScales, ...]


def calibrate(
    model: str | Path,
    dst: str | Path,
    *,
    text: Sequence[str | Path] = (),
    tokens: int = TOKENS,
    method: str = "max",
    percentile: float | None = None,
    progress: bool = False,
) -> Calibration:
    """``dst`` = ``model`` with KV-cache scales computed from text, and an FP8 KV cache declared.

    The text is encoded document by document, as the tokenizer encodes a prompt, and read in windows of 2048
    tokens or the model's context, one at a time, each with a cache of its own. All other tensors are copied bit for
    bit; scales that are there are replaced.

    Args:
        model: an NVFP4 or FP8 directory of either layout, with its tokenizer.
        dst: must not exist; appears only when it is whole.
        text: UTF-8 files, each a document, in pieces of 2^20 characters if longer. By default the bundled corpus: the
            source of the running Python's standard library without test suites, its validation split and then its
            training split, never held-out text.
        tokens: how many to read, from the beginning of the text; at least 512. Shorter text is read whole.
        method: ``"max"`` or ``"percentile"``.
        percentile: above 0, at most 100, of ``|x|``; ``PERCENTILE`` by default. For method ``"percentile"`` alone.
        progress: show bars on stderr.

    Raises:
        CheckpointError: the model is damaged or contradicts itself.
        ValueError: an option that is not supported; a model that ``checkpoint.attention_layers`` refuses or whose keys
            do not pass through a cache of each layer; a tokenizer that is missing or does not fit; text that is not
            UTF-8 or has fewer than 512 tokens; keys or values that are NaN or infinite, naming the layer.
        FileExistsError: ``dst`` exists.
        OSError: a file that cannot be read, or not enough disk space.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}; supported: {', '.join(METHODS)}")
    if percentile is not None and method != "percentile":
        raise ValueError(f"percentile {percentile} means nothing for method {method!r}; it is for method 'percentile'")
    percentile = PERCENTILE if percentile is None else float(percentile)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile {percentile}; it must be above 0 and at most 100")
    check_absent(Path(dst))
    source = Path(model)
    names = checkpoint.attention_layers(source)
    windows = read_windows(source, [text] if isinstance(text, str | Path) else text, tokens)
    seen = _observe(source, names, windows, title=Path(dst).name, progress=progress)
    layers = []
    for name in names:
        (k_scale, k_saturated), (v_scale, v_saturated) = (m.scale(method, percentile) for m in seen[name])
        k_amax, v_amax = (m.amax for m in seen[name])
        layers.append(LayerScales(name, k_amax, v_amax, k_scale, v_scale, k_saturated, v_saturated))
    scales = {f"{layer.name}.k_proj.k_scale": layer.k_scale for layer in layers}
    scales |= {f"{layer.name}.v_proj.v_scale": layer.v_scale for layer in layers}
    path = checkpoint.write_kv_scales(source, dst, scales, progress=progress)
    return Calibration(path, sum(map(len, windows)), len(windows), tuple(layers))


def table(layers: Sequence[LayerScales], *, saturated: bool) -> str:
    """One line a layer; ``saturated`` adds the shares in percent."""
    header = ["layer", "k amax", "v amax", "k_scale", "v_scale"]
    rows = [
        [layer.name, *(f"{x:.5g}" for x in (layer.k_amax, layer.v_amax, layer.k_scale, layer.v_scale))]
        for layer in layers
    ]
    if saturated:
        header += ["k saturated", "v saturated"]
        for row, layer in zip(rows, layers, strict=True):
            row += [f"{100 * share:.4f}%" for share in (layer.k_saturated, layer.v_saturated)]
    return text.table(header, rows, align="l" + "r" * (len(header) - 1))


class Magnitudes:
    """How often each ``|x|`` occurred: ``counts[i]`` of the number whose 15 bits below the sign are ``i``.

    Those bits, as an integer, are in the order of the magnitudes.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_MAGNITUDES, dtype=torch.int64)
        self.elements = 0
        self.amax = 0.0
        self._dtype = torch.bfloat16

    def add(self, x: Tensor) -> None:
        """Count the elements of a BF16, FP16 or FP32 tensor of any shape; all calls have the same dtype.

        Raises:
            ValueError: NaN or an infinity.
        """
        amax = float(x.abs().amax())
        if not math.isfinite(amax):
            raise ValueError(f"{int((~torch.isfinite(x)).sum())} of {x.numel()} are not finite")
        self.elements += x.numel()
        self.amax = max(self.amax, amax)
        if x.dtype == torch.float16:
            self._dtype = x.dtype
        bits = x.to(self._dtype).reshape(-1).view(torch.int16).int() & (_MAGNITUDES - 1)
        self.counts += torch.bincount(bits, minlength=_MAGNITUDES).cpu()

    def percentile(self, percentile: float) -> float:
        """The element of rank ``ceil(percentile / 100 * n)`` of ``n`` in ascending order (nearest rank)."""
        # By way of the decimal number that was asked for: 99.99 / 100 has no exact binary form.
        rank = math.ceil(Fraction(str(percentile)) / 100 * self.elements)
        index = torch.searchsorted(self.counts.cumsum(0), rank)
        # FP32 may have been rounded up.
        return min(float(self._values()[index]), self.amax)

    def scale(self, method: str, percentile: float) -> tuple[float, float]:
        """The FP32 scale, and the share of elements that saturate with it."""
        clip = self.amax if method == "max" else self.percentile(percentile)
        scale = float(fp8.scale_of(torch.tensor(clip, dtype=torch.float32)))
        # Compared with clip itself, which 448 * scale may miss by a rounding.
        above = self._values() > (clip or E4M3_MAX)
        return scale, 0.0 if method == "max" else int(self.counts[above].sum()) / self.elements

    def _values(self) -> Tensor:
        return torch.arange(_MAGNITUDES, dtype=torch.int16).view(self._dtype).float()


class _ObservedCache(DynamicCache):
    """Shows what enters it to ``seen[layer_index]``, keys and values, before it is stored."""

    def __init__(self, model: PreTrainedModel, seen: dict[int, tuple[str, Magnitudes, Magnitudes]]) -> None:
        super().__init__(config=model.config)
        self._seen = seen

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if layer_idx in self._seen:
            name, *sides = self._seen[layer_idx]
            for what, magnitudes, x in zip(("keys", "values"), sides, (key_states, value_states), strict=True):
                try:
                    magnitudes.add(x)
                except ValueError as error:
                    raise ValueError(f"{name}: {what}: {error}") from None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def _observe(
    source: Path, names: list[str], windows: list[list[int]], *, title: str, progress: bool
) -> dict[str, tuple[Magnitudes, Magnitudes]]:
    """Magnitudes of the keys and values of each layer over all windows."""
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = hf_model.load(source, FORMATS["nvfp4"], device=device)
    check_tokens(source, windows, model.get_input_embeddings().num_embeddings)
    index = {
        name: module.layer_idx
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    }
    seen = {index[name]: (name, Magnitudes(), Magnitudes()) for name in names if name in index}
    with tqdm(total=sum(map(len, windows)), unit=" tokens", unit_scale=True, desc=title, disable=not progress) as bar:
        for window in windows:
            cache = _ObservedCache(model, seen)
            # Without the head: no logits are needed.
            model.base_model(torch.tensor([window], device=device), past_key_values=cache, use_cache=True)
            found = {name: (k, v) for name, k, v in seen.values() if k.elements and v.elements}
            if missing := [name for name in names if name not in found]:
                raise ValueError(
                    f"{source}: nothing of {missing[0]} enters the cache of {type(model).__name__}; supported: text "
                    "models in which every layer with k_proj and v_proj has a cache of its own"
                )
            bar.update(len(window))
    return found
