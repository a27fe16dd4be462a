"""The kernels as operators of torch, ``torch.ops.adallm``: ``nvfp4_linear``, two of what is often in front of it, and
``fp8_tokens``.

``nvfp4_linear_gated`` is ``nvfp4_linear`` of ``silu(gate_up[:, :K]) * gate_up[:, K:]``; ``nvfp4_linear_normed`` that of
the RMSNorm of ``x + residual``, and this sum. Where the product is one in FP8 they quantize what they compute: written
in 16 bits, and read again for it, it would cost a launch more.

They are registered with fake implementations, so that ``torch.compile`` sees shapes and dtypes and leaves the rest
alone, and they allocate their output and scratch through torch's allocator, so that CUDA graphs can hold them.

What differs from layer to layer but its tensors, whether it multiplies in FP8 and its global scales, is in ``how``, on
the CPU: a graph that was compiled for one layer is that of every layer of its size, of other checkpoints too.

``arrivals`` counts blocks that share an output tile and is zero again when a call ends: to a caller the operators
change nothing. Two calls on the same weight must not run at the same time on two streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adallm.kernels import choice, hopper, matmul
from adallm.kernels.dequant import VALUE_POWER
from adallm.kernels.expand import KINDS, expand
from adallm.kernels.layout import TILE_K, TILE_N, padded
from adallm.kernels.matmul import Config
from adallm.kernels.norm import add_rms_norm
from adallm.kernels.quantize import quantize_tokens
from adallm.kernels.silu import silu_and_mul

_LIBRARY = torch.library.Library("adallm", "FRAGMENT")
_LIBRARY.define(
    "nvfp4_linear(Tensor x, Tensor? x_scale, Tensor words, Tensor scales, Tensor row_scale, Tensor shift, "
    "Tensor? bias, Tensor arrivals, Tensor how, int n, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "nvfp4_linear_gated(Tensor gate_up, Tensor words, Tensor scales, Tensor row_scale, Tensor shift, Tensor? bias, "
    "Tensor arrivals, Tensor how, int n, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "nvfp4_linear_normed(Tensor x, Tensor residual, Tensor weight, float eps, Tensor words, Tensor scales, "
    "Tensor row_scale, Tensor shift, Tensor? bias, Tensor arrivals, Tensor how, int n, ScalarType dtype) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "fp8_tokens(Tensor x, Tensor? weight, float eps, bool gated, bool ordered) -> (Tensor, Tensor)",
)


def chosen(m: int, n: int, k: int, kind: str, dtype: torch.dtype, bias: bool, gpu: choice.GPU) -> Config | None:
    """The configuration, or None for the library, which rounds before it adds a bias, and gives BF16 of FP8."""
    config = choice.choose(m, n, k, kind, gpu)
    if config is None and (bias or (kind == "fp8" and dtype != torch.bfloat16)):
        row = [row for row in choice.rows(kind, gpu) if row.configs][-1]
        config = choice.pick(row, m, n, k, gpu.sms, fp8=kind == "fp8")
    return config


def in_fp8(m: int, dtype: torch.dtype, bias: bool, gpu: choice.GPU) -> bool:
    """Whether a weight that is stored for 16-bit products is multiplied in FP8, where that is left to us: with many
    tokens, by the library, which gives BF16 and adds no bias.
    """
    least = choice.FP8_FROM.get(gpu.family)
    return least is not None and m >= least and dtype == torch.bfloat16 and not bias


def scratch_bytes(config: Config | None, m: int, n: int, k: int, kind: str) -> int:
    """Bytes that a call allocates beside its output: sums of split tiles, FP8 tokens, or the expanded weight."""
    tokens = m * (k + 4) if kind == "fp8" else 0
    if config is None:
        return tokens + n * k * (1 if kind == "fp8" else 2)
    return tokens + 4 * matmul.workspace(config, m, n, fp8=kind == "fp8")


def launcher(config: Config) -> Callable[..., None]:
    """``matmul.launch`` or, for a configuration with ``overlap``, ``hopper.launch``."""
    return hopper.launch if config.overlap else matmul.launch


def _linear(
    x: Tensor,
    x_scale: Tensor | None,
    words: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    arrivals: Tensor,
    how: Tensor,
    n: int,
    dtype: torch.dtype,
    *,
    gated: bool = False,
    **norm: Any,
) -> Tensor:
    """Of ``x``, of the gated half of it, or of its RMSNorm, given what ``add_rms_norm`` is."""
    mode, alphas, stops = _read(how)
    fp8 = mode == "fp8"
    _check(x, x_scale, words, arrivals, n, fp8, gated=gated)
    m = x.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if not m:
        return out
    # The kernels load 16 bytes at a time, and know of it from a multiple of 16.
    if x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    if mode == "auto" and in_fp8(m, dtype, bias is not None, choice.gpu(x.device.index)):
        # The factor of the weights is in the scales of the tokens, which spares a launch.
        x, x_scale = quantize_tokens(x, gated=gated, **norm, ordered=True, times=VALUE_POWER.value)
        weight = expand(words, scales, shift, n, x.shape[1], torch.float8_e4m3fn, of_16=True)
        scaled_product(x, x_scale, weight, row_scale, out)
        return out
    if fp8 and x_scale is None:
        x, x_scale = quantize_tokens(x, gated=gated, **norm)
    elif gated:
        x = silu_and_mul(x)
    elif norm:
        x = add_rms_norm(x, **norm)
    config = chosen(m, n, x.shape[1], KINDS[x.dtype], dtype, bias is not None, choice.gpu(x.device.index))
    if config is not None:
        launcher(config)(x, words, scales, row_scale, out, config, x_scale=x_scale, bias=bias, arrivals=arrivals)
        return out
    library(x, words, scales, row_scale, shift, out, x_scale=x_scale, alphas=alphas, stops=stops)
    return out


def _linear_gated(gate_up: Tensor, words: Tensor, *args: Any) -> Tensor:
    return _linear(gate_up, None, words, *args, gated=True)


def _linear_normed(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, words: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _linear(x, None, words, *args, residual=residual, total=total, weight=weight, eps=eps), total


MODES = ("bf16", "fp8", "auto")


def described(mode: str, global_scale: Tensor) -> Tensor:
    """``how`` of a layer, float64 on the CPU: the mode, then of each run of rows that share a global scale that and
    where it ends, since a library's product takes one at a time.

    Args:
        mode: of ``MODES``.
        global_scale: float32 ``[N]``.
    """
    values, counts = torch.unique_consecutive(global_scale.cpu(), return_counts=True)
    runs = torch.stack((values.double(), counts.cumsum(0).double()), 1)
    return torch.cat((torch.tensor([MODES.index(mode)], dtype=torch.float64), runs.flatten()))


def _read(how: Tensor) -> tuple[str, list[float], list[int]]:
    mode, *runs = how.tolist()
    return MODES[int(mode)], runs[::2], [int(stop) for stop in runs[1::2]]


def _check(
    x: Tensor, x_scale: Tensor | None, words: Tensor, arrivals: Tensor, n: int, fp8: bool, *, gated: bool = False
) -> None:
    """Raise a ValueError for what the kernels would read or write out of bounds, or take for something else."""
    size = (words.shape[0], words.shape[1], n)
    if (error := _misfit(x.shape, x.dtype, *size, scaled=x_scale is not None, gated=gated)) is not None:
        raise ValueError(error)
    if x_scale is not None and (not fp8 or x_scale.shape != x.shape[:1] or x_scale.dtype != torch.float32):
        raise ValueError(f"x_scale is {x_scale.dtype} {list(x_scale.shape)}; it must be float32 {list(x.shape[:1])}")
    if not x.device == words.device == arrivals.device or arrivals.numel() < choice.MAX_SPLIT_TILES:
        raise ValueError(
            f"x is on {x.device}, words on {words.device}, arrivals {list(arrivals.shape)} on {arrivals.device}; they "
            f"must be on one device, with {choice.MAX_SPLIT_TILES} arrivals"
        )


@functools.lru_cache(maxsize=1 << 14)
def _misfit(
    shape: torch.Size, dtype: torch.dtype, rows: int, columns: int, n: int, *, scaled: bool, gated: bool
) -> str | None:
    """What is wrong with the tokens, given the tiles of the words; None if nothing is."""
    wanted, halves = (TILE_N * rows, TILE_K * columns), 2 if gated else 1
    multiple = TILE_K if dtype == torch.float8_e4m3fn and scaled else 16
    if len(shape) != 2 or padded(n, shape[1] // halves) != wanted or shape[1] % (multiple * halves):
        name = "gate_up" if gated else "x"
        return f"{name} is {list(shape)} and n {n}; stored is a weight of {list(wanted)}, padding included"
    if dtype not in KINDS or (dtype == torch.float8_e4m3fn) != scaled:
        given = "with" if scaled else "without"
        return f"x is {dtype} {given} x_scale; supported: bfloat16, float16, or float8_e4m3fn with x_scale"
    return None


def library(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    x_scale: Tensor | None,
    alphas: list[float],
    stops: list[int],
) -> None:
    """``out = x @ w.T`` by a library's product of the expanded weight; with ``x_scale``, of E4M3.

    Args:
        alphas, stops: the global scales of the rows, and where each ends: the library takes one at a time.
    """
    n, k = out.shape[1], x.shape[1]
    weight = expand(words, scales, shift, n, k, x.dtype)
    if x_scale is not None:
        scaled_product(x, x_scale, weight, row_scale * VALUE_POWER.value, out)
        return
    start = 0
    for alpha, stop in zip(alphas, stops, strict=True):
        part = out[:, start:stop]
        # alpha is applied to the FP32 sums: rounded once, as everywhere.
        torch.addmm(part, x, weight[start:stop].t(), beta=0, alpha=alpha, out=part)
        start = stop


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, out: Tensor) -> None:
    """``out = (x * x_scale) @ (weight * scale).T``, E4M3 ``[M, K]`` and ``[N, K]``, scales ``[M]`` and ``[N]``."""
    torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale[:, None],
        scale_b=scale[None, :],
        out_dtype=out.dtype,
        # The fast sums of Hopper keep 14 bits, as in matmul.py.
        use_fast_accum=False,
        out=out,
    )


def _tokens(x: Tensor, weight: Tensor | None, eps: float, gated: bool, ordered: bool) -> tuple[Tensor, Tensor]:
    return quantize_tokens(x, weight=weight, eps=eps, gated=gated, ordered=ordered)


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the first argument."""

    @functools.wraps(op)
    def run(x: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return op(x, *args)

    return run


_LIBRARY.impl("nvfp4_linear", _on_its_device(_linear), "CUDA")
_LIBRARY.impl("nvfp4_linear_gated", _on_its_device(_linear_gated), "CUDA")
_LIBRARY.impl("nvfp4_linear_normed", _on_its_device(_linear_normed), "CUDA")
_LIBRARY.impl("fp8_tokens", _on_its_device(_tokens), "CUDA")


@torch.library.register_fake("adallm::nvfp4_linear", lib=_LIBRARY)
def _(x, x_scale, words, scales, row_scale, shift, bias, arrivals, how, n, dtype):
    return x.new_empty(x.shape[0], n, dtype=dtype)


@torch.library.register_fake("adallm::nvfp4_linear_gated", lib=_LIBRARY)
def _(gate_up, words, scales, row_scale, shift, bias, arrivals, how, n, dtype):
    return gate_up.new_empty(gate_up.shape[0], n, dtype=dtype)


@torch.library.register_fake("adallm::nvfp4_linear_normed", lib=_LIBRARY)
def _(x, residual, weight, eps, words, scales, row_scale, shift, bias, arrivals, how, n, dtype):
    return x.new_empty(x.shape[0], n, dtype=dtype), x.new_empty(x.shape)


@torch.library.register_fake("adallm::fp8_tokens", lib=_LIBRARY)
def _(x, weight, eps, gated, ordered):
    k = x.shape[1] // 2 if gated else x.shape[1]
    k = k if ordered else padded(1, k)[1]
    return x.new_empty(x.shape[0], k, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], dtype=torch.float32)
