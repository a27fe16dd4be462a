"""The kernels as an Ada GPU runs them: every build read back, the parser, and the PTX on a GPU."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import types
from functools import partial

import pytest
import torch
from paged_step import E4M3, caches, last_slots, step
from triton.runtime.jit import JITFunction

from adallm.attention import paged_decode_reference
from adallm.kernels import choice, decode, decode_choice, matmul, write_kv
from adallm.kernels.expand import expand
from adallm.kernels.matmul import Config
from adallm.kernels.quantize import quantize_tokens
from adallm.paged import HEAD_SIZES, Shape
from adallm.sm89 import build, check, counts, driver, sass

CONFIGURATIONS = choice.configurations("sm_89")
DECODE = decode_choice.TABLES["sm_89"]
MMA = {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32", "fp8": "QMMA.16832.F32.E4M3.E4M3"}
DEVICE = "cuda"
DECODE_MMA = {"bf16": "HMMA.16816.F32.BF16", "fp8": "HMMA.16816.F32"}


@pytest.mark.slow
def test_every_build(monkeypatch):
    # One test, so that one process compiles them; and the other process does not interpret because this one does.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = counts.measured()
    products, decodes = ([c for c in found if c.kernel == name] for name in ("nvfp4_matmul", "paged_decode_kernel"))
    assert [(c.kind, c.config) for c in products] == CONFIGURATIONS
    of_table = {config for row in DECODE.values() for pair in row for config in pair}
    assert {c.config for c in decodes if c.kind.startswith("fp8")} == of_table
    assert len(decodes) == 7 * len(DECODE) * len(HEAD_SIZES)
    others = {
        "nvfp4_expand": 4,
        "fp8_tokens": 16,
        "silu_and_mul_kernel": 2,
        "add_rms_norm_kernel": 2,
        "write_kv_kernel": 9,
        "gather_kv_kernel": 6,
    }
    assert [c.kernel for c in found if c.config is None] == [name for name, n in others.items() for _ in range(n)]
    wrong = []
    for c in found:
        # Where warps share rows, each expands them, and in decode they may compute the same: a number counts several
        # times. Decode does the rest for 16 or 32 rows of logits, with all options at once in the dearest case.
        most = 60 if c in decodes else 12
        sane = 1.5 <= c.instr_per_weight <= most or c.kernel in [*others][1:]
        sane &= c.loop == c.alu + c.fma + c.tensor + c.memory + c.other
        mma = (DECODE_MMA[c.kind.split()[0]] if c in decodes else MMA[c.kind]) if c.config else ""
        mma += ", QMMA.16832.F32.E4M3.E4M3" * c.kind.endswith(build.FP8_QUERIES)
        # Of a decode step as many blocks are launched as are to be resident.
        blocks = c.config.programs if c in decodes else 1
        wrong += [
            f"{c.kernel} {c.kind} {c.config}: {what}"
            for what, right in {
                c.problem: not c.problem,
                f"{c.spills} bytes of spills": c.spills == 0,
                f"{c.shared} bytes of shared memory": c.shared <= 101376,
                f"{c.blocks_per_sm} blocks an SM": c.blocks_per_sm >= blocks,
                f"tensor-core instruction {c.mma!r}": c.mma == mma,
                f"{c.instr_per_weight} instructions a weight of {c.loop}": sane,
            }.items()
            if not right
        ]
    assert not wrong, "\n".join(wrong)
    # What Hopper's driver makes of the same PTX: it has no FP8 mma.sync and converts.
    for c, there in zip(found, counts.measured("sm_90"), strict=True):
        assert (there.kernel, there.kind, there.config, there.problem) == (c.kernel, c.kind, c.config, "")
        assert there.steps == c.steps
        assert not c.config or there.mma.startswith("HMMA.16816")
        assert c.kind != "fp8" or not c.config or there.loop > 1.3 * c.loop


def test_ptx_that_cannot_be_assembled():
    with pytest.raises(RuntimeError, match=r"ptxas failed: .*sm_10'"):
        sass.assembled(".version 8.4\n.target sm_89\n.address_size 64\n", "sm_10")


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("ls"))
    with pytest.raises(RuntimeError, match=r"adallm\.sm89 failed:\n.*ls"):
        counts.measured.__wrapped__()


LISTING = """
Resource usage:
 Common:
  GLOBAL:0
 Function nvfp4_matmul:
  REG:85 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:632 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
                                                                             /* 0x000e700000000800 */
        /*0010*/              @!P0 BRA 0x90 ;                                /* 0x00000a00ff017624 */
        /*0020*/                   LDG.E R2, [R4.64] ;                       /* 0x00000a00ff017624 */
        /*0030*/               @P1 BRA 0x20 ;                                /* 0x00000a00ff017624 */
        /*0040*/                   LDSM.16.M88.4 R8, [R3] ;                  /* 0x00000a00ff017624 */
        /*0050*/                   LOP3.LUT R6, R6, 0x7, RZ, 0xc0, !PT ;     /* 0x00000a00ff017624 */
        /*0060*/                   HFMA2.BF16_V2 R7, R6, R5, -RZ ;           /* 0x00000a00ff017624 */
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R10, R8 ;     /* 0x00000a00ff017624 */
        /*0080*/              @!P2 BRA 0x40 ;                                /* 0x00000a00ff017624 */
        /*0090*/                   EXIT ;                                    /* 0x00000a00ff017624 */
        /*00a0*/                   BRA 0xa0;                                 /* 0x00000a00ff017624 */
        /*00b0*/                   NOP;                                      /* 0x00000a00ff017624 */
"""


def test_instructions_end_where_the_kernel_does():
    found = sass.instructions(LISTING)
    assert len(found) == 10
    assert found[1] == (0x10, "BRA 0x90")
    assert found[-1] == (0x90, "EXIT")
    assert sass.registers(LISTING) == 85


def test_main_loop_is_the_one_with_tensor_core_instructions():
    loop = sass.main_loop(sass.instructions(LISTING))
    assert [sass.opcode(body) for body in loop] == ["LDSM", "LOP3", "HFMA2", "HMMA", "BRA"]
    assert sass.mma(loop) == ["HMMA.16816.F32.BF16"]
    assert sass.pipes(loop) == {"alu": 1, "fma": 1, "tensor": 1, "memory": 1, "other": 1}
    assert sass.main_loop(sass.instructions(LISTING.replace("HMMA", "FFMA"))) == []


def test_what_a_loop_does_in_one_step_of_many_is_left_out():
    over = LISTING.replace("LDSM.16.M88.4 R8, [R3] ;     ", "BRA 0x70 ;")
    assert over != LISTING
    assert len(sass.main_loop(sass.instructions(over))) == 5
    loop = sass.main_loop(sass.instructions(over), rare=True)
    assert [sass.opcode(body) for body in loop] == ["BRA", "HMMA", "BRA"]
    past_the_product = LISTING.replace("LDSM.16.M88.4 R8, [R3] ;     ", "BRA 0x80 ;")
    assert len(sass.main_loop(sass.instructions(past_the_product), rare=True)) == 5


def test_spills():
    assert sass.spill_bytes(LISTING) == 0
    assert sass.spill_bytes(LISTING.replace("LDG.E R2", "LDL.LU.64 R2").replace("LOP3.LUT", "STL")) == 12
    assert sass.spill_bytes(LISTING.replace("STACK:0", "STACK:40")) == 40


def example(x, y, z, count, rows, BLOCK, FAST):
    """A kernel's signature."""


def test_build_is_what_the_jit_specializes(monkeypatch):
    monkeypatch.setitem(example.__annotations__, "BLOCK", "tl.constexpr")
    monkeypatch.setitem(example.__annotations__, "FAST", "tl.constexpr")
    fn = JITFunction(example, do_not_specialize=["rows"])
    x = torch.empty(16, dtype=torch.float8_e4m3fn, device="meta")
    b = build.build(fn, x, None, 1e-6, 1, 32, BLOCK=64, FAST=False, num_warps=4)
    assert b.signature == (
        *(("x", "*fp8e4nv"), ("y", "constexpr"), ("z", "fp32"), ("count", "i32"), ("rows", "i32")),
        *(("BLOCK", "constexpr"), ("FAST", "constexpr")),
    )
    assert dict(b.constants) == {"y": None, "BLOCK": 64, "FAST": True}
    assert b.aligned == ("x",)
    assert b.options == (("num_warps", 4),)
    assert build.build(fn, x, None, 1e-6, 48, 32, BLOCK=64, FAST=False).aligned == ("x", "count")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        build.build(example, x)


def test_a_launcher_s_kernel_comes_back_after_an_error():
    kernel = matmul.nvfp4_matmul
    with contextlib.suppress(ZeroDivisionError), build.replaced(matmul.launch, lambda *args, **kwargs: None):
        assert matmul.nvfp4_matmul is not kernel
        raise ZeroDivisionError
    assert matmul.nvfp4_matmul is kernel


PTX = """
.visible .entry scale(
	.param .u64 .ptr .global .align 1 scale_param_0,
	.param .u32 scale_param_1,
	.param .f32 scale_param_2,
	.param .u64 .ptr .global .align 1 scale_param_3,
	.param .u64 .ptr .global .align 1 scale_param_4
)
.reqntid 128
"""


class FakeDriver(types.SimpleNamespace):
    """Reads the arguments of a launch as the CUDA driver does."""

    CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)

    def CUstream(self, handle):
        return handle

    def cuLaunchKernel(self, function, *given):
        *self.shape, self.stream, addresses, _ = given
        types_ = (ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_int64, ctypes.c_int64)
        pointers = (ctypes.c_void_p * 5).from_address(addresses)
        self.values = [kind.from_address(at).value for kind, at in zip(types_, pointers, strict=True)]
        return (self.code,)


def test_launch_passes_addresses_numbers_and_two_null_pointers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=7))
    assert driver.parameters(PTX, "scale") == ("u64", "u32", "f32", "u64", "u64")
    with pytest.raises(ValueError, match="no entry 'other'"):
        driver.parameters(PTX, "other")
    fake, x = FakeDriver(code=0), torch.zeros(4)
    kernel = driver.SM89Kernel("scale", object(), driver.parameters(PTX, "scale"), 4096, 128, fake)
    kernel.launch((3, 2), x, -5, 1.5)
    assert fake.values == [x.data_ptr(), -5, 1.5, 0, 0]
    assert fake.shape == [3, 2, 1, 128, 1, 1, 4096]
    assert fake.stream == 7
    with pytest.raises(ValueError, match="takes 3 arguments, not 2"):
        kernel.launch((3, 2), x, -5)
    fake.code = types.SimpleNamespace(name="CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(RuntimeError, match="launching scale: CUDA_ERROR_ILLEGAL_ADDRESS"):
        kernel.launch((3,), x, -5, 1.5)


def test_load_without_cuda_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ValueError, match="needs the package cuda-bindings"):
        driver.load(PTX, "scale", 0, threads=128)


INTERPRETED = """
from adallm.kernels import choice
from adallm.sm89 import check, driver
driver.run = lambda launcher, *args, **kwargs: launcher(*args, **kwargs)
for kind in ("bf16", "fp8"):
    config = [c for name, c in choice.configurations("sm_89") if name == kind and c.splits > 1][0]
    operands = check.Operands.random(kind, 5, 48, 256, copies=lambda nbytes: 2, device="cpu")
    for error, calls in check.checked(operands.first(3), config).values():
        assert 0 < error < 2e-3 and len(calls) == 2, (kind, error)
    operands.dense[7, 9] += 1
    try:
        check.checked(operands, config)
    except ValueError as error:
        assert "relative error" in str(error)
    else:
        raise AssertionError("a wrong product was accepted")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets, which needs a machine without a GPU")
def test_the_check_accepts_the_kernel_and_nothing_else():
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "config"), CONFIGURATIONS)
def test_sm89_ptx_multiplies_as_the_native_build_does(kind, config):
    n, k = 2 * config.n + 16, 5 * config.slices * config.k
    operands = check.Operands.random(kind, 2 * config.m + 3, n, k)
    for m in (1, config.m, len(operands.x)):
        compare(operands.first(m), config)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MMA)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 112, 720), (33, 16, 144)])
def test_sm89_ptx_with_awkward_shapes(kind, m, n, k):
    operands = check.Operands.random(kind, m, n, k)
    for config in dict.fromkeys(config for name, config in CONFIGURATIONS if name == kind and config.splits > 1):
        compare(operands, config)


def compare(operands: check.Operands, config: Config) -> None:
    outputs = {}
    for name, (out, calls) in check.runs(operands, config).items():
        calls[0]()
        assert operands.relative_error(out) <= check.LIMIT, name
        once = out.clone()
        # The counters of split blocks are zero again, and the order of the sums is always the same.
        calls[0]()
        assert torch.equal(out, once), name
        outputs[name] = out.float()
    difference = (outputs["sm_89"] - outputs["native"]).norm() / outputs["native"].norm()
    assert difference <= check.LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8"])
def test_sm89_ptx_of_the_expansion_and_the_quantizer(kind):
    p = check.Operands.random(kind, 1, 208, 704).packed[0]
    given = (p.words, p.scales, p.shift, p.n, p.k, build.DTYPES[kind])
    assert torch.equal(driver.run(expand, *given).float(), expand(*given).float())
    for k in (2048, 12288):
        x = torch.randn(5, k, dtype=build.DTYPES["bf16" if kind == "fp8" else kind], device="cuda")
        for ours, native in zip(driver.run(quantize_tokens, x), quantize_tokens(x), strict=True):
            assert torch.equal(ours.float(), native.float())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cache", "what"),
    [
        *((E4M3, what) for what in ("", build.ALL_OPTIONS, build.FP8_QUERIES, build.NEW_TOKENS)),
        (torch.bfloat16, ""),
        (torch.bfloat16, build.NEW_TOKENS),
    ],
)
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("queries", [1, 8])
def test_sm89_ptx_of_decode_attention(queries, head_size, cache, what):
    lengths = [0, 8, 300, 2000]
    given = step(lengths, q_heads=8, d=head_size, queries=queries, cache=cache)[:5]
    given = [x.to(DEVICE) for x in given]
    chosen = {"scale": head_size**-0.5, "fp8_queries": what == build.FP8_QUERIES}
    if what == build.ALL_OPTIONS:
        generator = torch.Generator(DEVICE).manual_seed(0)
        sinks, slopes = torch.rand(2, 8, generator=generator, device=DEVICE)
        k_scale, v_scale = torch.rand(2, *given[1].shape[:3], generator=generator, device=DEVICE) + 0.5
        chosen |= {"window": 700, "soft_cap": 20.0, "sinks": sinks, "alibi_slopes": slopes / 100}
        chosen |= {"k_scale": k_scale, "v_scale": v_scale}
    elif cache == E4M3:
        chosen |= {"k_scale": 0.75, "v_scale": 3.0}
    if what in (build.ALL_OPTIONS, build.NEW_TOKENS):
        new = torch.randn(2, 4, queries, 2, head_size, device=DEVICE).bfloat16()
        slots = last_slots(given[3], lengths, [queries] * len(lengths), given[1].shape[1]).to(DEVICE)
        chosen |= {"k": new[0], "v": new[1], "slot_mapping": slots}
    expected = paged_decode_reference(*given, **chosen)
    outputs = [decoded(launch, given, chosen) for launch in (partial(driver.run, decode.launch), decode.launch)]
    for out in outputs:
        assert (out.float() - expected).norm() / expected.norm() <= 5e-3
    assert (outputs[0].float() - outputs[1].float()).norm() / expected.norm() <= 5e-3


def decoded(launch, given, options):
    """With the configuration that an Ada card has, on as many SMs as are here."""
    q, k_cache, *_ = given
    shape, out = Shape.of(q, k_cache), torch.full_like(q, torch.nan)
    programs = decode_choice.programs(shape, k_cache.itemsize, choice.GPU("sm_89", choice.gpu(q.device.index).sms, ""))
    parts = torch.full((decode_choice.workspace_floats(shape, programs),), torch.nan, device=DEVICE)
    arrivals = torch.zeros(3 * programs, dtype=torch.int32, device=DEVICE)
    config = decode_choice.choose(shape, k_cache.itemsize, "sm_89")
    for _ in range(2):
        launch(*given, out, shape, config, programs=programs, partial=parts, arrivals=arrivals, **options)
        assert not arrivals.any()
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["number", "token", "16 bits"])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_sm89_ptx_that_writes_keys_and_values(kind, head_size):
    k, v = torch.randn(2, 20, 3, head_size, device=DEVICE).mul(300).bfloat16()
    slots = torch.randperm(48, device=DEVICE)[:20]
    slots[5] = -1
    found = []
    for launch in (partial(driver.run, write_kv.launch), write_kv.launch):
        made = caches(3, 16, 3, head_size, dtype=torch.bfloat16 if kind == "16 bits" else E4M3, fill=0.0)
        made = [x.to(DEVICE) for x in made]
        scales = torch.zeros(2, 3, 16, 3, device=DEVICE)
        numbers = {"number": (0.7, 3.0), "token": scales, "16 bits": (1.0, 1.0)}[kind]
        launch(k, v, *made, slots, k_scale=numbers[0], v_scale=numbers[1])
        found.append([*(x.float() for x in made), scales])
    for ours, native in zip(*found, strict=True):
        assert torch.equal(ours, native)
    assert all(x.any() for x in found[0][: 3 if kind == "token" else 2])
