"""The sm_89 PTX on the GPU that is here: Ada, or Hopper, whose driver compiles it for itself.

Triton would compile for the GPU it finds, so that the CUDA driver is asked directly, in torch's context and stream.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from adallm.sm89.build import Build, build, compiled, replaced

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)")
# Addresses and 64-bit integers are alike to the driver.
_CTYPES = {"u64": ctypes.c_int64, "u32": ctypes.c_int32, "f32": ctypes.c_float}
# Without asking for it, a block has no more dynamic shared memory.
_DEFAULT_SHARED = 48 * 1024
_SCRATCH = 2  # pointers that Triton adds at the end, for global and for profile scratch memory


def parameters(ptx: str, name: str) -> tuple[str, ...]:
    """Types of an entry's parameters: ``("u64", "u64", "u32", ...)``.

    Raises:
        ValueError: the PTX has no such entry.
    """
    for entry, body in _ENTRY.findall(ptx):
        if entry == name:
            return tuple(_PARAMETER.findall(body))
    raise ValueError(f"the PTX has no entry {name!r}")


@dataclass(frozen=True)
class SM89Kernel:
    """An entry of a loaded module.

    Attributes:
        name: of the entry.
        function: ``CUfunction``; the module stays loaded as long as the process.
        types: of its parameters.
        shared: dynamic shared memory of a block in bytes.
        threads: of a block.
        driver: ``cuda.bindings.driver``.
    """

    name: str
    function: Any
    types: tuple[str, ...]
    shared: int
    threads: int
    driver: ModuleType

    def launch(self, grid: Sequence[int], *args: Tensor | int | float) -> None:
        """Launch in torch's current stream.

        Args:
            grid: blocks along one to three dimensions.
            args: what the kernel takes at run time, in order; what is constant in the build is left out.

        Raises:
            ValueError: another number of arguments than the entry has.
            RuntimeError: the driver refuses.
        """
        if len(args) + _SCRATCH != len(self.types):
            raise ValueError(f"{self.name} takes {len(self.types) - _SCRATCH} arguments, not {len(args)}")
        values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args] + [0] * _SCRATCH
        held = [_CTYPES[kind](value) for kind, value in zip(self.types, values, strict=True)]
        # The driver copies the arguments before it returns.
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        x, y, z = (*grid, 1, 1)[:3]
        stream = self.driver.CUstream(torch.cuda.current_stream().cuda_stream)
        result = self.driver.cuLaunchKernel(
            self.function, x, y, z, self.threads, 1, 1, self.shared, stream, ctypes.addressof(addresses), 0
        )
        _values(self.driver, result, f"launching {self.name}")


def load(ptx: str, name: str, shared: int, *, threads: int) -> SM89Kernel:
    """Load PTX into torch's context.

    Args:
        shared: dynamic shared memory of a block in bytes.
        threads: of a block.

    Raises:
        ValueError: no cuda-bindings, or a GPU older than Ada.
        RuntimeError: the driver refuses.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        raise ValueError("running sm_89 PTX needs the package cuda-bindings") from None
    if (capability := torch.cuda.get_device_capability()) < (8, 9):
        raise ValueError(f"sm_89 PTX needs compute capability 8.9 or later; this GPU has {capability}")
    torch.empty(1, device="cuda")  # makes torch's context current
    types = parameters(ptx, name)
    (module,) = _values(driver, driver.cuModuleLoadData(ptx.encode() + b"\0"), f"loading the PTX of {name}")
    (function,) = _values(driver, driver.cuModuleGetFunction(module, name.encode()), f"finding {name}")
    if shared > _DEFAULT_SHARED:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        result = driver.cuFuncSetAttribute(function, attribute, shared)
        _values(driver, result, f"{name} with {shared} bytes of shared memory")
    return SM89Kernel(name, function, types, shared, threads, driver)


def _values(driver: ModuleType, result: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """What a driver call returns beside its code.

    Raises:
        RuntimeError: the code is an error.
    """
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{what}: {code.name}")
    return tuple(values)


@functools.cache
def _loaded(b: Build, device: int) -> SM89Kernel:
    kernel = compiled(b)
    metadata = kernel.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError(f"{metadata.name} wants scratch memory, and null is passed for it")
    return load(kernel.asm["ptx"], metadata.name, metadata.shared, threads=32 * metadata.num_warps)


def run(launcher: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``launcher(*args, **kwargs)`` with the sm_89 build of its kernel: ``run(matmul.launch, x, words, ...)``.

    Args:
        launcher: one of ``build.KERNEL``, with tensors on the current GPU.
    """

    def call(fn: JITFunction, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> CompiledKernel:
        b = build(fn, *args, **kwargs)
        given = dict(zip(fn.arg_names, args, strict=False)) | kwargs
        kernel = _loaded(b, torch.cuda.current_device())
        kernel.launch(grid, *(given[name] for name, kind in b.signature if kind != "constexpr"))
        return compiled(b)

    with replaced(launcher, call):
        return launcher(*args, **kwargs)
