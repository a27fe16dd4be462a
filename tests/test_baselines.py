"""MXFP4 and INT4: against slow formulas of their own, and at the corners."""

import math
from fractions import Fraction

import pytest
import torch

from adallm import rows
from adallm.baselines import FORMATS, int4, mxfp4
from adallm.formats import BITS_PER_WEIGHT, E2M1_VALUES, INT4_GROUP, MXFP4_BLOCK

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = {"mxfp4": MXFP4_BLOCK, "int4-g128": INT4_GROUP, "int4-g128-sym": INT4_GROUP}


def slow_mxfp4(block: list[float]) -> list[float]:
    """In exact arithmetic, by distance to the eight magnitudes; a tie goes to the even code."""
    amax = Fraction(max(map(abs, block)))
    if amax == 0:
        return block
    exponent = amax.numerator.bit_length() - amax.denominator.bit_length()
    exponent -= amax < Fraction(2) ** exponent
    scale = Fraction(2) ** max(-127, min(127, exponent - 2))
    out = []
    for value in block:
        magnitude = abs(Fraction(value)) / scale
        code = min(range(8), key=lambda c: (abs(Fraction(E2M1_VALUES[c]) - magnitude), c % 2))
        out.append(math.copysign(float(Fraction(E2M1_VALUES[code]) * scale), value))
    return out


def slow_int4(group: list[float], *, symmetric: bool) -> list[float]:
    """In FP64; inputs that fall on a tie there alone are not used."""
    low, high = min(*group, 0.0), max(*group, 0.0)
    scale = max(high, -low) / 7.5 if symmetric else (high - low) / 15
    scale = float(torch.tensor(scale).clamp(min=2.0**-24).half())
    zero = 8 if symmetric else min(max(round(-low / scale), 0), 15)
    return [(min(max(round(value / scale) + zero, 0), 15) - zero) * scale for value in group]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 300.0])
def test_mxfp4_against_exact_arithmetic(magnitude, dtype):
    x = (torch.randn(8, 64) * magnitude * torch.exp2(-8 * torch.rand(8, 64))).to(dtype)
    expected = [slow_mxfp4(row[:32]) + slow_mxfp4(row[32:]) for row in x.tolist()]
    assert torch.equal(mxfp4(x, dtype=torch.float32), torch.tensor(expected))


def test_mxfp4_scale_is_the_floor_of_the_logarithm():
    """Amax from both sides of every power of two that FP32 has, subnormals and the largest number included."""
    powers = torch.exp2(torch.arange(-149, 128, dtype=torch.float64)).float()
    below = torch.nextafter(powers, torch.tensor(0.0))
    largest = torch.tensor([torch.finfo(torch.float32).max])
    amax = torch.cat((powers, below[1:], largest))
    x = torch.nn.functional.pad(torch.stack((amax, -amax / 3, amax / 7), -1), (0, 29))
    assert mxfp4(x).tolist() == [slow_mxfp4(block) for block in x.tolist()]


def test_mxfp4_saturates_ties_and_keeps_the_sign_of_zero():
    x = torch.tensor([7.99, -7.0, 6.5, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, 0.26, -0.25, -0.0, 0.0] + [0.0] * 18)
    out = mxfp4(x)
    assert out.tolist()[:12] == [6, -6, 6, 4, 4, 2, 2, 1, 1, 0, 0.5, 0]
    assert torch.signbit(out)[11:14].tolist() == [True, True, False]


def test_mxfp4_is_idempotent():
    """A block whose largest number was rounded up to the next power of two would get another scale, yet stays."""
    x = torch.randn(64, 256)
    once = mxfp4(x)
    assert torch.equal(mxfp4(once), once)
    assert torch.equal(mxfp4(x.bfloat16()), mxfp4(mxfp4(x.bfloat16())))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0.0, 2.0, -50.0])
def test_int4_against_a_loop(shift, dtype, symmetric):
    x = (torch.randn(6, 256) + shift).to(dtype)
    expected = [
        slow_int4(row[:128], symmetric=symmetric) + slow_int4(row[128:], symmetric=symmetric) for row in x.tolist()
    ]
    torch.testing.assert_close(int4(x, symmetric=symmetric, dtype=torch.float32), torch.tensor(expected))


def test_int4_grids():
    """A group that has all 16 levels comes back unchanged."""
    levels = torch.arange(16.0).repeat(8)
    for zero in range(16):
        x = (levels - zero) * 0.25
        assert torch.equal(int4(x), x)
    x = (levels - 8) * 0.25
    x[:8] = 7.5 * 0.25  # amax that makes the scale 0.25: it falls halfway between 7 and 8, and codes end at 7
    x = x.clamp(-7.5 * 0.25)
    out = int4(x, symmetric=True)
    assert torch.equal(out[x.abs() < 1.8], x[x.abs() < 1.8])
    assert out.max() == 7 * 0.25
    assert out.min() == -8 * 0.25


@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_error_is_half_a_step(symmetric):
    x = torch.randn(32, 256)
    groups = x.unflatten(-1, (-1, 128))
    span = groups.abs().amax(-1) / 7.5 if symmetric else (groups.amax(-1) - groups.amin(-1)) / 15
    error = (int4(x, symmetric=symmetric) - x).unflatten(-1, (-1, 128)).abs().amax(-1)
    # The zero point is an integer, so that one end of an asymmetric grid can be cut by another half step.
    assert (error <= span * (0.5 if symmetric else 1.0) * 1.02).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_scale_is_fp16(symmetric):
    x = torch.zeros(128)
    x[0] = 1.0
    assert int4(x, symmetric=symmetric)[0] == (7 if symmetric else 15) * float(
        torch.tensor(1 / (7.5 if symmetric else 15)).half()
    )
    with pytest.raises(ValueError, match="beyond FP16"):
        int4(x * 1e7, symmetric=symmetric)
    with pytest.raises(ValueError, match="beyond FP16"):
        int4(torch.tensor([3e38, -3e38] * 64), symmetric=symmetric)
    assert not int4(x * 1e-9, symmetric=symmetric).any()


@pytest.mark.parametrize("name", FORMATS)
def test_registry(name):
    assert name in BITS_PER_WEIGHT
    x = torch.randn(8, 256)
    error = ((FORMATS[name](x) - x).norm() / x.norm()).item()
    assert 0.08 < error < 0.13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_shapes_strides_and_dtypes(name, dtype, monkeypatch):
    x = torch.randn(3, 4, 256).to(dtype)
    out = FORMATS[name](x)
    assert out.dtype == dtype
    assert torch.equal(FORMATS[name](x, dtype=torch.float32).to(dtype), out)
    monkeypatch.setattr(rows, "_CPU_PIECE", 300)
    assert torch.equal(FORMATS[name](x.mT.contiguous().mT), out)
    assert torch.equal(FORMATS[name](x[1, 2]), out[1, 2])
    assert not FORMATS[name](torch.nn.Parameter(x)).requires_grad


@pytest.mark.parametrize("name", FORMATS)
def test_zeros(name):
    assert not FORMATS[name](torch.zeros(2, 128)).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(name, value):
    x = torch.ones(2, 3, 256)
    x[1, 2, 200] = value
    with pytest.raises(ValueError, match=rf"x\[1, 2, 200\] is {value}"):
        FORMATS[name](x)


@pytest.mark.parametrize("name", FORMATS)
def test_refuses(name):
    with pytest.raises(ValueError, match=f"{SIZES[name] + 1} columns, not a multiple of {SIZES[name]}"):
        FORMATS[name](torch.ones(2, SIZES[name] + 1))
    with pytest.raises(ValueError, match="float64"):
        FORMATS[name](torch.ones(2, 128, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\[\]"):
        FORMATS[name](torch.tensor(1.0))
    with pytest.raises(ValueError, match="no element"):
        FORMATS[name](torch.ones(0, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_and_cpu_agree(dtype):
    x = torch.randn(64, 256).to(dtype)
    assert torch.equal(mxfp4(x.cuda()).cpu(), mxfp4(x))
    for symmetric in (False, True):
        # Dividing by a Python number goes by way of its reciprocal on CUDA: a scale can differ by one FP16 step.
        cpu = int4(x, symmetric=symmetric).float()
        assert (int4(x.cuda(), symmetric=symmetric).cpu().float() - cpu).norm() < 1e-3 * cpu.norm()
