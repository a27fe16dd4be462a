"""Byte for byte what NVIDIA ModelOpt and compressed-tensors write, and the inputs on which they differ.

Both packages run here as they are. llm-compressor is not installed: what its memoryless min-max observer does, the
extremes of each group in the dtype of the weight, is in the fixture ``compressed_tensors``.
"""

import warnings
from collections.abc import Callable

import pytest
import torch

from adallm.nvfp4 import NVFP4Tensor, dequantize, quantize, unpack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP16_MAX = 65504.0

# [rows, 16 * n] in FP32, before the cast to the dtype under test.
INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "normal": lambda: torch.randn(64, 512),
    "weights": lambda: torch.randn(64, 512) * 0.02,
    "heavy-tailed": lambda: torch.randn(64, 512) / torch.randn(64, 512).abs().clamp(min=1e-3),
    "outliers": lambda: torch.randn(64, 512) * torch.where(torch.rand(64, 512) > 0.999, 1000.0, 1.0),
    "spread over 2^40": lambda: torch.randn(64, 512) * torch.exp2(-40 * torch.rand(64, 32)).repeat_interleave(16, -1),
    "spread within blocks": lambda: torch.randn(64, 512) * torch.exp2(-30 * torch.rand(64, 512)),
    "tiny": lambda: torch.randn(16, 256) * 1e-7,
    "tinier": lambda: torch.randn(16, 256) * 1e-36,
    "subnormal": lambda: torch.randint(-127, 128, (16, 256)) * 2.0**-133,
    "huge": lambda: (torch.randn(16, 256) * 1e38).clamp(-3e38, 3e38),
    "largest": lambda: torch.full((2, 32), torch.finfo(torch.bfloat16).max),
    "blocks of zeros": lambda: torch.randn(64, 32, 16).mul_(torch.rand(64, 32, 1) > 0.5).flatten(-2),
    "mostly zeros": lambda: torch.randn(64, 512).mul_(torch.rand(64, 512) > 0.98),
    "one number": lambda: torch.full((2, 32), 0.3),
    "one weight": lambda: torch.eye(4, 64) * -0.7,
    "ties": lambda: torch.cat((torch.full((32, 1), 6.0), torch.randint(-24, 25, (32, 255)) / 4), -1),
    "ties, global scale 1": lambda: torch.cat(
        (torch.full((1, 256), 2688.0), torch.randint(-24, 25, (15, 256)) / 4 * torch.exp2(torch.arange(15.0))[:, None])
    ),
    "huge beside subnormal": lambda: torch.exp2(torch.randint(-140, 125, (64, 512)).float()) * torch.randn(64, 512),
}


def make(name: str, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """The input in a dtype, without -0.0, on which both producers differ from the reference by design."""
    x = INPUTS[name]()
    if dtype == torch.float16:
        x = x.clamp(-FP16_MAX, FP16_MAX)
        if name in ("tiny", "tinier", "subnormal"):
            x = torch.randint(-1000, 1000, x.shape) * 2.0**-24
    return (x.to(dtype) + 0.0).to(device)


@pytest.fixture(scope="module")
def modelopt():
    """``quantize(x, global_scale=None) -> (packed, scale, global_scale)`` and ``dequantize(...)`` of ModelOpt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(
            "modelopt.torch.quantization.qtensor.nvfp4_tensor", reason="needs nvidia-modelopt", exc_type=ImportError
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fp4_compatible", lambda: False)  # asks for the GPU's capability

        class ModelOpt:
            @staticmethod
            def quantize(x, global_scale=None):
                q, scale, g = module.NVFP4QTensor.quantize(x.clone(), 16, None, global_scale)
                return q._quantized_data, scale, g

            @staticmethod
            def dequantize(t: NVFP4Tensor, dtype):
                q = module.NVFP4QTensor(t.shape, dtype, t.packed)
                return q.dequantize(dtype, scale=t.scale, double_scale=t.global_scale, block_sizes={-1: 16})

        yield ModelOpt


@pytest.fixture(scope="module")
def compressed_tensors():
    """``compress(x, divisor=None) -> (packed, scale, divisor)`` and ``decompress(...)`` of compressed-tensors."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])

    class CompressedTensors:
        @staticmethod
        def compress(x, divisor=None):
            groups = x.unflatten(-1, (-1, 16))
            low, high = groups.amin(-1), groups.amax(-1)
            amax = torch.maximum(high.max(), -low.min()).reshape(1)
            divisor = generate_gparam(-amax, amax) if divisor is None else divisor.reshape(1)
            scale, _ = calculate_qparams(low, high, scheme.weights, global_scale=divisor)
            state = {"weight": x, "weight_scale": scale, "weight_global_scale": divisor}
            state = NVFP4PackedCompressor.compress(state, scheme)
            return state["weight_packed"], state["weight_scale"], state["weight_global_scale"]

        @staticmethod
        def decompress(t: NVFP4Tensor):
            state = {"weight_packed": t.packed, "weight_scale": t.scale, "weight_global_scale": t.divisor.reshape(1)}
            return NVFP4PackedCompressor.decompress(state, scheme)["weight"]

    # Its rounding function is compiled at the first call; as written it does the same in less time.
    with torch.compiler.set_stance("force_eager"):
        yield CompressedTensors


def assert_bytes(t: NVFP4Tensor, packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> None:
    assert scale.dtype == torch.float8_e4m3fn
    assert torch.equal(t.scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(t.packed, packed)
    stored = t.global_scale if t.divisor is None else t.divisor
    assert torch.equal(stored.reshape(global_scale.shape), global_scale)


def check_modelopt(modelopt, x: torch.Tensor) -> None:
    t = quantize(x)
    assert_bytes(t, *modelopt.quantize(x))
    assert torch.equal(modelopt.dequantize(t, torch.float32), dequantize(t))


def check_compressed_tensors(compressed_tensors, x: torch.Tensor) -> None:
    t = quantize(x, layout="compressed-tensors")
    assert_bytes(t, *compressed_tensors.compress(x))
    assert torch.equal(compressed_tensors.decompress(t), dequantize(t, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_modelopt_writes_the_same_bytes(modelopt, name, dtype):
    check_modelopt(modelopt, make(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_compressed_tensors_writes_the_same_bytes(compressed_tensors, name, dtype):
    check_compressed_tensors(compressed_tensors, make(name, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modelopt_writes_the_same_bytes_on_cuda(modelopt, dtype):
    for name in INPUTS:
        check_modelopt(modelopt, make(name, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compressed_tensors_writes_the_same_bytes_on_cuda(compressed_tensors, dtype):
    for name in INPUTS:
        check_compressed_tensors(compressed_tensors, make(name, dtype, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16,), (3, 5, 32), (2, 3, 4, 16)])
def test_modelopt_other_shapes(modelopt, shape, dtype):
    x = torch.randn(shape).to(dtype)
    assert_bytes(quantize(x), *modelopt.quantize(x))


@pytest.mark.parametrize("columns", [1, 15, 17, 100])
def test_modelopt_pads_with_zeros(modelopt, columns):
    x = torch.randn(4, columns)
    assert_bytes(quantize(x, pad=True), *modelopt.quantize(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 3.7, 300.0, 1e6])
def test_modelopt_with_a_given_global_scale(modelopt, dtype, factor):
    """As for shards fused under the largest global scale; a smaller one saturates, which ModelOpt leaves to torch."""
    x = make("weights", dtype)
    g = x.float().abs().max() / 2688 * factor
    assert_bytes(quantize(x, global_scale=g), *modelopt.quantize(x, g))


def test_modelopt_with_a_global_scale_for_each_row(modelopt):
    x = torch.randn(8, 64) * torch.logspace(-3, 3, 8)[:, None]
    g = x.abs().amax(-1) / 2688
    assert_bytes(quantize(x, global_scale=g), *modelopt.quantize(x, g[:, None]))


@pytest.mark.parametrize("global_scale", [1.0, 0.0137, 7.7e-5, 2.3e3])
def test_block_scales_at_the_midpoints_of_e4m3(modelopt, compressed_tensors, global_scale):
    """Block amax within three steps of a rounding midpoint: one rounding more or less on the way would show."""
    g = torch.tensor(global_scale)
    numbers = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middle = ((numbers[:-1] + numbers[1:]) * 3 * g).view(torch.int32)
    amax = (middle[:, None] + torch.arange(-3, 4, dtype=torch.int32)).view(torch.float32)
    x = torch.nn.functional.pad(amax[..., None], (0, 15)).flatten(-2)
    assert_bytes(quantize(x, global_scale=g), *modelopt.quantize(x, g))
    t = quantize(x, global_scale=g, layout="compressed-tensors")
    assert_bytes(t, *compressed_tensors.compress(x, g.reciprocal()))


# Where the producers differ from the reference or from each other


def test_negative_zero(modelopt, compressed_tensors):
    """Both producers write -0.0 as 0. The reference writes 8, as it does for a negative number that rounds to zero."""
    x = torch.randn(4, 64)
    x[:, ::5] = -0.0
    x[:, 1::5] = -1e-6
    for layout, (packed, scale, _) in (
        ("modelopt", modelopt.quantize(x)),
        ("compressed-tensors", compressed_tensors.compress(x)),
    ):
        t = quantize(x, layout=layout)
        ours, theirs = unpack(t.packed), unpack(packed)
        assert torch.equal(t.scale.float(), scale.float())
        assert (ours[:, ::5] == 8).all()
        assert (theirs[:, ::5] == 0).all()
        assert (ours[:, 1::5] == 8).all()
        assert torch.equal(torch.where(x == 0, 0, ours), theirs)
        assert torch.equal(torch.signbit(dequantize(t)), torch.signbit(x))


def test_a_quotient_that_underflows(modelopt, compressed_tensors):
    """-2^-149 over a large step is -0.0 in FP32, which both write as 0; so does the reference, as x is not zero."""
    x = torch.full((1, 32), 1e30)
    x[0, 1] = -(2.0**-149)
    assert unpack(modelopt.quantize(x)[0])[0, 1] == 0
    assert unpack(compressed_tensors.compress(x)[0])[0, 1] == 0
    check_modelopt(modelopt, x)
    check_compressed_tensors(compressed_tensors, x)


def test_the_smallest_step_whose_quotients_underflow(modelopt):
    """-2^-149 over 2 is a tie that goes to -0.0; over 1.875 it is -2^-149 again, and has code 8."""
    x = torch.zeros(2, 16)
    x[:, 0] = torch.tensor([12.0, 11.25])
    x[:, 1] = -(2.0**-149)
    t = quantize(x, global_scale=1.0)
    assert t.scale.float().tolist() == [[2], [1.875]]
    assert unpack(t.packed)[:, 1].tolist() == [0, 8]
    assert_bytes(t, *modelopt.quantize(x, torch.tensor(1.0)))


def test_blocks_of_zeros_have_different_scales(modelopt, compressed_tensors):
    x = torch.randn(1, 32)
    x[:, 16:] = 0
    assert modelopt.quantize(x)[1].float().tolist() == [[448, 1.0]]
    assert compressed_tensors.compress(x)[1].float().tolist() == [[448, 0.125]]


def test_a_block_scale_below_e4m3(modelopt, compressed_tensors):
    """Amax / 2^20: ModelOpt divides by a scale of 0 and stores codes 7 and 15, compressed-tensors by 0.125."""
    x = torch.ones(1, 32)
    x[:, 16:] = torch.tensor([1.0, -1.0, 0.0, 1.0] * 4) * 2.0**-20
    packed, scale, _ = modelopt.quantize(x)
    assert scale.float().tolist() == [[448, 0]]
    assert unpack(packed)[0, 16:20].tolist() == [7, 15, 7, 7]
    packed, scale, _ = compressed_tensors.compress(x)
    assert scale.float().tolist() == [[448, 0.125]]
    assert unpack(packed)[0, 16:20].tolist() == [0, 8, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arithmetic_in_the_dtype_of_the_weight(modelopt, compressed_tensors, dtype):
    """In FP32 the two differ by rounding alone; in 16 bits the divisor has 8 or 11 bits, and block scales follow."""
    x = make("normal", dtype)
    _, scale, g = modelopt.quantize(x)
    _, other, d = compressed_tensors.compress(x)
    off = abs(float(g) * float(d) - 1)
    changed = int((scale.float() != other.float()).sum())
    if dtype == torch.float32:
        assert off < 2.0**-22
        assert changed <= scale.numel() // 1000
    else:
        assert off > 2.0**-14
        assert changed > 0


def test_fp16_divisor_overflows(compressed_tensors):
    """2688 / amax is past 65504 for an FP16 weight with amax below 0.041: compressed-tensors then divides by 1."""
    small, smaller = (torch.full((1, 16), value, dtype=torch.float16) for value in (0.042, 0.041))
    assert compressed_tensors.compress(small)[2] == 64000
    assert compressed_tensors.compress(smaller)[2] == 1
    t = quantize(smaller, layout="compressed-tensors")
    assert t.global_scale == t.divisor == 1
    # The scale, 0.041 / 6, is then a subnormal E4M3 number, 3 steps of 2^-9, and 0.041 becomes 0.035.
    assert t.scale.float().item() == 3 * 2.0**-9
    assert dequantize(t)[0, 0] == 6 * 3 * 2.0**-9


def test_modelopt_stores_a_zero_global_scale_where_the_reference_refuses(modelopt):
    for x in (torch.zeros(1, 16), torch.full((1, 16), 2.0**-149)):
        assert modelopt.quantize(x)[2] == 0
        with pytest.raises(ValueError, match="amax"):
            quantize(x)
