"""Linear layers that run from NVFP4 weights: ``y = x @ dequantize(w).T + bias``.

The reference multiplies in FP32 and rounds once, to the dtype of ``x``. With ``activations="fp8"`` (W4A8), ``x`` is
first rounded to E4M3 with one FP32 scale for a token; the product of the rounded values is exact up to FP32 summation.
"""

from __future__ import annotations

from torch import Tensor, nn

from adallm import fp8
from adallm.nvfp4 import INPUT_DTYPES, NVFP4Tensor, dequantize

ACTIVATIONS = ("bf16", "fp8")


class ReferenceLinear(nn.Module):
    """``y = x @ w.T + bias`` in FP32 arithmetic, for weights in any format.

    ``forward`` takes ``[..., K]`` in bfloat16, float16 or float32 and returns ``[..., N]`` of the same dtype.
    Subclasses say what the weight is; this class holds the arithmetic that all formats share, so that two formats
    differ in their weights and activations alone.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, activations: str) -> None:
        super().__init__()
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations {activations!r}; supported: {', '.join(ACTIVATIONS)}")
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias is {list(bias.shape)}; it must be [{out_features}]")
        self.in_features, self.out_features, self.activations = in_features, out_features, activations
        self.register_buffer("bias", bias)

    def dense_weight(self) -> Tensor:
        """The weight ``[N, K]`` in float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in INPUT_DTYPES or x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}; it must be [..., {self.in_features}] in bfloat16, float16 or float32"
            )
        values = fp8.qdq(x.float()) if self.activations == "fp8" else x.float()
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(values, self.dense_weight(), bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, activations={self.activations}"


class DenseLinear(ReferenceLinear):
    """A weight ``[N, K]`` held as it is, BF16 or the dequantized values of a simulated format (QDQ)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, activations: str = "bf16") -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias, activations)
        self.register_buffer("weight", weight)

    def dense_weight(self) -> Tensor:
        return self.weight.float()


class NVFP4Linear(ReferenceLinear):
    """A linear layer whose only copy of the weight is the packed one; it is expanded in each call.

    Buffers: ``packed`` uint8 ``[N, K/2]``, ``scale`` float8_e4m3fn ``[N, K/16]``, ``global_scale`` float32 ``[]`` or
    ``[N]``, ``divisor`` and ``bias`` or None.
    """

    def __init__(self, weight: NVFP4Tensor, bias: Tensor | None = None, *, activations: str = "bf16") -> None:
        if weight.packed.dim() != 2:
            raise ValueError(f"the weight is {list(weight.shape)}; it must be [N, K]")
        super().__init__(weight.shape[1], weight.shape[0], bias, activations)
        self.columns = weight.columns
        for name in ("packed", "scale", "global_scale", "divisor"):
            self.register_buffer(name, getattr(weight, name))

    @classmethod
    def from_tensors(
        cls,
        packed: Tensor,
        scale: Tensor,
        global_scale: Tensor,
        bias: Tensor | None = None,
        *,
        activations: str = "bf16",
    ) -> NVFP4Linear:
        """From the tensors of a checkpoint.

        Args:
            packed: uint8 ``[N, K/2]``, the even column in the low nibble.
            scale: float8_e4m3fn ``[N, K/16]``.
            global_scale: float32 multiplier, ``[]``, or ``[N]`` for layers fused from shards with different scales.
            bias: ``[N]`` or None.
            activations: ``"bf16"`` (W4A16: 16-bit activations as they come) or ``"fp8"`` (W4A8).

        Raises:
            ValueError: a shape or dtype that does not fit; it names the tensor and what is supported.
        """
        return cls(NVFP4Tensor(packed, scale, global_scale), bias, activations=activations)

    @property
    def weight(self) -> NVFP4Tensor:
        """The packed weight."""
        return NVFP4Tensor(self.packed, self.scale, self.global_scale, self.divisor, self.columns)

    def dense_weight(self) -> Tensor:
        return dequantize(self.weight)
