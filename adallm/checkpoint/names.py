"""What a tensor's name says: its module, whether that is a linear layer, and which patterns match it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

# Modules whose 2-D weight is no linear layer that anybody quantizes: routers decide by small differences.
_ROUTERS = ("gate", "router", "shared_expert_gate")
_EMBEDDINGS = ("wte", "wpe")

# Layers that vLLM runs as one matrix, with one global scale: ModelOpt and llm-compressor give them a common one.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def split(name: str) -> tuple[str, str]:
    """``"a.b.weight"`` to the module ``"a.b"`` and its parameter ``"weight"``."""
    module, _, parameter = name.rpartition(".")
    return module, parameter


def is_router(module: str) -> bool:
    """Whether the module chooses experts."""
    parts = module.split(".")
    return parts[-1] in _ROUTERS or "router" in parts


def is_embedding_or_norm(module: str) -> bool:
    """Whether the module's weight is looked up or multiplied element by element."""
    last = module.rpartition(".")[2].lower()
    return ("embed" in last and "proj" not in last) or "norm" in last or last in _EMBEDDINGS


def is_linear_weight(name: str, shape: Sequence[int]) -> bool:
    """Whether the tensor is the 2-D weight of a linear layer, routers included."""
    module, parameter = split(name)
    return parameter == "weight" and len(shape) == 2 and not is_embedding_or_norm(module)


def fused_group(module: str) -> tuple[str, ...]:
    """The modules, this one among them, that share a global scale; only itself if it is fused with none."""
    parent, last = split(module)
    for group in FUSED:
        if last in group:
            return tuple(f"{parent}.{member}" if parent else member for member in group)
    return (module,)


def modelopt_kv_name(name: str) -> str:
    """``<attention>.k_scale`` to ``<attention>.k_proj.k_scale``, where ModelOpt has it; likewise for v."""
    module, parameter = split(name)
    projection = f".{parameter[0]}_proj"
    if parameter not in ("k_scale", "v_scale") or module.endswith(projection):
        return name
    return f"{module}{projection}.{parameter}"


def compressed_tensors_kv_name(name: str) -> str:
    """The inverse of ``modelopt_kv_name``."""
    module, parameter = split(name)
    if parameter not in ("k_scale", "v_scale"):
        return name
    return f"{module.removesuffix(f'.{parameter[0]}_proj')}.{parameter}"


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 10 behind layer 2."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


class Patterns:
    """Module name patterns: ``re:`` and a regular expression matched from the start, as in compressed-tensors; a
    shell pattern (``*``, ``?``, ``[]``), as in ModelOpt; or a name, which also matches the modules inside that module
    and the same name deeper in the model (``lm_head`` matches ``language_model.lm_head``).

    Raises:
        ValueError: a regular expression that is not valid, or a pattern that is no string.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._names: set[str] = set()
        self._regular: list[tuple[str, re.Pattern[str]]] = []
        for pattern in self.patterns:
            if not isinstance(pattern, str):
                raise ValueError(f"pattern {pattern!r} is not a string")
            if pattern.startswith("re:"):
                try:
                    self._regular.append((pattern, re.compile(pattern.removeprefix("re:"))))
                except (re.error, RecursionError, OverflowError) as error:
                    raise ValueError(f"pattern {pattern!r}: {error}") from None
            elif any(character in pattern for character in "*?["):
                self._regular.append((pattern, re.compile(fnmatch.translate(pattern))))
            else:
                self._names.add(pattern)

    def match(self, module: str) -> str | None:
        """The pattern that matches the module, an exact name first, or None."""
        if module in self._names:
            return module
        if self._names:
            parts = module.split(".")
            for i in range(1, len(parts)):
                for part in (".".join(parts[:i]), ".".join(parts[i:])):
                    if part in self._names:
                        return part
        return next((pattern for pattern, regular in self._regular if regular.match(module)), None)

    @cached_property
    def _plain_text(self) -> tuple[str, ...]:
        return tuple(pattern.strip("*.") for pattern in self.patterns if not pattern.startswith("re:"))

    def loosely_match(self, module: str) -> bool:
        """Whether a pattern, without the wildcards at its ends, is found anywhere in the name.

        ModelOpt before 0.39 wrote such fragments, so that some checkpoints leave more layers dense than their patterns
        say.
        """
        return any(text in module for text in self._plain_text if text)
