"""The plan for a dense directory: which tensors become NVFP4, and with which global scale."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from adallm import nvfp4, quantizers
from adallm.checkpoint.errors import fail
from adallm.checkpoint.header import open_tensors
from adallm.checkpoint.layers import NVFP4_PARTS
from adallm.checkpoint.names import (
    Patterns,
    compressed_tensors_kv_name,
    fused_group,
    is_linear_weight,
    is_router,
    split,
)
from adallm.checkpoint.opened import Checkpoint
from adallm.checkpoint.quantization import MODELOPT, Scheme
from adallm.formats import NVFP4_BLOCK, NVFP4_RANGE
from adallm.rows import finite_amax

# Of a checkpoint: those of a tensor, and what goes through a model.
GPTQ = "gptq"
RULES = (*nvfp4.SCALE_RULES, GPTQ)
_WEIGHTS_ONLY = Scheme("nvfp4", "block", None)
# These store linear layers as [K, N]: blocks along the last dimension would run across the outputs.
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt")


class QuantizePlan:
    """Quantize the linear layers of a dense checkpoint.

    Attributes:
        schemes: of the modules that become NVFP4.
        dense: the linear modules that do not.
        kv_cache: ``"fp8"`` or None.
        nbytes: an upper bound for the tensor bytes written.
        work: bytes read, for the progress bar.

    Args:
        device: where weights are quantized; what is written is on the CPU.

    Raises:
        CheckpointError: a weight that must be quantized and cannot be, by its name or shape.
        ValueError: a scale rule that is not supported; an importance that does not fit it, or a layer; an FP8 KV cache
            for a model without k_proj.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: str,
        scale_rule: str,
        ignore: Patterns,
        kv_cache: str | None,
        share_scales: bool,
        importance: Mapping[str, Tensor] | None = None,
        quantized: Mapping[str, nvfp4.NVFP4Tensor] | None = None,
        device: str = "cpu",
    ) -> None:
        if scale_rule not in RULES:
            raise ValueError(f"scale_rule {scale_rule!r}; supported: {', '.join(RULES)}")
        self._directory, self._layout, self._scale_rule = checkpoint.directory, layout, scale_rule
        self.kv_cache, self._device = kv_cache, device
        self.schemes: dict[str, Scheme] = {}
        self.dense: list[str] = []
        if self._directory.config.get("model_type") in _TRANSPOSED_MODELS:
            fail(self._directory.config_file, "this model type stores linear layers transposed; it is not supported")
        for name in self._directory.files:
            self._sort(name, ignore)
        self._add_kv = kv_scale_names(self._directory.files, layout) if kv_cache else {}
        self._groups = self._shared_groups() if share_scales else {}
        self._importance, self._quantized = importance or {}, quantized or {}
        self._check_given()
        self._global_scales: dict[tuple[str, ...], Tensor] = {}
        self._amax: dict[tuple[str, ...], float] = {}
        self._dtypes: dict[tuple[str, ...], torch.dtype] = {}
        total = sum(header.nbytes for header in self._directory.headers.values())
        weights = [self._directory.entry(f"{module}.weight".removeprefix(".")) for module in self.schemes]
        packed = sum(entry.numel // 2 + entry.numel // NVFP4_BLOCK + 4 for entry in weights)
        self.nbytes = total - sum(entry.nbytes for entry in weights) + packed + 4 * len(self._add_kv)
        read_twice = self._groups if scale_rule != GPTQ else {}
        self.work = total + sum(self._directory.entry(name).nbytes for name in read_twice)

    def prepare(self, progress: Callable[[int], object]) -> None:
        """Read the weights that share a global scale once, for the largest of each group, or the scale itself."""
        if self._scale_rule == GPTQ:
            return
        if self._scale_rule in quantizers.SEARCHED:
            for group in dict.fromkeys(self._groups.values()):
                self._search(group, progress)
            return
        for header in self._directory.headers.values():
            with open_tensors(header) as file:
                for name in header.tensors.keys() & self._groups.keys():
                    group, weight = self._groups[name], file.get_tensor(name)
                    low, high = torch.aminmax(weight)
                    amax = max(-float(low), float(high))
                    # Not finite: quantizing that weight says so, with the index; the others go without it.
                    if amax < float("inf"):
                        self._amax[group] = max(self._amax.get(group, 0.0), amax)
                    seen = self._dtypes.setdefault(group, weight.dtype)
                    if seen != weight.dtype:
                        self._dtypes[group] = torch.float32
                    progress(weight.nbytes)

    def _search(self, group: tuple[str, ...], progress: Callable[[int], object]) -> None:
        weights = []
        for module in group:
            name = f"{module}.weight"
            with open_tensors(self._directory.headers[self._directory.files[name]]) as file:
                weights.append(file.get_tensor(name).to(self._device))
        # Without one, quantizing a weight of the group says what is wrong with it. All are given the same input.
        with contextlib.suppress(ValueError):
            amax = torch.stack([finite_amax(weight).float() for weight in weights]).amax()
            if amax / NVFP4_RANGE > 0:
                importance = self._importance.get(group[0])
                self._global_scales[group] = quantizers.best_global_scale(weights, amax, self._scale_rule, importance)
        progress(sum(weight.nbytes for weight in weights))

    def convert(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor, None]]:
        """The tensors that take the place of one."""
        module, _ = split(name)
        if name in self._add_kv:
            yield self._add_kv[name], kv_scale_of_one(self._layout), None
        if module not in self.schemes or split(name)[1] != "weight":
            yield name, value, None
            return
        t = self._quantize(name, value).to("cpu")
        parts = {
            "weight": t.packed,
            "scale": t.scale,
            "global_scale": t.global_scale if self._layout == MODELOPT else t.divisor.reshape(1),
        }
        # Layers that share a scale, or are parts of one tensor, may share memory, which a file cannot.
        parts = {role: part.clone() for role, part in parts.items()}
        for role, part in parts.items():
            yield f"{module}.{NVFP4_PARTS[self._layout][role]}".removeprefix("."), part, None

    def _sort(self, name: str, ignore: Patterns) -> None:
        module, _ = split(name)
        entry, file = self._directory.entry(name), self._directory.file(name)
        ignored = ignore.match(module) is not None
        if len(entry.shape) == 3 and "experts" in module.split(".") and not ignored:
            fail(file, "holds all experts in one 3-D tensor, which is not quantized; save the model with one 2-D "
                       f"weight for each expert, or ignore {module!r} to leave it dense", tensor=name)  # fmt: skip
        if not is_linear_weight(name, entry.shape):
            return
        if ignored or is_router(module):
            self.dense.append(module)
            return
        if entry.shape[1] % NVFP4_BLOCK or entry.numel == 0:
            fail(file, f"is {list(entry.shape)}: its columns are no positive multiple of {NVFP4_BLOCK}; ignore "
                       f"{module!r} to leave it dense", tensor=name)  # fmt: skip
        self.schemes[module] = _WEIGHTS_ONLY

    def _check_given(self) -> None:
        """Importance, or the quantized weight, of each layer, as the rule wants them."""
        for module in self.schemes:
            shape = self._directory.entry(f"{module}.weight".removeprefix(".")).shape
            weight = self._quantized.get(module)
            if (self._scale_rule == GPTQ) != (weight is not None):
                what = "is missing" if weight is None else "is given"
                raise ValueError(f"{module}: its quantized weight {what}; it belongs to scale_rule 'gptq' alone")
            if weight is not None and (weight.shape != shape or (weight.divisor is None) != (self._layout == MODELOPT)):
                raise ValueError(f"{module}: its quantized weight {list(weight.shape)} is of another shape or layout")
            try:
                quantizers.check_importance(self._scale_rule, self._importance.get(module), shape[1])
            except ValueError as error:
                raise ValueError(f"{module}: {error}") from None

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Each module with those, itself among them, that share its global scale."""
        return {module: self._groups.get(f"{module}.weight", (module,)) for module in self.schemes}

    def _shared_groups(self) -> dict[str, tuple[str, ...]]:
        groups = {}
        for module in self.schemes:
            group = tuple(member for member in fused_group(module) if member in self.schemes)
            if len(group) > 1:
                groups[f"{module}.weight"] = group
        return groups

    def _quantize(self, name: str, weight: Tensor) -> nvfp4.NVFP4Tensor:
        if (done := self._quantized.get(split(name)[0])) is not None:
            return done
        group, weight = self._groups.get(name), weight.to(self._device)
        if weight.dtype == torch.float16 or self._dtypes.get(group, weight.dtype) != weight.dtype:
            weight = weight.float()
        shared, rows = self._amax.get(group), weight.shape[0]
        low, high = torch.aminmax(weight)
        if shared is not None and max(-float(low), float(high)) < shared:
            # One more row with the group's amax gives every scale rule the group's global scale.
            weight = torch.cat([weight, weight.new_full((1, weight.shape[1]), shared)])
        given = {"importance": self._importance.get(split(name)[0]), "global_scale": self._global_scales.get(group)}
        try:
            t = nvfp4.quantize(weight, scale_rule=self._scale_rule, layout=self._layout, **given)
        except ValueError as error:
            fail(self._directory.file(name), f"cannot be quantized: {error}", tensor=name)
        if weight.shape[0] == rows:
            return t
        return nvfp4.NVFP4Tensor(t.packed[:rows], t.scale[:rows], t.global_scale, t.divisor)


def kv_scale_names(tensors: dict[str, str], layout: str) -> dict[str, str]:
    """The KV-cache scale that goes beside each weight of a k_proj or v_proj, by the name of that weight.

    Raises:
        ValueError: the model has no such layers.
    """
    names = {}
    for name in tensors:
        module, parameter = split(name)
        last = split(module)[1]
        if last in ("k_proj", "v_proj") and parameter in ("weight", "weight_packed"):
            scale = f"{module}.{last[0]}_scale"
            names[name] = scale if layout == MODELOPT else compressed_tensors_kv_name(scale)
    if not names:
        raise ValueError("kv_cache='fp8' needs attention layers with k_proj and v_proj, of which there are none")
    return names


def kv_scale_of_one(layout: str) -> Tensor:
    """1.0 as the layout stores a KV-cache scale."""
    return torch.ones(() if layout == MODELOPT else (1,), dtype=torch.float32)
