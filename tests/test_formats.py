"""Every value of the three formats, against literal tables and torch's own types."""

import math

import pytest
import torch

from adallm import formats, nvfp4


def test_e2m1_values():
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert list(formats.E2M1_VALUES) == positive + [-value for value in positive]
    assert math.copysign(1, formats.E2M1_VALUES[8]) == -1
    assert max(formats.E2M1_VALUES) == formats.E2M1_MAX


@pytest.mark.parametrize(
    ("values", "dtype"), [(formats.E4M3_VALUES, torch.float8_e4m3fn), (formats.E8M0_VALUES, torch.float8_e8m0fnu)]
)
def test_all_256_bytes_agree_with_torch(values, dtype):
    expected = torch.arange(256).to(torch.uint8).view(dtype).float()
    actual = torch.tensor(values)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(actual)[~actual.isnan()], torch.signbit(expected)[~expected.isnan()])


def test_limits():
    numbers = [value for value in formats.E4M3_VALUES if not math.isnan(value)]
    assert len(numbers) == 254
    assert max(numbers) == formats.E4M3_MAX
    assert min(value for value in numbers if value > 0) == formats.E4M3_MIN_SUBNORMAL
    assert formats.NVFP4_RANGE == 2688
    assert [byte for byte, value in enumerate(formats.E8M0_VALUES) if math.isnan(value)] == [255]


@pytest.mark.parametrize(
    ("function", "beyond"), [(formats.e2m1_value, 16), (formats.e4m3_value, 256), (formats.e8m0_value, 256)]
)
def test_codes_out_of_range(function, beyond):
    for code in (-1, beyond):
        with pytest.raises(ValueError, match=str(code)):
            function(code)


def test_bits_per_weight_is_what_is_stored():
    t = nvfp4.quantize(torch.ones(64, 1024))
    assert (t.nbytes - t.global_scale.nbytes) * 8 / t.shape.numel() == formats.BITS_PER_WEIGHT["nvfp4"]
    assert formats.BITS_PER_WEIGHT == {
        "bf16": 16, "fp8": 8, "nvfp4": 4.5, "mxfp4": 4.25, "int4-g128": 4.15625, "int4-g128-sym": 4.125
    }  # fmt: skip
