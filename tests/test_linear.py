"""``linear.py``: the reference against arithmetic in FP64."""

import pytest
import torch

from adallm import fp8, nvfp4
from adallm.linear import ACTIVATIONS, DenseLinear, FP8Linear, NVFP4Linear


def layer(n=48, k=64, *, bias=False, activations="bf16", seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g)
    t = nvfp4.quantize(weight)
    b = torch.randn(n, generator=g) if bias else None
    return NVFP4Linear.from_tensors(t.packed, t.scale, t.global_scale, b, activations=activations), t, b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (7, 64), (2, 3, 64), (0, 64)])
def test_equals_the_product_in_fp64(dtype, bias, activations, shape):
    linear, t, b = layer(bias=bias, activations=activations)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    values = fp8.qdq(x.float()) if activations == "fp8" else x
    expected = values.double() @ nvfp4.dequantize(t).double().T + (0 if b is None else b.double())
    y = linear(x)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], 48)
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[dtype]
    assert (y.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_in_fp8(bias):
    g = torch.Generator().manual_seed(3)
    stored = fp8.quantize(torch.randn(48, 64, generator=g), granularity="row")
    b = torch.randn(48, generator=g) if bias else None
    linear = FP8Linear(stored, b).to(torch.bfloat16)
    assert (linear.data.dtype, linear.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    x = torch.randn(2, 3, 64, generator=g).bfloat16()
    expected = fp8.qdq(x.float()).double() @ fp8.dequantize(stored).double().T + (0 if b is None else b.double())
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() <= 2**-8 * expected.norm()
    with pytest.raises(ValueError, match=r"\[24, 64\].*multiples of 16, a scale for each row"):
        FP8Linear(fp8.quantize(torch.randn(24, 64), granularity="row"))
    with pytest.raises(ValueError, match=r"scales \[\].*a scale for each row"):
        FP8Linear(fp8.quantize(torch.randn(48, 64)))


def test_a_global_scale_for_each_row_equals_the_shards_apart():
    g = torch.Generator().manual_seed(2)
    shards = [nvfp4.quantize(torch.randn(16, 32, generator=g) * size) for size in (1.0, 0.01)]
    fused = NVFP4Linear.from_tensors(
        torch.cat([s.packed for s in shards]),
        torch.cat([s.scale for s in shards]),
        torch.cat([s.global_scale.expand(16) for s in shards]),
    )
    assert torch.equal(fused.dense_weight(), torch.cat([nvfp4.dequantize(s) for s in shards]))


def test_the_weight_is_kept_packed_only():
    linear, t, _ = layer(n=256, k=512)
    held = sum(b.nbytes for b in linear.buffers())
    assert held == t.nbytes
    assert held * 8 / (256 * 512) < 4.51


def test_a_change_of_dtype_is_for_the_bias_alone():
    linear, t, _ = layer(bias=True)
    linear.to(torch.bfloat16)
    assert linear.bias.dtype == torch.bfloat16
    assert torch.equal(linear.dense_weight(), nvfp4.dequantize(t))
    assert linear.half().scale.dtype == torch.float8_e4m3fn


def test_a_weight_that_needed_padding():
    weight = torch.randn(8, 20, generator=torch.Generator().manual_seed(3))
    t = nvfp4.quantize(weight, pad=True)
    x = torch.randn(3, 20)
    assert torch.equal(NVFP4Linear(t)(x), x @ nvfp4.dequantize(t).T)


def test_a_compressed_tensors_weight_keeps_its_divisor():
    t = nvfp4.quantize(torch.randn(8, 32, generator=torch.Generator().manual_seed(4)), layout="compressed-tensors")
    assert torch.equal(NVFP4Linear(t).dense_weight(), nvfp4.dequantize(t))


def test_dense_linear_is_the_plain_product():
    weight, x = torch.randn(8, 16).bfloat16(), torch.randn(4, 16).bfloat16()
    assert torch.equal(DenseLinear(weight)(x), (x.float() @ weight.float().T).bfloat16())


def test_bad_arguments_name_what_is_wrong():
    linear, t, _ = layer()
    with pytest.raises(ValueError, match=r"activations 'int8'; supported: bf16, fp8, auto"):
        NVFP4Linear.from_tensors(t.packed, t.scale, t.global_scale, activations="int8")
    with pytest.raises(ValueError, match=r"bias is \[3\]; it must be \[48\]"):
        NVFP4Linear.from_tensors(t.packed, t.scale, t.global_scale, torch.zeros(3))
    with pytest.raises(ValueError, match=r"x is torch.float32 \[2, 63\]"):
        linear(torch.zeros(2, 63))
    with pytest.raises(ValueError, match=r"x is torch.int64"):
        linear(torch.zeros(2, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"needs a scale of \[48, 4"):
        NVFP4Linear.from_tensors(t.packed, t.scale[:, :3].contiguous(), t.global_scale)
    with pytest.raises(ValueError, match=r"the weight is \[2, 24, 64\]"):
        NVFP4Linear.from_tensors(t.packed.view(2, 24, 32), t.scale.view(2, 24, 4), t.global_scale)


def test_auto_is_w4a16_on_a_cpu():
    (auto, *_), (exact, *_) = (layer(activations=activations) for activations in ("auto", "bf16"))
    x = torch.randn(600, 64).bfloat16()
    assert torch.equal(auto(x), exact(x))
    assert auto.path(600) == "reference"
