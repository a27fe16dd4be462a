"""``kernels/layout.py``: the kernels' order of a weight, and back."""

import dataclasses

import pytest
import torch

from adallm import nvfp4
from adallm.formats import E2M1_VALUES
from adallm.kernels import layout


def weight(n, k, *, spread=0):
    w = torch.randn(n, k) * torch.exp2(torch.randint(-spread, spread + 1, (n, k // 16, 1)).float()).expand(
        n, k // 16, 16
    ).reshape(n, k)
    return nvfp4.quantize(w)


def assert_same(a, b):
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 80), (64, 128), (32, 4112), (512, 1024)])
@pytest.mark.parametrize("spread", [0, 6])
@pytest.mark.parametrize("fp8", [False, True])
def test_there_and_back(n, k, spread, fp8, monkeypatch):
    monkeypatch.setattr(layout, "_PIECE", 1 << 14)  # several pieces
    t = weight(n, k, spread=spread)
    p = layout.from_checkpoint(t, fp8=fp8)
    packed, scale = layout.to_checkpoint(p)
    assert_same(packed, t.packed)
    assert_same(scale, t.scale)
    assert torch.equal(torch.ldexp(p.row_scale, p.shift.int()), t.global_scale.expand(n))


@pytest.mark.parametrize("fp8", [False, True])
def test_every_code_and_every_scale(fp8):
    scales = torch.arange(127, dtype=torch.uint8)
    scale = torch.cat([scales, scales.flip(0)]).repeat(16, 1)[:, :252].contiguous()
    packed = torch.arange(256, dtype=torch.uint8).repeat(16, 252 * 8 // 256 + 1)[:, : 252 * 8].contiguous()
    t = nvfp4.NVFP4Tensor(packed, scale.view(torch.float8_e4m3fn), torch.tensor(0.5))
    p = layout.from_checkpoint(t, fp8=fp8)
    back = layout.to_checkpoint(p)
    assert_same(back[0], packed)
    assert_same(back[1], t.scale)
    assert len(p.lost) == 16  # the block of each row whose scale is 0


def test_lost_codes_are_those_of_zero_scales_and_dequantize_to_zero():
    t = weight(32, 64)
    t.scale.view(torch.uint8)[3, 2] = 0
    t.scale.view(torch.uint8)[20] = 0
    p = layout.from_checkpoint(t)
    assert sorted(p.lost[:, 0].tolist()) == [3 * 4 + 2, *range(20 * 4, 20 * 4 + 4)]
    assert_same(layout.to_checkpoint(p)[0], t.packed)
    # All codes of row 20 are stored as 0: row = g + 8 rh, so tile 1, g = 4, rh = 0.
    words = p.words[1, 0].view(8, 4, 4)[4]
    rows = [0, 2]  # pairs 2 kh + rh of rh = 0
    for pair in rows:
        half = torch.stack((words & 0xFFFF, words >> 16 & 0xFFFF))
        assert not (half >> layout.MAGNITUDE_BIT[pair] & 7).any()


def test_a_word_is_the_fragment_of_its_lane():
    """Each code, alone in a tile, appears where the docstring says."""
    for row, column in [(0, 0), (5, 3), (8, 1), (13, 10), (2, 37), (15, 63)]:
        codes = torch.zeros(16, 64, dtype=torch.uint8)
        codes[row, column] = 0b1101
        words = layout._words(codes)[0, 0]
        rh, g = divmod(row, 8)
        kk, rest = divmod(column, 16)
        kh, rest = divmod(rest, 8)
        t, kl = divmod(rest, 2)
        j = 2 * kh + rh
        value = (1 << layout.SIGN_BIT[j] | 0b101 << layout.MAGNITUDE_BIT[j]) << 16 * kl
        assert int(words[4 * g + t, kk]) & 0xFFFFFFFF == value
        assert int((words != 0).sum()) == 1


def test_a_word_for_fp8_products_is_a_quarter_of_two_blocks():
    """Each code, alone in a tile, appears where the docstring says."""
    for row, column in [(0, 0), (5, 3), (8, 12), (13, 26), (2, 37), (15, 63)]:
        codes = torch.zeros(16, 64, dtype=torch.uint8)
        codes[row, column] = 0b1101
        words = layout._words_8(codes)[0, 0]
        rh, g = divmod(row, 8)
        t, rest = divmod(column, 16)
        i, j = divmod(rest, 4)
        value = 1 << 8 * j + (3 if rh else 7) | 0b101 << 4 * (4 * rh + j)
        assert int(words[4 * g + t, i]) & 0xFFFFFFFF == value
        assert int((words != 0).sum()) == 1
        assert layout.FP8_COLUMNS[16 * i + 4 * t + j] == column


def test_positions_in_a_half_do_not_overlap():
    bits = [1 << s for s in layout.SIGN_BIT] + [7 << m for m in layout.MAGNITUDE_BIT]
    assert sum(bits) == 0xFFFF
    assert sorted(layout.FP8_COLUMNS) == list(range(64))
    assert sorted(layout.SIGN_BIT_8) == list(range(3, 32, 4))


def test_row_scales_bring_the_largest_block_scale_to_the_top():
    t = weight(64, 256, spread=5)
    p = layout.from_checkpoint(t)
    largest = torch.ldexp(t.scale.float().amax(1), p.shift.int())
    assert bool(((largest > 224) & (largest <= 448)).all())
    byte = p.scales & 0xFF
    assert int(byte.max()) <= 30 << 3 | 7


def test_a_tiny_global_scale_stays_exact():
    t = weight(16, 64)
    t = dataclasses.replace(
        t, scale=(t.scale.float() / 64).to(torch.float8_e4m3fn), global_scale=torch.tensor(2.0**-126)
    )
    p = layout.from_checkpoint(t)
    assert int(p.shift.max()) == 0
    assert torch.equal(p.row_scale, t.global_scale.expand(16))
    assert_same(layout.to_checkpoint(p)[1], t.scale)


def test_bits_a_weight():
    t = weight(1024, 1024)
    p = layout.from_checkpoint(t)
    nbytes = sum(v.nbytes for v in vars(p).values() if isinstance(v, torch.Tensor))
    assert 8 * nbytes / (1024 * 1024) <= 4.6


@pytest.mark.parametrize(("n", "k"), [(24, 64), (8, 16)])
def test_rows_that_are_no_multiple_of_16(n, k):
    with pytest.raises(
        ValueError, match=rf"the weight is \[{n}, {k}\]; supported on a GPU: \[N, K\], both multiples of 16"
    ):
        layout.from_checkpoint(weight(n, k))


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xB8, 0xFF])
def test_scales_that_are_not_finite_or_negative(byte):
    t = weight(16, 64)
    t.scale.view(torch.uint8)[1, 1] = byte
    with pytest.raises(ValueError, match="a block scale is negative or NaN"):
        layout.from_checkpoint(t)


def test_e2m1_values_are_what_the_masks_assume():
    """Two exponent bits and one of mantissa, with subnormals: bits eem of a float with bias 1."""
    for code in range(8):
        exponent, mantissa = code >> 1, code & 1
        value = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert E2M1_VALUES[code] == value
