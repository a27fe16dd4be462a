"""What Triton's JIT would compile for a launch, compiled for sm_89 instead; no GPU is needed.

The launchers say what they launch: their kernel is replaced for a call by one that notes its arguments. On ``meta``
tensors that takes no memory, so that there is no second list of signatures to keep in step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from adallm.kernels import (
    choice,
    decode,
    decode_choice,
    expand,
    gather_kv,
    hopper,
    matmul,
    norm,
    ops,
    quantize,
    silu,
    write_kv,
)
from adallm.kernels.layout import TILE_K, TILE_N
from adallm.paged import HEAD_SIZES, Shape

# A launcher's module and the kernel that it launches.
KERNEL: dict[Callable[..., Any], tuple[ModuleType, str]] = {
    matmul.launch: (matmul, "nvfp4_matmul"),
    hopper.launch: (hopper, "nvfp4_matmul_hopper"),
    expand.expand: (expand, "nvfp4_expand"),
    quantize.quantize_tokens: (quantize, "fp8_tokens"),
    silu.silu_and_mul: (silu, "silu_and_mul_kernel"),
    norm.add_rms_norm: (norm, "add_rms_norm_kernel"),
    decode.launch: (decode, "paged_decode_kernel"),
    write_kv.launch: (write_kv, "write_kv_kernel"),
    gather_kv.launch: (gather_kv, "gather_kv_kernel"),
}
Config = matmul.Config | decode_choice.Config
# Of the kernels that have configurations.
CONFIG: dict[str, Callable[..., Config]] = {
    "nvfp4_matmul": matmul.Config,
    "nvfp4_matmul_hopper": matmul.Config,
    "paged_decode_kernel": decode_choice.Config,
}

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Build:
    """A kernel for given argument types.

    Attributes:
        fn: the JIT function.
        signature: type of each argument, ``"constexpr"`` where ``constants`` has its value.
        aligned: arguments that are multiples of 16.
        options: ``num_warps``, ``num_stages``, ``maxnreg``, as far as they are given.
    """

    fn: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int | None], ...]


def build(fn: JITFunction, *args: Any, **kwargs: Any) -> Build:
    """The build for these arguments, with ``FAST`` on and ``EARLY`` off, as Ada has them, and as the JIT specializes
    except that no integer is taken for a constant because it is 1.

    Raises:
        RuntimeError: ``fn`` belongs to Triton's interpreter.
    """
    if not isinstance(fn, JITFunction):
        raise RuntimeError("the kernels were imported with TRITON_INTERPRET set, which leaves nothing to compile")
    given = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    options = {name: given.pop(name) for name in [*given] if name not in fn.arg_names}
    if "FAST" in fn.arg_names:
        given["FAST"] = True
    if "EARLY" in fn.arg_names:
        given["EARLY"] = False
    signature, constants, aligned = {}, {}, []
    for parameter in fn.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if not parameter.do_not_specialize and isinstance(number, int) and number % 16 == 0:
            aligned.append(name)
    return Build(fn, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(sorted(options.items())))


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@functools.cache
def compiled(b: Build, capability: int = 89) -> triton.compiler.CompiledKernel:
    """``b`` for sm_89, or another GPU; Triton keeps it on disk for the next time."""
    kind = GluonASTSource if b.fn.is_gluon() else ASTSource
    source = kind(
        fn=b.fn,
        signature=dict(b.signature),
        constexprs={(b.fn.arg_names.index(name),): value for name, value in b.constants},
        attrs={(b.fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in b.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(b.options))


@contextlib.contextmanager
def replaced(launcher: Callable[..., Any], call: Callable[..., Any]) -> Iterator[None]:
    """Within, ``kernel[grid](*args, **kwargs)`` of a launcher is ``call(kernel, grid, *args, **kwargs)``."""
    module, name = KERNEL[launcher]
    fn = getattr(module, name)

    class Stand:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            return functools.partial(call, fn, grid)

    setattr(module, name, Stand())
    try:
        yield
    finally:
        setattr(module, name, fn)


@dataclass(frozen=True)
class Named:
    """A build and what a table says of it: the kernel, what it multiplies, writes, or quantizes and of which K, or the
    cache that it reads, and its configuration, where ``choice.py`` or ``decode_choice.py`` has one.
    """

    kernel: str
    kind: str
    config: Config | None
    build: Build


def products(family: str) -> list[Named]:
    """The build of every configuration in a family's table, with K a multiple of the step."""
    return [_named(ops.launcher(config), kind, product(kind, config)) for kind, config in choice.configurations(family)]


def builds() -> list[Named]:
    """Every build that a launch on an Ada GPU can ask for: of linear layers with K a multiple of the step; of attention
    each configuration for each head size, plain and with all options at once, for one number of heads and sequences.
    """
    found = products("sm_89")
    for kind, dtype in DTYPES.items():
        found.append(_named(expand.expand, kind, expanded(4096, 4096, dtype)))
    of_16 = expanded(4096, 4096, torch.float8_e4m3fn, of_16=True)
    found.append(_named(expand.expand, "fp8 of 16", of_16))
    for k in (4096, 8192, 16384, 32768):  # a row in one piece, and in the pieces of each size
        x, gated, weight = meta(16, k), meta(16, 2 * k), meta(k)
        found.append(_named(quantize.quantize_tokens, f"none {k}", {"x": x}))
        found.append(_named(quantize.quantize_tokens, f"rms_norm {k}", {"x": x, "weight": weight}))
        found.append(_named(quantize.quantize_tokens, f"silu_and_mul {k}", {"x": gated, "gated": True}))
        added = {"x": x, "residual": x, "total": x, "weight": weight}
        found.append(_named(quantize.quantize_tokens, f"add_rms_norm {k}", added))
    for kind in ("bf16", "fp16"):
        found.append(_named(silu.silu_and_mul, kind, {"x": meta(16, 8192, dtype=DTYPES[kind])}))
    for kind in ("bf16", "fp16"):
        x, weight = meta(16, 4096, dtype=DTYPES[kind]), meta(4096, dtype=DTYPES[kind])
        given = {"x": x, "residual": x, "total": x, "weight": weight, "eps": 1e-6}
        found.append(_named(norm.add_rms_norm, kind, given))
    for head_size, queries in itertools.product(HEAD_SIZES, (1, 8)):
        shape = Shape(4, queries, 8, 2, head_size, 100, 16)
        one = dataclasses.replace(shape, batch=1)
        for of, cache, what in (
            *((shape, "fp8", what) for what in ("", ALL_OPTIONS, FP8_QUERIES, NEW_TOKENS)),
            *((one, "fp8", what) for what in ("", NEW_TOKENS)),
            (shape, "bf16", ""),
        ):
            given = attention(of, cache, what)
            found.append(_named(decode.launch, attention_kind(of, cache, what), given))
    for head_size, kind in itertools.product((64, 128, 256), ("fp8", "fp8 token scales", "bf16")):
        cache, _, scales = kind.partition(" ")
        given = written(Shape(16, 1, 8, 8, head_size, 100, 16), cache, token_scales=bool(scales))
        found.append(_named(write_kv.launch, f"{kind} {head_size}", given))
    for head_size, kind in itertools.product((64, 128, 256), ("fp8", "bf16")):
        found.append(
            _named(gather_kv.launch, f"{kind} {head_size}", gathered(Shape(4, 1, 8, 8, head_size, 16, 16), kind))
        )
    return found


def noted(launcher: Callable[..., Any], given: dict[str, Any]) -> Build:
    """What a launch with these arguments compiles."""
    found = []

    def note(fn: JITFunction, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        found.append(build(fn, *args, **kwargs))

    with replaced(launcher, note):
        launcher(**given)
    (only,) = found
    return only


def warm_up(launcher: Callable[..., Any], given: dict[str, Any], *, early: bool = False) -> None:
    """Compile what a launch with these arguments would, for Triton's active driver and into its cache.

    Args:
        early: ``EARLY``, where the kernel has it, which is off on ``meta`` tensors.
    """

    def compile_only(fn: JITFunction, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        given_early = {"EARLY": early} if "EARLY" in fn.arg_names else {}
        fn.warmup(*args, grid=grid, **kwargs | given_early)

    with replaced(launcher, compile_only):
        launcher(**given)


def _named(launcher: Callable[..., Any], kind: str, given: dict[str, Any]) -> Named:
    return Named(KERNEL[launcher][1], kind, given.get("config"), noted(launcher, given))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that takes no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    tiles = n // TILE_N, -(-k // TILE_K)
    return meta(*tiles, 32, 4, dtype=torch.int32), meta(*tiles, 8, 2, dtype=torch.int32)


def expanded(n: int, k: int, dtype: torch.dtype, *, of_16: bool = False) -> dict[str, Any]:
    """What ``expand`` takes, on ``meta`` tensors."""
    words, scales = _weight(n, k)
    shift = meta(n, dtype=torch.uint8)
    return {"words": words, "scales": scales, "shift": shift, "n": n, "k": k, "dtype": dtype, "of_16": of_16}


def product(kind: str, config: matmul.Config, k: int | None = None) -> dict[str, Any]:
    """What a launcher takes, on ``meta`` tensors, for 16 output tiles. By default K is long enough for FP8 sums to be
    taken out of the tensor core on the way, where ``splits`` does not cut it.
    """
    m, n, k = config.m, 16 * config.n, k or 64 * config.slices * config.k
    words, scales = _weight(n, k)
    return {
        "x": meta(m, k, dtype=DTYPES[kind]),
        "words": words,
        "scales": scales,
        "row_scale": meta(n, dtype=torch.float32),
        "out": meta(m, n, dtype=torch.float16 if kind == "fp16" else torch.bfloat16),
        "config": config,
        "x_scale": meta(m, dtype=torch.float32) if kind == "fp8" else None,
        "arrivals": meta(16, dtype=torch.int32) if config.splits > 1 or config.programs else None,
    }


ALL_OPTIONS, FP8_QUERIES, NEW_TOKENS, ONE_SEQUENCE = "all options", "FP8 queries", "new tokens", "one sequence"


def attention_kind(shape: Shape, cache: str, what: str = "") -> str:
    """``"fp8 16x128"``: the cache, rows of a tile and columns of a head; ``"fp8 16x128 all options"``. For a single
    sequence there is another kernel.
    """
    what = f"{what} {ONE_SEQUENCE if shape.batch == 1 else ''}".strip()
    return f"{cache} {decode_choice.rows(shape)}x{shape.head_size} {what}".rstrip()


def attention(
    shape: Shape, cache: str, what: str = "", *, dtype: torch.dtype = torch.bfloat16, family: str = "sm_89"
) -> dict[str, Any]:
    """What the decode launcher takes, on ``meta`` tensors.

    Args:
        cache: of ``DTYPES``, as below.
        dtype: of the queries, or of keys and values below.
        what: ``FP8_QUERIES``, ``NEW_TOKENS``, or ``ALL_OPTIONS``: all but FP8 queries, with scales of each token and
            head, not a number.
    """
    table = (shape.batch, shape.blocks)
    q = meta(shape.batch, shape.queries, shape.q_heads, shape.head_size, dtype=dtype)
    stored, programs = meta(*_cache(shape), dtype=DTYPES[cache]), 64
    given = {
        "q": q,
        "k_cache": stored,
        "v_cache": stored,
        "block_table": meta(*table, dtype=torch.int32),
        "seq_lens": meta(shape.batch, dtype=torch.int32),
        "out": q,
        "shape": shape,
        "config": decode_choice.choose(shape, stored.itemsize, family),
        "programs": programs,
        "partial": meta(decode_choice.workspace_floats(shape, programs), dtype=torch.float32),
        "arrivals": meta(3 * programs, dtype=torch.int32),
        "scale": shape.head_size**-0.5,
        "fp8_queries": what == FP8_QUERIES,
    }
    if what in (ALL_OPTIONS, NEW_TOKENS):
        new = meta(shape.batch, shape.queries, shape.kv_heads, shape.head_size, dtype=dtype)
        given |= {"k": new, "v": new, "slot_mapping": meta(shape.batch * shape.queries, dtype=torch.int64)}
    if what == ALL_OPTIONS:
        of_head, of_token = meta(shape.q_heads, dtype=torch.float32), meta(*_cache(shape)[:3], dtype=torch.float32)
        given |= {"window": 100, "soft_cap": 30.0, "sinks": of_head, "alibi_slopes": of_head}
        given |= {"k_scale": of_token, "v_scale": of_token}
    return given


def _cache(shape: Shape) -> tuple[int, int, int, int]:
    return shape.blocks, shape.block_size, shape.kv_heads, shape.head_size


def written(
    shape: Shape, cache: str, *, dtype: torch.dtype = torch.bfloat16, token_scales: bool = False
) -> dict[str, Any]:
    """What the launcher of ``write_kv`` takes, on ``meta`` tensors: a token of each sequence."""
    new = meta(shape.batch, shape.kv_heads, shape.head_size, dtype=dtype)
    stored = meta(*_cache(shape), dtype=DTYPES[cache])
    slots = meta(shape.batch, dtype=torch.int64)
    given = {"k": new, "v": new, "k_cache": stored, "v_cache": stored, "slot_mapping": slots}
    if token_scales:
        given |= dict.fromkeys(("k_scale", "v_scale"), meta(*stored.shape[:3], dtype=torch.float32))
    return given


def gathered(shape: Shape, cache: str, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """What the launcher of ``gather_kv`` takes, on ``meta`` tensors: a block of each sequence."""
    out = meta(shape.batch * shape.block_size, shape.kv_heads, shape.head_size, dtype=dtype)
    stored = meta(*_cache(shape), dtype=DTYPES[cache])
    return {
        "k_cache": stored,
        "v_cache": stored,
        "block_table": meta(shape.batch, shape.blocks, dtype=torch.int32),
        "starts": meta(shape.batch + 1, dtype=torch.int32),
        "longest": shape.block_size,
        "k": out,
        "v": out,
        "k_scale": 1.0,
        "v_scale": 1.0,
    }
