"""The NVFP4 reference: codes, scales, shapes, defined corner cases and errors."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adallm import rows
from adallm.formats import E2M1_VALUES, E4M3_VALUES
from adallm.nvfp4 import LAYOUTS, NVFP4Tensor, dequantize, encode_e2m1, pack, quantize, unpack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIDPOINTS = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}  # midpoint: the even code beside it


def assert_same(a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    assert torch.equal(a.packed.cpu(), b.packed.cpu())
    assert torch.equal(a.scale.view(torch.uint8).cpu(), b.scale.view(torch.uint8).cpu())
    assert torch.equal(a.global_scale.cpu(), b.global_scale.cpu())
    assert (a.divisor is None) == (b.divisor is None)
    assert a.divisor is None or torch.equal(a.divisor.cpu(), b.divisor.cpu())
    assert a.shape == b.shape


# Codes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_encodes_to_itself(dtype):
    assert encode_e2m1(torch.tensor(E2M1_VALUES, dtype=dtype)).tolist() == list(range(16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("midpoint", "even"), MIDPOINTS.items())
def test_midpoints_from_both_sides(midpoint, even, dtype):
    at = torch.tensor(midpoint, dtype=dtype)
    below, above = (torch.nextafter(at, torch.tensor(to, dtype=dtype)) for to in (0.0, 8.0))
    lower = list(MIDPOINTS).index(midpoint)
    codes = torch.stack([below, at, above])
    assert encode_e2m1(codes).tolist() == [lower, even, lower + 1]
    assert encode_e2m1(-codes).tolist() == [lower + 8, even + 8, lower + 9]


def test_all_bfloat16_numbers_take_the_nearest_code():
    x = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)
    x = x[x.isfinite()].double()
    distance = (x.abs().unsqueeze(-1) - torch.tensor(E2M1_VALUES[:8], dtype=torch.float64)).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    even = torch.arange(8) % 2 == 0
    magnitude = torch.where(nearest.sum(-1) > 1, (nearest & even).int().argmax(-1), nearest.int().argmax(-1))
    magnitude[x.abs() > 6] = 7  # so far out that FP64 makes the distances equal
    assert torch.equal(encode_e2m1(x.float()).long(), magnitude + 8 * torch.signbit(x))


def test_saturation_signed_zero_subnormal_and_nan():
    x = torch.tensor([6.5, 1e38, math.inf, 0.0, 2.0**-149, math.nan])
    assert encode_e2m1(x).tolist() == [7, 7, 7, 0, 0, 7]
    assert encode_e2m1(-x).tolist() == [15, 15, 15, 8, 8, 7]


def test_pack_all_bytes():
    byte = torch.arange(256).to(torch.uint8)
    codes = unpack(byte)
    assert codes.tolist() == [nibble for b in range(256) for nibble in (b & 15, b >> 4)]
    assert torch.equal(pack(codes), byte)
    assert torch.equal(pack(codes.view(8, 64).T.contiguous().T), byte.view(8, 32))
    assert unpack(byte.view(2, 4, 32)).shape == (2, 4, 64)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), "K even"),
        (torch.zeros(4, dtype=torch.int8), "int8"),
        (torch.tensor([1, 16], dtype=torch.uint8), "code is 16"),
    ],
)
def test_pack_refuses(codes, message):
    with pytest.raises(ValueError, match=message):
        pack(codes)


def test_unpack_refuses():
    with pytest.raises(ValueError, match="int32"):
        unpack(torch.zeros(4, dtype=torch.int32))


# Scales


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("global_scale", [1.0, 0.0137, 3e4])
def test_every_scale_with_every_code(global_scale, layout):
    """One row for each positive E4M3 scale, holding all 16 codes: dequantized exactly, and quantized back exactly."""
    scale = torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).unsqueeze(-1)
    packed = pack(torch.arange(16).to(torch.uint8)).expand(126, 8)
    g = torch.tensor(global_scale)
    t = NVFP4Tensor(packed, scale, g, g.reciprocal() if layout == "compressed-tensors" else None)
    step = torch.tensor(E4M3_VALUES[1:127], dtype=torch.float64)
    step = (step * g.double() if t.divisor is None else step / t.divisor.double()).float().double()
    expected = (torch.tensor(E2M1_VALUES, dtype=torch.float64) * step.unsqueeze(-1)).float()
    actual = dequantize(t)
    assert torch.equal(actual, expected)
    assert torch.equal(torch.signbit(actual), torch.signbit(expected))
    assert_same(quantize(actual, global_scale=g, layout=layout), t)
    for dtype in DTYPES:
        assert torch.equal(dequantize(t, dtype), expected.to(dtype))


def test_nan_scale_gives_nan():
    scale = torch.tensor([0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert dequantize(NVFP4Tensor(torch.zeros(8, dtype=torch.uint8), scale, torch.tensor(1.0))).isnan().all()


@pytest.mark.parametrize(("layout", "zero_scale"), [("modelopt", 1.0), ("compressed-tensors", 0.125)])
def test_blocks_of_zeros(layout, zero_scale):
    x = torch.zeros(4, 64)
    x[1, 20] = -3
    x[2] = -0.0
    t = quantize(x, layout=layout)
    assert t.scale.float()[0].tolist() == [zero_scale] * 4
    assert t.scale.float()[1].tolist() == [zero_scale, 448, zero_scale, zero_scale]
    assert unpack(t.packed)[2].tolist() == [8] * 64
    assert torch.equal(dequantize(t).sign(), x.sign())


def test_a_block_scale_that_underflows():
    """A block 2^-20 below the largest: the scale is 0, and whatever the codes are they stand for 0."""
    x = torch.full((1, 32), 1.0)
    x[0, 16:] = 2.0**-20
    x[0, 20:] *= -1
    x[0, 24:] = 0
    t = quantize(x)
    assert t.scale.float().tolist() == [[448, 0]]
    assert unpack(t.packed)[0, 16:].tolist() == [7] * 4 + [15] * 4 + [7] * 8
    assert torch.equal(dequantize(t)[0, 16:], torch.zeros(16))


def test_a_given_global_scale_saturates():
    x = torch.tensor([[100.0, -100.0, 1.0, 0.0] * 4])
    t = quantize(x, global_scale=2.0**-10)
    assert t.scale.float().item() == 448
    assert dequantize(t)[0, :4].tolist() == [2.625, -2.625, 0.875, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_global_scale_for_each_row(layout):
    x = torch.randn(2, 3, 64) * torch.logspace(-3, 3, 6).view(2, 3, 1)
    g = x.abs().amax(-1) / 2688
    t = quantize(x, global_scale=g, layout=layout)
    assert t.global_scale.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            row = quantize(x[i, j], global_scale=g[i, j], layout=layout)
            assert torch.equal(t.packed[i, j], row.packed)
            assert torch.equal(t.scale[i, j].float(), row.scale.float())
            assert torch.equal(dequantize(t)[i, j], dequantize(row))


def test_a_global_scale_as_a_number():
    x = torch.randn(4, 32)
    assert_same(quantize(x, global_scale=0.01), quantize(x, global_scale=torch.tensor(0.01)))


# Shapes, dtypes, strides


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16,), (1, 16), (7, 48), (3, 5, 32), (2, 3, 4, 16)])
@pytest.mark.parametrize("piece", [64, 1 << 18])
def test_strides_do_not_matter(shape, dtype, layout, piece, monkeypatch):
    """The same numbers as every other element, transposed and permuted, in many pieces or one."""
    x = torch.randn(shape).to(dtype)
    t = quantize(x, layout=layout)
    monkeypatch.setattr(rows, "_CPU_PIECE", piece)
    twice = torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)
    reverse = tuple(reversed(range(x.dim())))
    assert t.shape == x.shape
    assert_same(quantize(x, layout=layout), t)
    assert_same(quantize(twice[..., ::2], layout=layout), t)
    assert_same(quantize(x.permute(reverse).contiguous().permute(reverse), layout=layout), t)
    d = dequantize(t)
    strided = NVFP4Tensor(
        t.packed.unsqueeze(-1).repeat_interleave(2, -1)[..., 0], t.scale, t.global_scale, t.divisor, t.columns
    )
    assert torch.equal(dequantize(strided), d)
    matrix = quantize(x.reshape(-1, shape[-1]), layout=layout)
    assert torch.equal(dequantize(matrix).view(shape), d)


def test_a_parameter_is_neither_changed_nor_tracked():
    x = torch.nn.Parameter(torch.randn(8, 32))
    before = x.detach().clone()
    t = quantize(x)
    assert torch.equal(x.detach(), before)
    assert not t.global_scale.requires_grad
    assert not dequantize(t).requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100])
def test_padding(columns, layout):
    x = torch.randn(3, columns)
    if columns % 16:
        with pytest.raises(ValueError, match=f"{columns} columns, not a multiple of 16"):
            quantize(x, layout=layout)
    t = quantize(x, layout=layout, pad=True)
    assert t.shape == x.shape
    assert t.columns == (columns if columns % 16 else None)
    full = quantize(torch.nn.functional.pad(x, (0, -columns % 16)), layout=layout)
    assert torch.equal(t.packed, full.packed)
    assert torch.equal(dequantize(t), dequantize(full)[:, :columns])
    assert dequantize(t).is_contiguous()


def test_no_rows():
    t = quantize(torch.empty(0, 32), global_scale=1.0)
    assert t.packed.shape == (0, 16)
    assert t.scale.shape == (0, 2)
    assert dequantize(t).shape == (0, 32)
    with pytest.raises(ValueError, match="no element"):
        quantize(torch.empty(0, 32))


# Errors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value, layout):
    x = torch.zeros(3, 700, 512)  # several pieces
    x[1, 650, 77] = value
    with pytest.raises(ValueError, match=rf"x\[1, 650, 77\] is {value}"):
        quantize(x, layout=layout)
    with pytest.raises(ValueError, match=rf"x\[1, 650, 77\] is {value}"):
        quantize(x, layout=layout, global_scale=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_zeros(layout, dtype):
    x = torch.zeros(2, 32, dtype=dtype)
    with pytest.raises(ValueError, match=r"\[2, 32\] is all zeros"):
        quantize(x, layout=layout)
    assert not dequantize(quantize(x, layout=layout, global_scale=1.0)).any()


def test_amax_too_small():
    with pytest.raises(ValueError, match="underflows"):
        quantize(torch.full((1, 16), 2.0**-149))


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.zeros(16, dtype=torch.float64), {}, "float64"),
        (torch.zeros(16, dtype=torch.int32), {}, "int32"),
        (torch.tensor(1.0), {}, r"shape \[\]"),
        (torch.zeros(3, 0), {}, r"shape \[3, 0\]"),
        (torch.ones(16), {"scale_rule": "best"}, "scale_rule 'best'; supported: max, four_over_six"),
        (torch.ones(16), {"layout": "gguf"}, "layout 'gguf'; supported: modelopt, compressed-tensors"),
        (torch.ones(2, 16), {"global_scale": 0.0}, "positive and finite"),
        (torch.ones(2, 16), {"global_scale": -1.0}, "positive and finite"),
        (torch.ones(2, 16), {"global_scale": math.nan}, "positive and finite"),
        (torch.ones(2, 16), {"global_scale": torch.tensor([1.0, math.inf])}, "positive and finite"),
        (torch.ones(2, 16), {"global_scale": 1e-40, "layout": "compressed-tensors"}, "positive and finite"),
        (torch.ones(2, 16), {"global_scale": torch.ones(2, 1)}, r"global_scale is \[2, 1\]; it must be \[\] or \[2\]"),
    ],
)
def test_quantize_refuses(x, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(x, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(4, 16, dtype=torch.int8)}, "packed is torch.int8"),
        ({"packed": torch.zeros(4, 12, dtype=torch.uint8)}, "needs a scale"),
        ({"packed": torch.zeros(5, 16, dtype=torch.uint8)}, "needs a scale"),
        ({"scale": torch.zeros(4, 2)}, "float8_e4m3fn"),
        ({"scale": torch.zeros(4, 1).to(torch.float8_e4m3fn)}, "needs a scale"),
        ({"global_scale": torch.zeros(1)}, "global_scale is torch.float32"),
        ({"global_scale": torch.tensor(1.0, dtype=torch.bfloat16)}, "global_scale is torch.bfloat16"),
        ({"divisor": torch.zeros(3)}, "divisor is"),
        ({"columns": 16}, "columns 16"),
        ({"columns": 33}, "columns 33"),
    ],
)
def test_tensor_refuses(change, message):
    t = quantize(torch.randn(4, 32), layout="compressed-tensors")
    fields = {"packed": t.packed, "scale": t.scale, "global_scale": t.global_scale, "divisor": t.divisor}
    with pytest.raises(ValueError, match=message):
        NVFP4Tensor(**(fields | change))


def test_dequantize_refuses():
    with pytest.raises(ValueError, match=r"torch\.int8"):
        dequantize(quantize(torch.ones(16)), torch.int8)


def test_to_and_nbytes():
    t = quantize(torch.randn(4, 32), layout="compressed-tensors")
    assert_same(t.to("cpu"), t)
    assert t.nbytes == 4 * 16 + 4 * 2 + 4


# Memory

_MEMORY = """
import resource, torch
from adallm.nvfp4 import quantize, dequantize
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x = torch.empty(4096, 8192, dtype=torch.bfloat16).normal_()
batch = x.view(4, 1024, 8192).mT
t = quantize(x[:32])
dequantize(t)
quantize(batch[:1, :32])
before = peak()
kept = []
for name, run, size in (
    ("contiguous", lambda: quantize(x), 18),
    ("transposed", lambda: quantize(batch), 18),
    ("dequantize", lambda: dequantize(kept[0], torch.bfloat16), 64),
):
    kept.append(run())
    print(name, peak() - before - size)
    before = peak()
"""


def test_memory_is_output_and_a_few_megabytes():
    """64 MB in, 18 MB out; each line is what the peak grew by beside the output."""
    # Without the threshold malloc keeps freed pieces at whim, and the peak is no measure.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True, timeout=120,
        cwd=Path(__file__).parent.parent, env=environment,
    )  # fmt: skip
    extra = {name: float(size) for name, size in map(str.split, done.stdout.splitlines())}
    assert set(extra) == {"contiguous", "transposed", "dequantize"}
    assert max(extra.values()) < 12, extra


# CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_and_cpu_agree(dtype, layout):
    x = (torch.randn(3, 100, 256) * torch.logspace(-6, 2, 100).unsqueeze(-1)).to(dtype)
    x[0, :, :16] = 0
    t = quantize(x, layout=layout)
    for to in DTYPES:
        assert torch.equal(dequantize(t.to("cuda"), to).cpu(), dequantize(t, to))
    on_gpu = quantize(x.cuda(), layout=layout)
    # Dividing by a Python number goes by way of its reciprocal on CUDA: one step apart at most.
    torch.testing.assert_close(on_gpu.global_scale.cpu(), t.global_scale, rtol=2.0**-23, atol=0)
    if layout == "modelopt":
        assert_same(quantize(x.cuda(), global_scale=t.global_scale), quantize(x, global_scale=t.global_scale))
    else:
        steps = on_gpu.scale.view(torch.uint8).cpu().int() - t.scale.view(torch.uint8).int()
        assert steps.abs().max() <= 1


@pytest.mark.gpu
def test_cuda_codes_agree_on_all_bfloat16_numbers():
    x = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)
    assert torch.equal(encode_e2m1(x.cuda()).cpu(), encode_e2m1(x))


@pytest.mark.gpu
def test_cuda_errors_name_the_index():
    x = torch.ones(4, 32, device="cuda")
    x[2, 5] = math.nan
    with pytest.raises(ValueError, match=r"x\[2, 5\] is nan"):
        quantize(x)
