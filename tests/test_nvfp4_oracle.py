"""The NVFP4 reference against exact rational arithmetic, on inputs that hypothesis chooses, and what follows from it.

The oracle knows one operation, rounding a fraction to the nearest number of a binary format, ties to even, and uses it
for FP32, FP16, BF16, E4M3 and E2M1 alike.
"""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from adallm.formats import E2M1_VALUES
from adallm.nvfp4 import LAYOUTS, dequantize, quantize, unpack

# The same examples in every run, and a slow machine is no failure.
settings = partial(
    hypothesis_settings, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

# (mantissa bits, exponent of the smallest normal number, largest number)
FP32 = (23, -126, Fraction(2**24 - 1) * 2**104)
BF16 = (7, -126, Fraction(2**8 - 1) * 2**120)
FP16 = (10, -14, Fraction(65504))
E4M3 = (3, -6, Fraction(448))
E2M1 = (1, 0, Fraction(6))
FORMATS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
CODES = {Fraction(value): code for code, value in enumerate(E2M1_VALUES[:8])}


def nearest(x: Fraction, fmt: tuple[int, int, Fraction]) -> Fraction | float:
    """The number of the format nearest to x >= 0, ties to even; infinity past the largest."""
    mantissa, smallest, largest = fmt
    if x == 0:
        return x
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent = max(exponent - (x < Fraction(2) ** exponent), smallest)
    step = Fraction(2) ** (exponent - mantissa)
    rounded = round(x / step) * step  # Python rounds a Fraction half to even
    return rounded if rounded <= largest else math.inf


def via_fp32(x: Fraction, dtype: torch.dtype) -> Fraction | float:
    """An operation of a 16-bit dtype: torch computes it in FP32 and rounds the result."""
    x = nearest(x, FP32)
    return x if x == math.inf else nearest(x, FORMATS[dtype])


def saturate(x: Fraction | float, fmt: tuple[int, int, Fraction]) -> Fraction:
    return fmt[2] if x > fmt[2] else min(nearest(x, fmt), fmt[2])


def oracle(rows: list[list[float]], layout: str, dtype: torch.dtype) -> tuple[list[list[int]], list[list[Fraction]]]:
    """Codes and block scales of a matrix of finite numbers, not all zero."""
    blocks = [[row[i : i + 16] for i in range(0, len(row), 16)] for row in rows]
    amax = Fraction(max(abs(value) for row in rows for value in row))
    if layout == "modelopt":
        g = nearest(amax / 2688, FP32)
    else:
        d = via_fp32(1 / amax, dtype)
        d = d if d == math.inf else via_fp32(d * 2688, dtype)
        d = Fraction(1) if d == math.inf else d
    codes, scales = [], []
    for row in blocks:
        codes.append([])
        scales.append([])
        for block in row:
            top = Fraction(max(map(abs, block)))
            if layout == "modelopt":
                scale = nearest(top / nearest(6 * g, FP32), FP32)
                scale = saturate(scale, E4M3) if scale else Fraction(1)
                step = nearest(scale * g, FP32)
            else:
                scale = saturate(nearest(via_fp32(top / 6, dtype) * d, FP32), E4M3) or Fraction(1, 8)
                step = nearest(scale / d, FP32)
            scales[-1].append(scale)
            for value in block:
                magnitude = abs(Fraction(value))
                quotient = nearest(magnitude / step, FP32) if step else math.inf
                # The sign of -0.0 is kept; a negative quotient that FP32 rounds to 0 loses it; 0/0 has code 7.
                negative = math.copysign(1, value) < 0 if value == 0 else value < 0 and quotient > 0
                if step == 0 and value == 0:
                    negative = False
                codes[-1].append(CODES[saturate(quotient, E2M1)] + 8 * negative)
    return codes, scales


def check(x: torch.Tensor, layout: str) -> None:
    try:
        t = quantize(x, layout=layout)
    except ValueError:
        # Only a global scale of 0 is refused, and the oracle has to agree.
        assert nearest(Fraction(float(x.float().abs().max())) / 2688, FP32) == 0
        return
    codes, scales = oracle(x.float().tolist(), layout, x.dtype)
    assert [[Fraction(s) for s in row] for row in t.scale.float().tolist()] == scales
    assert unpack(t.packed).tolist() == codes


def numbers(dtype: torch.dtype) -> st.SearchStrategy[float]:
    if dtype == torch.bfloat16:
        bits = st.integers(0, 0x7F7F) | st.integers(0x8000, 0xFF7F)
        return bits.map(lambda b: torch.tensor(b, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).item())
    return st.floats(width=16 if dtype == torch.float16 else 32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@settings(max_examples=50)
@given(data=st.data())
def test_any_numbers(dtype, layout, data):
    """Zeros of both signs, subnormals and the largest numbers side by side."""
    # A few distinct numbers in any order: blocks stay small to draw, and equal values meet often.
    palette = data.draw(st.lists(numbers(dtype), min_size=1, max_size=6))
    places = data.draw(st.lists(st.integers(0, len(palette) - 1), min_size=32, max_size=32))
    x = torch.tensor([palette[i] for i in places]).to(dtype).view(1, 32)
    assume(bool(x.any()))
    check(x, layout)


@st.composite
def weights(draw: st.DrawFn, dtype: torch.dtype) -> torch.Tensor:
    """[rows, K] with a magnitude, a spread between blocks and a share of zeros that hypothesis chooses."""
    rows, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    magnitude = draw(st.integers(-8, 8) if dtype == torch.float16 else st.integers(-60, 60))
    spread = draw(st.sampled_from([0, 2, 6, 12]))
    zeros = draw(st.sampled_from([0.0, 0.5, 0.95]))
    x = torch.randn(rows, blocks, 16, generator=generator)
    x = torch.ldexp(x, magnitude - spread * torch.rand(rows, blocks, 1, generator=generator))
    return x.mul_(torch.rand(x.shape, generator=generator) >= zeros).flatten(-2).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_weights(dtype, layout, data):
    x = data.draw(weights(dtype))
    assume(bool(x.any()))
    check(x, layout)


def test_ties():
    """A global scale of exactly 1 and block scales that are powers of two: every quotient is a multiple of 1/8."""
    x = torch.arange(-48, 48).repeat_interleave(8).view(8, 96) / 8
    x[:, ::16] = 6.0
    x[0, 0] = 2688.0
    check(x, "modelopt")
    assert quantize(x).global_scale == 1
    check(x, "compressed-tensors")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@settings(max_examples=30)
@given(data=st.data())
def test_quantizing_a_dequantized_tensor_gives_the_same_bytes(dtype, layout, data):
    """Holds where block scales are normal E4M3 numbers, dequantized to any dtype that can tell their products apart."""
    x = data.draw(weights(dtype))
    assume(bool(x.any()))
    t = quantize(x, layout=layout)
    scale = t.scale.float()
    assume(bool((scale >= 2.0**-6).all()) and bool(torch.isfinite(t.global_scale)))
    for to in (torch.float32, torch.bfloat16):
        again = quantize(dequantize(t, to), layout=layout, global_scale=t.global_scale)
        assert torch.equal(again.packed, t.packed)
        assert torch.equal(again.scale.float(), scale)
    if layout == "modelopt":
        again = quantize(dequantize(t))
        assert torch.equal(again.packed, t.packed)
        assert torch.equal(again.scale.float(), scale)
        torch.testing.assert_close(again.global_scale, t.global_scale, rtol=2.0**-22, atol=0)


def test_small_block_scales_are_not_idempotent():
    """1.5 * 2^-9 rounds up to 2^-8, so that 6 becomes 4 and would now get the scale 2^-9."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 2688.0, 9 * 2.0**-9
    t = quantize(x)
    assert t.scale.float().tolist() == [[448, 2.0**-8]]
    again = quantize(dequantize(t))
    assert again.scale.float().tolist() == [[448, 2.0**-9]]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_error_is_bounded_by_the_grid(dtype, data):
    """At most 1/6 of a block's amax (half of the step from 4 to 6), and the E4M3 rounding of its scale besides."""
    x = data.draw(weights(dtype))
    assume(bool(x.any()))
    t = quantize(x)
    assume(bool((t.scale.float() >= 2.0**-6).all()))
    error = (dequantize(t) - x.float()).abs().unflatten(-1, (-1, 16)).amax(-1)
    amax = x.float().abs().unflatten(-1, (-1, 16)).amax(-1)
    assert bool((error <= amax * (1 / 6) * (1 + 2.0**-4) * (1 + 2.0**-20)).all())
