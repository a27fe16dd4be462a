"""What a user can choose: from the environment, or for one engine from ``--additional-config``, which comes first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adallm.vllm_plugin.compat import FP8

ACTIVATIONS = ("auto", "bf16", "fp8")
LM_HEADS = ("checkpoint", "fp8", "nvfp4")
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True)
class Settings:
    """Choices.

    Attributes:
        activations: ``"bf16"`` (W4A16), ``"fp8"`` (W4A8) or ``"auto"``, which chooses by the number of tokens.
        lm_head: ``"fp8"`` (W8A8) or ``"nvfp4"`` (W4A16) to quantize an ``lm_head`` that the checkpoint has in 16 bits.
        allow_fallback: whether layers that our kernels do not run may go to vLLM's.
        fuse: whether an RMSNorm or a gated MLP in front of a layer is computed by its operator, in models that
            ``torch.compile`` compiles.
    """

    activations: str = "auto"
    lm_head: str = "checkpoint"
    allow_fallback: bool = False
    fuse: bool = True

    @classmethod
    def read(cls, additional_config: Any = None, environment: Mapping[str, str] = os.environ) -> Settings:
        """The choices of this process.

        Args:
            additional_config: of vLLM; only its entry ``"adallm"`` is looked at.

        Raises:
            ValueError: a name or a value that there is not; it lists those that there are.
        """
        given = additional_config.get("adallm", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(f"additional_config['adallm'] is {given!r}; it must be a dictionary")
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"additional_config['adallm'] has {unknown}; supported: {', '.join(cls.__dataclass_fields__)}"
            )

        def found(name: str) -> tuple[str, Any]:
            variable = f"ADALLM_{name.upper()}"
            return (f"adallm.{name}", given[name]) if name in given else (variable, environment.get(variable))

        def choice(name: str, supported: tuple[str, ...]) -> str:
            where, value = found(name)
            if value in (None, ""):
                return supported[0]
            if value not in supported:
                raise ValueError(f"{where} is {value!r}; supported: {', '.join(supported)}")
            return value

        def switch(name: str, otherwise: bool) -> bool:
            where, value = found(name)
            if value in (None, ""):
                return otherwise
            if str(value).lower() not in _BOOLEANS:
                raise ValueError(f"{where} is {value!r}; supported: 0, 1")
            return _BOOLEANS[str(value).lower()]

        return cls(
            choice("activations", ACTIVATIONS),
            choice("lm_head", LM_HEADS),
            switch("allow_fallback", cls.allow_fallback),
            switch("fuse", cls.fuse),
        )

    def kind(self, capability: tuple[int, int] | None) -> str:
        """What ``linear.NVFP4Linear`` is asked for on a GPU of this capability; None for a CPU. Where there are no FP8
        cores, ``"auto"`` is ``"bf16"``.

        Raises:
            ValueError: FP8 activations, or an ``lm_head`` in FP8, where there are no FP8 cores.
        """
        cores = capability is not None and capability >= FP8
        for name, value, supported in (
            ("ACTIVATIONS", self.activations, "bf16, auto"),
            ("LM_HEAD", self.lm_head, "checkpoint, nvfp4"),
        ):
            if value == "fp8" and capability is not None and not cores:
                raise ValueError(
                    f"ADALLM_{name} is fp8, and this GPU is sm_{capability[0]}{capability[1]}; it has no FP8 cores, "
                    f"which came with sm_89. Supported here: {supported}"
                )
        return "bf16" if self.activations == "auto" and not cores else self.activations
