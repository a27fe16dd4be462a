"""Keys of Triton's cache that do not depend on what a process launches first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton.runtime.jit import JITCallable


def fix_keys(module: Mapping[str, Any]) -> None:
    """Have the keys of a module's functions computed now, helpers before those that call them.

    Triton takes the constants that a helper uses into its caller's key only if the helper's own key is known by then
    (3.6, 3.7). Otherwise a kernel that one process has compiled is compiled again by another, which came to it by a
    different way: after a restart, or where ``vllm_plugin.ahead`` has prepared it.

    Args:
        module: its ``globals()``, at its end; functions are defined before they are used.
    """
    for value in module.values():
        if isinstance(value, JITCallable) and value.__module__ == module["__name__"]:
            _ = value.cache_key
