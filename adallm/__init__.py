"""AdaLLM: NVFP4 models on GPUs that have no FP4 cores.

``import adallm`` loads nothing else; ``adallm.nvfp4`` and every other module load when first used.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(module.name for module in pkgutil.iter_modules(__path__))})
