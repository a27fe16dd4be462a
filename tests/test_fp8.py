"""The FP8 reference: every byte, every midpoint, the three granularities, errors, and QDQ for a forward pass."""

import math
from fractions import Fraction

import pytest
import torch

from adallm import rows
from adallm.fp8 import GRANULARITIES, FP8Tensor, dequantize, qdq, quantize, to_e4m3

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POSITIVE = torch.arange(127).to(torch.uint8)  # 0 to 448; 0x7F is NaN


def byte(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def test_every_byte_encodes_to_itself():
    all_bytes = torch.arange(256).to(torch.uint8)
    values = all_bytes.view(torch.float8_e4m3fn).float()
    assert torch.equal(byte(to_e4m3(values)), all_bytes)


def test_all_midpoints_from_both_sides():
    values = POSITIVE.view(torch.float8_e4m3fn).float()
    lower = POSITIVE[:-1]
    middle = (values[:-1] + values[1:]) / 2  # exact in FP32
    down, up = (torch.nextafter(middle, torch.tensor(to)) for to in (0.0, 1e3))
    for sign, bit in ((1, 0), (-1, 0x80)):
        assert torch.equal(byte(to_e4m3(sign * down)), lower | bit)
        assert torch.equal(byte(to_e4m3(sign * up)), lower + 1 | bit)
        assert torch.equal(byte(to_e4m3(sign * middle)), lower + lower % 2 | bit)


def test_all_bfloat16_numbers_against_fractions():
    x = torch.arange(1 << 15).to(torch.uint16).view(torch.bfloat16).float()
    x = x[x.isfinite()]
    expected = []
    for value in x.tolist():
        exponent = max(math.frexp(value)[1] - 1, -6)
        step = Fraction(2) ** (exponent - 3)
        expected.append(float(min(round(Fraction(value) / step) * step, Fraction(448))))
    assert to_e4m3(x).float().tolist() == expected
    assert (-to_e4m3(-x).float()).tolist() == expected


def test_saturation_signed_zero_and_nan():
    x = torch.tensor([449.0, 464.0, 480.0, 1e30, math.inf])
    assert (to_e4m3(x).float() == 448).all()
    assert (to_e4m3(-x).float() == -448).all()
    assert byte(to_e4m3(torch.tensor([0.0, -0.0]))).tolist() == [0, 0x80]
    assert to_e4m3(torch.tensor(math.nan)).float().isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(1,), (33,), (1, 7), (6, 40), (2, 3, 5)])
def test_formula(shape, granularity, dtype):
    x = (torch.randn(shape) * 3).to(dtype)
    t = quantize(x, granularity=granularity)
    amax = x.float().abs().amax() if granularity == "tensor" else x.float().abs().amax(-1, keepdim=True)
    assert t.shape == x.shape
    assert torch.equal(t.scale, amax / 448)
    assert torch.equal(byte(t.data), byte(to_e4m3(x.float() / t.scale)))
    assert torch.equal(dequantize(t), t.data.float() * t.scale)
    assert torch.equal(dequantize(t, torch.bfloat16), dequantize(t).bfloat16())
    assert torch.equal(qdq(x, granularity), dequantize(t, dtype))
    # Half a step of a mantissa of three bits, or half a subnormal step.
    bound = torch.maximum(x.float().abs() * 2.0**-4, t.scale * 2.0**-10) * (1 + 2.0**-20)
    assert ((dequantize(t) - x.float()).abs() <= bound).all()


def test_token_and_row_are_the_same_arithmetic():
    x = torch.randn(4, 32)
    a, b = (quantize(x, granularity=name) for name in ("token", "row"))
    assert torch.equal(byte(a.data), byte(b.data))
    assert torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantizing_a_dequantized_tensor_gives_the_same_bytes(granularity):
    x = torch.randn(16, 64) * torch.logspace(-20, 20, 16)[:, None]
    t = quantize(x, granularity=granularity)
    again = quantize(dequantize(t), granularity=granularity)
    assert torch.equal(byte(again.data), byte(t.data))
    torch.testing.assert_close(again.scale, t.scale, rtol=2.0**-22, atol=0)
    given = quantize(dequantize(t), granularity=granularity, scale=t.scale)
    assert torch.equal(byte(given.data), byte(t.data))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strides_and_pieces_do_not_matter(granularity, monkeypatch):
    x = torch.randn(4, 6, 32)
    t = quantize(x, granularity=granularity)
    monkeypatch.setattr(rows, "_CPU_PIECE", 64)
    for view in (x, x.mT.contiguous().mT, x.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        other = quantize(view, granularity=granularity)
        assert torch.equal(byte(other.data), byte(t.data))
        assert torch.equal(other.scale, t.scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_an_amax_that_underflows(granularity, dtype):
    for value in (0.0, -0.0, 2.0**-149):
        x = torch.full((2, 8), value).to(dtype)
        t = quantize(x, granularity=granularity)
        assert (t.scale == 1).all()
        assert not dequantize(t).any()
        assert torch.equal(torch.signbit(dequantize(t)), torch.signbit(x))
        assert not qdq(x, granularity).any()


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0)])
def test_a_given_scale_saturates(scale):
    t = quantize(torch.tensor([[1e6, -1e6, 896.0, 2.0]]), scale=scale)
    assert dequantize(t).tolist() == [[896, -896, 896, 2]]


def test_a_given_scale_for_each_row():
    x = torch.randn(2, 3, 8)
    scale = torch.rand(2, 3, 1) + 0.1
    t = quantize(x, granularity="token", scale=scale)
    assert torch.equal(byte(t.data), byte(to_e4m3(x / scale)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(granularity, value):
    x = torch.ones(3, 5, 8)
    x[1, 4, 6] = value
    for scale in (None, 1.0 if granularity == "tensor" else torch.ones(3, 5, 1)):
        with pytest.raises(ValueError, match=rf"x\[1, 4, 6\] is {value}"):
            quantize(x, granularity=granularity, scale=scale)
    out = qdq(x, granularity)
    assert out[1, 4].isnan().all()
    if granularity != "tensor":
        assert torch.equal(out[0], x[0])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_tokens(granularity):
    x = torch.empty(0, 8, dtype=torch.bfloat16)
    assert qdq(x, granularity).shape == x.shape
    with pytest.raises(ValueError, match="no element"):
        quantize(x, granularity=granularity)
    scale = 1.0 if granularity == "tensor" else torch.ones(0, 1)
    assert dequantize(quantize(x, granularity=granularity, scale=scale)).shape == x.shape


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.zeros(8, dtype=torch.float64), {}, "float64"),
        (torch.tensor(1.0), {}, r"\[\]"),
        (torch.ones(8), {"granularity": "block"}, "'block'; supported: tensor, token, row"),
        (torch.ones(2, 8), {"scale": torch.ones(2, 1)}, r"needs \[\]"),
        (torch.ones(2, 8), {"scale": 1.0, "granularity": "row"}, r"needs \[2, 1\]"),
        (torch.ones(2, 8), {"scale": torch.ones(2), "granularity": "row"}, r"needs \[2, 1\]"),
        (torch.ones(2, 8), {"scale": 0.0}, "positive and finite"),
        (torch.ones(2, 8), {"scale": math.nan}, "positive and finite"),
    ],
)
def test_quantize_refuses(x, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(x, **arguments)


def test_qdq_refuses():
    with pytest.raises(ValueError, match="'channel'"):
        qdq(torch.ones(2, 8), "channel")


@pytest.mark.parametrize(
    ("data", "scale", "message"),
    [
        (torch.ones(2, 8), torch.ones(()), "data is torch.float32"),
        (torch.ones(2, 8).to(torch.float8_e4m3fn), torch.ones(8), r"scale is torch\.float32 \[8\]"),
        (torch.ones(2, 8).to(torch.float8_e4m3fn), torch.ones((), dtype=torch.float16), "scale is torch.float16"),
    ],
)
def test_tensor_refuses(data, scale, message):
    with pytest.raises(ValueError, match=message):
        FP8Tensor(data, scale)


def test_to_and_nbytes():
    t = quantize(torch.randn(4, 32), granularity="row")
    assert torch.equal(dequantize(t.to("cpu")), dequantize(t))
    assert t.nbytes == 4 * 32 + 4 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_and_cpu_agree(granularity, dtype):
    x = torch.randn(8, 5, 256).to(dtype)
    t = quantize(x, granularity=granularity)
    other = quantize(x.cuda(), granularity=granularity, scale=t.scale.cuda())
    assert torch.equal(byte(other.data.cpu()), byte(t.data))
    assert torch.equal(dequantize(t.to("cuda")).cpu(), dequantize(t))
    # Dividing by a Python number goes by way of its reciprocal on CUDA: one step apart at most.
    torch.testing.assert_close(quantize(x.cuda(), granularity=granularity).scale.cpu(), t.scale, rtol=2.0**-23, atol=0)
