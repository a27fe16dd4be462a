"""Linear layers that run from NVFP4 weights: ``y = x @ dequantize(w).T + bias``.

The reference multiplies in FP32 and rounds once, to the dtype of ``x``. With ``activations="fp8"`` (W4A8), ``x`` is
first rounded to E4M3 with one FP32 scale for a token; the product of the rounded values is exact up to FP32 summation.
It keeps the weight exact, where the W4A8 kernels round it to E4M3 (``NVFP4Linear``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adallm import fp8
from adallm.nvfp4 import INPUT_DTYPES, NVFP4Tensor, dequantize

ACTIVATIONS = ("bf16", "fp8")
# Of NVFP4Linear, which can choose.
NVFP4_ACTIVATIONS = (*ACTIVATIONS, "auto")


def fp32_product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` in FP32, never TF32: to compare with."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return x @ w.T
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class ReferenceLinear(nn.Module):
    """``y = x @ w.T + bias`` in FP32 arithmetic, for weights in any format.

    ``forward`` takes ``[..., K]`` in bfloat16, float16 or float32 and returns ``[..., N]`` of the same dtype.
    Subclasses say what the weight is and which activations there are; this class holds the arithmetic that all formats
    share, so that two formats differ in their weights and activations alone.
    """

    _ACTIVATIONS = ACTIVATIONS

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, activations: str) -> None:
        super().__init__()
        if activations not in self._ACTIVATIONS:
            raise ValueError(f"activations {activations!r}; supported: {', '.join(self._ACTIVATIONS)}")
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


class QuantizedLinear(ReferenceLinear):
    """Whose buffers change device, but not dtype, with the module: ``.to(torch.bfloat16)`` must not round scales."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        def moved(t: Tensor) -> Tensor:
            result = fn(t)
            return result if t is bias or result.dtype == t.dtype else t.to(result.device)

        bias = self.bias
        return super()._apply(moved, recurse)


class FP8Linear(QuantizedLinear):
    """A weight in E4M3 with an FP32 scale for each row, times activations in E4M3 with one for each token (W8A8).

    On a CPU it computes the reference. On a CUDA GPU, from sm_89 on, activations are quantized by our kernel, and the
    product is that of a library, in BF16, to which the bias is added after.

    Args:
        weight: ``data`` ``[N, K]``, N and K multiples of 16, and ``scale`` ``[N, 1]``, of ``fp8.quantize`` by row.

    Raises:
        ValueError: other sizes or scales.
    """

    def __init__(self, weight: fp8.FP8Tensor, bias: Tensor | None = None) -> None:
        n, k = weight.shape
        if n % 16 or k % 16 or weight.scale.shape != (n, 1):
            raise ValueError(
                f"the weight is {[n, k]} with scales {list(weight.scale.shape)}; supported: multiples of 16, a scale "
                "for each row"
            )
        super().__init__(k, n, bias, "fp8")
        self.register_buffer("data", weight.data)
        self.register_buffer("scale", weight.scale)

    def dense_weight(self) -> Tensor:
        return fp8.dequantize(fp8.FP8Tensor(self.data, self.scale))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        if x.dtype != torch.bfloat16 or x.shape[-1] != self.in_features or x.device != self.data.device:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)} on {x.device}; supported on a GPU: bfloat16 [..., {self.in_features}] "
                f"on {self.data.device}"
            )
        from adallm.kernels import ops

        tokens, of_tokens = torch.ops.adallm.fp8_tokens(x.reshape(-1, self.in_features), None, 0.0, False, True)
        out = x.new_empty(tokens.shape[0], self.out_features)
        ops.scaled_product(tokens, of_tokens, self.data, self.scale[:, 0], out)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


class NVFP4Linear(QuantizedLinear):
    """A linear layer whose only copy of the weight is the packed one.

    On a CPU it holds the checkpoint's tensors and computes the reference, expanding the weight in each call. On a CUDA
    GPU it holds the same numbers in the order of the kernels (``kernels/layout.py``, at most 4.6 bits a weight for the
    shapes of real models) and runs those. Moving the layer between devices converts it, exactly in both directions.

    W4A16: the products of 16-bit activations and exact weights are summed in FP32 and rounded once. W4A8: activations
    become ``x8 = E4M3(x / s)`` with ``s`` for a token, and a weight ``w8 = E4M3(e2m1 * scale * 2^shift * 2^-7)``, a
    power of two for each output row having brought its largest block scale into (224, 448]. The sums of ``x8 * w8`` are
    multiplied by ``s`` and ``global_scale * 2^7 * 2^-shift``. E2M1 times a scale has up to six significant bits and
    E4M3 four: ``w8`` is exact where the mantissa of the scale is 1, 1.25 or 1.5; for the other five, the magnitudes
    1.5, 3 and 6 round, by 4.8% at most. Products below 2^-6 of a range that ends at 21 round in steps of 2^-9.

    With ``activations="auto"`` it is W4A16 for few tokens and, on GPUs with FP8 cores, W4A8 for many
    (``kernels/choice.py``), by way of an expanded copy of the weight and a library. The weight is stored as for W4A16;
    on a CPU it is W4A16.

    Buffers on a CPU: ``packed`` uint8 ``[N, K/2]``, ``scale`` float8_e4m3fn ``[N, K/16]``, ``global_scale`` float32
    ``[]`` or ``[N]``, ``divisor``. On a GPU: ``words``, ``scales``, ``row_scale``, ``shift``, ``lost``, ``arrivals``,
    ``global_scale``, ``divisor``. On both: ``bias`` or None.
    """

    _ACTIVATIONS = NVFP4_ACTIVATIONS
    _KERNEL = ("words", "scales", "row_scale", "shift", "lost", "arrivals")

    def __init__(self, weight: NVFP4Tensor, bias: Tensor | None = None, *, activations: str = "bf16") -> None:
        if weight.packed.dim() != 2:
            raise ValueError(f"the weight is {list(weight.shape)}; it must be [N, K]")
        devices = {t.device for t in (weight.packed, weight.scale, weight.global_scale, bias) if t is not None}
        if len(devices) > 1:
            raise ValueError(f"packed, scale, global_scale and bias are on {sorted(map(str, devices))}; it must be one")
        super().__init__(weight.shape[1], weight.shape[0], bias, activations)
        self.columns = weight.columns
        for name in ("packed", "scale", "global_scale", "divisor"):
            self.register_buffer(name, getattr(weight, name))
        for name in self._KERNEL:
            self.register_buffer(name, None)
        self._how: Tensor | None = None
        self._convert()

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
            activations: ``"bf16"`` (W4A16: 16-bit activations as they come), ``"fp8"`` (W4A8) or ``"auto"``.

        Raises:
            ValueError: a shape, dtype or device that does not fit, or on a GPU a weight or card that the kernels do not
                serve; it names the tensor and what is supported.
        """
        return cls(NVFP4Tensor(packed, scale, global_scale), bias, activations=activations)

    @property
    def weight(self) -> NVFP4Tensor:
        """The packed weight, as the checkpoint has it."""
        if self.words is None:
            packed, scale = self.packed, self.scale
        else:
            from adallm.kernels import layout

            packed, scale = layout.to_checkpoint(self._kernel_form())
        return NVFP4Tensor(packed, scale, self.global_scale, self.divisor, self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer keeps: weight, scales and bias."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def path(self, m: int, dtype: torch.dtype = torch.bfloat16) -> str:
        """What would run ``m`` tokens of ``dtype``: "reference", "expand + library" or the kernel's configuration."""
        if self.words is None:
            return "reference"
        if self._in_fp8(m, dtype):
            return "expand + library, FP8"
        config, _ = self._plan(m, dtype)
        return "expand + library" if config is None else config.label

    def scratch_bytes(self, m: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a call with ``m`` tokens allocates on a GPU beside its output, freed when it returns."""
        if self.words is None:
            return 4 * self.out_features * self.in_features
        if self._in_fp8(m, dtype):
            return m * (self._kernel_columns + 4) + self.out_features * self._kernel_columns
        return self._plan(m, dtype)[1]

    def dense_weight(self) -> Tensor:
        return dequantize(self.weight)

    def forward(self, x: Tensor, x_scale: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """``[..., K]`` to ``[..., N]``.

        Args:
            x: bfloat16 or float16; on a CPU float32 too. On a GPU also float8_e4m3fn, with ``x_scale``, from
                ``kernels.quantize.quantize_tokens``, K padded to a multiple of 64: activations that another operation
                has quantized.
            x_scale: float32 ``[...]``.
            dtype: of the output, for float8_e4m3fn; bfloat16 by default. Otherwise it is that of ``x``.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        if self.words is None:
            if x_scale is not None or dtype is not None:
                raise ValueError("x_scale and dtype belong to float8_e4m3fn activations, which are for a GPU")
            if x.device != self.packed.device:
                raise ValueError(f"x is on {x.device} and the layer on {self.packed.device}")
            return super().forward(x)
        dtype = self._check(x, x_scale, dtype)
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        if self.columns is not None and x_scale is None:
            x = nn.functional.pad(x, (0, -shape[-1] % 16))
        out = torch.ops.adallm.nvfp4_linear(
            x,
            None if x_scale is None else x_scale.reshape(-1),
            self.words,
            self.scales,
            self.row_scale,
            self.shift,
            self.bias,
            self.arrivals,
            self._how,
            self.out_features,
            dtype,
        )
        return out.view(*shape[:-1], self.out_features)

    def _check(self, x: Tensor, x_scale: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
        """The output's dtype."""
        columns = self._kernel_columns if x.dtype == torch.float8_e4m3fn else self.in_features
        wanted = f"[..., {columns}] on {self.words.device}"
        if x.dim() < 1 or x.shape[-1] != columns or x.device != self.words.device:
            raise ValueError(f"x is {x.dtype} {list(x.shape)} on {x.device}; it must be {wanted}")
        if x.dtype != torch.float8_e4m3fn:
            if x.dtype not in (torch.bfloat16, torch.float16):
                raise ValueError(f"x is {x.dtype}; supported on a GPU: bfloat16, float16")
            if x_scale is not None or dtype is not None:
                raise ValueError("x_scale and dtype belong to float8_e4m3fn activations")
            return x.dtype
        if self.activations != "fp8":
            raise ValueError("x is float8_e4m3fn; that needs a layer with activations='fp8'")
        if x_scale is None or x_scale.dtype != torch.float32 or x_scale.shape != x.shape[:-1]:
            got = None if x_scale is None else f"{x_scale.dtype} {list(x_scale.shape)}"
            raise ValueError(f"x_scale is {got}; it must be float32 {list(x.shape[:-1])}, one for a token")
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {dtype}; supported: bfloat16, float16")
        return dtype or torch.bfloat16

    def _in_fp8(self, m: int, dtype: torch.dtype) -> bool:
        """Whether ``"auto"`` is W4A8 for ``m`` tokens."""
        if self.activations != "auto":
            return False
        from adallm.kernels import choice, ops

        return ops.in_fp8(m, dtype, self.bias is not None, choice.gpu(self.words.device.index))

    def _plan(self, m: int, dtype: torch.dtype) -> tuple[Any, int]:
        from adallm.kernels import choice, ops

        kind = "fp8" if self.activations == "fp8" else "fp16" if dtype == torch.float16 else "bf16"
        size = (m, self.out_features, self._kernel_columns)
        config = ops.chosen(*size, kind, dtype, self.bias is not None, choice.gpu(self.words.device.index))
        return config, ops.scratch_bytes(config, *size, kind)

    @property
    def _kernel_columns(self) -> int:
        """Of the tokens that are multiplied."""
        return self.in_features + -self.in_features % (64 if self.activations == "fp8" else 16)

    def _kernel_form(self) -> Any:
        from adallm.kernels import layout

        tensors = (self.words, self.scales, self.row_scale, self.shift, self.lost)
        columns = self.in_features + -self.in_features % 16
        return layout.Packed(*tensors, self.out_features, columns, fp8=self.activations == "fp8")

    def _convert(self) -> None:
        """Into the form of the device that the buffers are on."""
        if self.global_scale.is_cuda == (self.words is not None):
            return
        if self.global_scale.is_cuda:
            from adallm.kernels import choice, layout, ops

            choice.rows("fp8" if self.activations == "fp8" else "bf16", choice.gpu(self.packed.device.index))
            weight = NVFP4Tensor(self.packed, self.scale, self.global_scale)
            packed = layout.from_checkpoint(weight, fp8=self.activations == "fp8")
            self.packed = self.scale = None
            for name in ("words", "scales", "row_scale", "shift", "lost"):
                setattr(self, name, getattr(packed, name))
            self.arrivals = torch.zeros(choice.MAX_SPLIT_TILES, dtype=torch.int32, device=self.words.device)
            self._how = ops.described(self.activations, self.global_scale.expand(self.out_features))
        else:
            self.packed, self.scale = self.weight.packed, self.weight.scale
            for name in self._KERNEL:
                setattr(self, name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NVFP4Linear:
        super()._apply(fn, recurse)
        self._convert()
        return self
