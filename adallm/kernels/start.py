"""``kernel[grid](...)`` without the way on which Triton finds what it has compiled.

Outside CUDA graphs, as in a step that holds a long prompt, a layer is a dozen launches one after the other, and the
host may need longer for them than the GPU. What Triton specializes a kernel on is looked at here at least as finely:
types, integers that are 1 or multiples of 16, aligned pointers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_compiled: dict[tuple[Any, ...], Any] = {}
_KINDS = {type(None): 2, int: 3, float: 4}


class Launch:
    """``kernel[grid](*args, *numbers, **constants)``, for many calls with the same numbers and constants.

    Args:
        numbers: integers and floats that follow ``args`` in the kernel's signature.
        constants: the rest of it, and options of Triton.
    """

    def __init__(self, kernel: Any, numbers: tuple[Any, ...], **constants: Any) -> None:
        self._kernel, self._numbers, self._constants = kernel, numbers, constants
        self._found: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any) -> Any:
        """Launch it.

        Args:
            args: what comes first in the signature: tensors on the current device, None, and numbers that the kernel is
                not specialized on. From call to call each has the same type and, being a tensor, dtype, or is None.

        Returns:
            The compiled kernel if it had to be found, else None; of Triton's interpreter, or of a stand-in for the
            kernel, what that returns.
        """
        if not isinstance(self._kernel, JITFunction):
            return self._kernel[grid](*args, *self._numbers, **self._constants)
        # Addresses, so that the driver is not asked about each tensor. An octal digit is what Triton tells apart.
        kinds, given = 1 + torch.cuda.current_device(), []
        for x in args:
            if isinstance(x, Tensor):
                x = x.data_ptr()
                kinds = kinds << 3 | (x & 15 == 0)
            else:
                kinds = kinds << 3 | _KINDS[type(x)]
            given.append(x)
        if (found := self._found.get(kinds)) is None:
            compiled = _find(self._kernel, grid, (*args, *self._numbers), self._constants)
            names = self._kernel.arg_names[len(args) + len(self._numbers) :]
            last = (*self._numbers, *(self._constants[name] for name in names))
            self._found[kinds] = compiled, last
            return compiled
        compiled, last = found
        compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*given, *last)
        return None


def _find(kernel: JITFunction, grid: tuple[int, ...], args: tuple[Any, ...], constants: Mapping[str, Any]) -> Any:
    """Launch it by what was found for another ``Launch``, or by Triton."""
    kinds = [
        (x.dtype, x.data_ptr() & 15 == 0)
        if isinstance(x, Tensor)
        # 1, a multiple of 16, or neither; beyond 32 bits.
        else (x == 1, x & 15 == 0, x + (1 << 31) >> 32)
        if isinstance(x, int)
        else type(x)
        for x in args
    ]
    key = (id(kernel), torch.cuda.current_device(), *kinds, *constants.items())
    if (compiled := _compiled.get(key)) is None:
        compiled = _compiled[key] = kernel[grid](*args, **constants)
    else:
        last = (constants[name] for name in kernel.arg_names[len(args) :])
        compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*args, *last)
    return compiled
