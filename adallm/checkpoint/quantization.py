"""What a directory's configs say about quantization, the same object for both layouts.

ModelOpt writes ``hf_quant_config.json`` and much the same into ``config.json`` under ``quantization_config``: one
algorithm for every linear layer that is not excluded, or ``MIXED_PRECISION`` with an algorithm for each layer.
compressed-tensors writes ``quantization_config`` alone: groups of targets (names, ``re:`` patterns, the class
``Linear``) with a scheme each, and an ignore list.

Sources: ``modelopt/torch/export/convert_hf_config.py`` and ``quant_utils.py``; ``compressed_tensors/quantization``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from adallm.checkpoint.names import Patterns, is_router

MODELOPT, COMPRESSED_TENSORS = "modelopt", "compressed-tensors"


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is stored.

    Attributes:
        format: ``"nvfp4"`` or ``"fp8"``.
        granularity: of the weight's scale: ``"block"`` for nvfp4; ``"tensor"`` or ``"channel"`` for fp8.
        activations: what the producer meant the activations to be: None (weights only), ``"nvfp4"``, ``"fp8"`` with one
            calibrated scale, or ``"fp8-token"`` with a scale for each token, found at run time.
    """

    format: str
    granularity: str
    activations: str | None


@dataclass(frozen=True)
class Group:
    """A scheme and the layers that it is for: module names, patterns, or the class name ``Linear`` for all."""

    scheme: Scheme
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Quantization:
    """What the configs declare.

    Attributes:
        layout: ``"modelopt"`` or ``"compressed-tensors"``.
        algorithm: the layout's own word, ``NVFP4``, ``MIXED_PRECISION``, ``nvfp4-pack-quantized``, ...
        groups: schemes with their targets, first match wins.
        ignored: patterns of modules that stay dense.
        kv_cache: ``"fp8"``, None, or another algorithm of the layout in lower case.
        group_size: of NVFP4, always 16.
        producer: who wrote it, if it says so.
        files: the files that say it, for messages.
    """

    layout: str
    algorithm: str
    groups: tuple[Group, ...]
    ignored: tuple[str, ...]
    kv_cache: str | None
    group_size: int = 16
    producer: str | None = None
    files: tuple[str, ...] = field(default=("config.json",), compare=False)

    @cached_property
    def _ignored(self) -> Patterns:
        return Patterns(self.ignored)

    @cached_property
    def _targets(self) -> list[tuple[Patterns, Scheme]]:
        return [
            (Patterns(target for target in group.targets if target != "Linear"), group.scheme) for group in self.groups
        ]

    @cached_property
    def _default(self) -> Scheme | None:
        return next((group.scheme for group in self.groups if "Linear" in group.targets), None)

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme declared for a linear layer, None for dense."""
        if self._ignored.match(module) is not None:
            return None
        for patterns, scheme in self._targets:
            if patterns.match(module) is not None:
                return scheme
        return self._default

    def may_be_dense(self, module: str) -> bool:
        """Whether a linear layer may be dense although ``scheme_of`` has a scheme for it.

        Routers are no ``Linear`` in transformers, so that lists of linear layers leave them out; and see
        ``Patterns.loosely_match``.
        """
        if is_router(module):
            return True
        return self.layout == MODELOPT and (
            self._ignored.loosely_match(module) or "vision_tower" in module or "vision_model" in module
        )
