"""The FP8 reference: ``x = e4m3 * scale``, in plain torch.

``scale`` is FP32 and a multiplier. Three granularities:

- ``"tensor"``: one scale, ``[]``, as in a static scale for activations or a KV cache.
- ``"token"``: one for each vector along the last dimension of activations ``[..., K]``, so ``[..., 1]``.
- ``"row"``: one for each output channel of a weight ``[N, K]``, so ``[N, 1]``.

``"token"`` and ``"row"`` are the same arithmetic: ``x @ w.T`` sums over the last dimension of both, so either scale can
be taken out of the sum. There are two names because the first is computed in every forward pass and the second once.

Source: OCP 8-bit Floating Point v1.0 (E4M3: no infinity, largest number 448).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adallm.formats import E4M3_MAX
from adallm.rows import finite_amax, row_pieces

GRANULARITIES = ("tensor", "token", "row")
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class FP8Tensor:
    """A tensor ``[..., K]`` in E4M3.

    Attributes:
        data: float8_e4m3fn ``[..., K]``.
        scale: float32, ``[]`` or ``[..., 1]``, a multiplier.
    """

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.data.dtype != torch.float8_e4m3fn or self.data.dim() < 1:
            raise ValueError(f"data is {self.data.dtype} {list(self.data.shape)}; it must be float8_e4m3fn [..., K]")
        by_row = (*self.data.shape[:-1], 1)
        if self.scale.dtype != torch.float32 or self.scale.shape not in ((), by_row):
            raise ValueError(
                f"scale is {self.scale.dtype} {list(self.scale.shape)}; it must be float32, [] or {list(by_row)}"
            )

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that it stands for, ``[..., K]``."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + self.scale.nbytes

    def to(self, device: torch.device | str) -> FP8Tensor:
        """The same tensor on another device."""
        return FP8Tensor(self.data.to(device), self.scale.to(device))


def to_e4m3(x: Tensor) -> Tensor:
    """The E4M3 number nearest to each value, ties to even, saturating at +-448; NaN stays NaN.

    The clamp comes first because what torch does past 448 depends on its version: 2.11 gives NaN, 2.13 saturates.
    """
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


@torch.no_grad()
def quantize(x: Tensor, *, granularity: str = "tensor", scale: Tensor | float | None = None) -> FP8Tensor:
    """``scale = amax / 448`` (1 where that is 0), ``data = E4M3(x / scale)``, in FP32.

    Works through the rows in pieces: beside input and output it needs a few MB.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32, contiguous or not.
        granularity: ``"tensor"``, ``"token"`` or ``"row"``; amax is taken over the tensor or over the last dimension.
        scale: to use in place of amax / 448, a float or a float32 tensor, ``[]`` for ``"tensor"`` and ``[..., 1]`` for
            the others. Values beyond 448 times it saturate.

    Raises:
        ValueError: a dtype or granularity that is not supported; a NaN or infinity, with its index; no element and no
            ``scale``; a ``scale`` of the wrong shape or not positive and finite.
    """
    if x.dtype not in INPUT_DTYPES or x.dim() < 1:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; supported: bfloat16, float16, float32 [..., K]")
    _check_granularity(granularity)
    amax = finite_amax(x) if x.numel() or scale is None else None
    by_row = (*x.shape[:-1], 1)
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
        shape = () if granularity == "tensor" else by_row
        if scale.shape != shape:
            raise ValueError(f"scale is {list(scale.shape)}; granularity {granularity!r} needs {list(shape)}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError("scale must be positive and finite")
    elif granularity == "tensor":
        scale = scale_of(amax)
    else:
        scale = torch.cat([scale_of(piece.abs().amax(-1)) for _, piece in row_pieces(x)]).view(by_row)

    data = torch.empty(x.shape[:-1].numel(), x.shape[-1], dtype=torch.float8_e4m3fn, device=x.device)
    for rows, piece in row_pieces(x):
        data[rows] = to_e4m3(piece.float() / (scale if scale.dim() == 0 else scale.reshape(-1, 1)[rows]))
    return FP8Tensor(data.view(x.shape), scale)


def dequantize(t: FP8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``data * scale`` in FP32, then ``dtype``: ``[..., K]``."""
    return t.data.float().mul_(t.scale).to(dtype)


def qdq(x: Tensor, granularity: str = "token") -> Tensor:
    """``E4M3(x / scale) * scale`` with ``scale = amax / 448``: quantize and dequantize, for a forward pass.

    Equal to ``dequantize(quantize(x, granularity=granularity), x.dtype)`` where that is defined. It never looks at the
    values on the host: a NaN, or an infinity, turns everything that shares its scale into NaN.

    Args:
        x: ``[..., K]``, bfloat16, float16 or float32; no element is allowed.

    Raises:
        ValueError: a granularity that is not supported.
    """
    _check_granularity(granularity)
    if x.numel() == 0:
        return x
    scale = scale_of(x.abs().amax() if granularity == "tensor" else x.abs().amax(-1, keepdim=True))
    # .float(): a 16-bit tensor over a 0-dim FP32 one is computed in 16 bits.
    return dequantize(FP8Tensor(to_e4m3(x.float() / scale), scale), x.dtype)


def scale_of(amax: Tensor) -> Tensor:
    """``amax / 448`` in FP32, 1 where that is 0."""
    # By a tensor: divided by a number, torch multiplies by its reciprocal on CUDA.
    scale = amax.float() / torch.full_like(amax, E4M3_MAX, dtype=torch.float32)
    return torch.where(scale == 0, 1.0, scale)


def _check_granularity(granularity: str) -> None:
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity {granularity!r}; supported: {', '.join(GRANULARITIES)}")
