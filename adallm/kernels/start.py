"""``kernel[grid](...)`` without the way on which Triton finds what it has compiled.

Outside CUDA graphs, as in a step that holds a long prompt, a layer is a dozen launches one after the other, and the
host may need longer for them than the GPU. What Triton specializes a kernel on is looked at here at least as finely:
types, integers that are 1 or multiples of 16, aligned pointers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], **constants: Any) -> Any:
    """``kernel[grid](*args, **constants)``.

    Args:
        args: what comes first in the kernel's signature and is no constant: tensors, integers, floats, None.
        constants: the rest of it, and options of Triton.

    Returns:
        The compiled kernel, or what Triton's interpreter, or a stand-in for the kernel, returns.
    """
    if not isinstance(kernel, JITFunction):
        return kernel[grid](*args, **constants)
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
    if (found := _compiled.get(key)) is None:
        compiled = kernel[grid](*args, **constants)
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return compiled
    compiled, last = found
    compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*args, *last)
    return compiled
