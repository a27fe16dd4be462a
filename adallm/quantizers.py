"""Choosing the scales of NVFP4: other numbers in the same format, for less error.

All rules give plain NVFP4. With ``q`` a code's E2M1 value, ``s`` a block's E4M3 scale, ``g`` the tensor's global scale,
and squares summed over a block of 16 weights ``w``:

=================  ================================================================================================
``max``            ``s = E4M3(amax / 6 g)``: the largest weight becomes 6. ``g = amax / (6 * 448)`` over the tensor.
``four_over_six``  that, or ``s = E4M3(amax / 4 g)`` where it gives less ``sum (w - q s g)^2``. So that this is in E4M3,
                   ``g = amax / (6 * 256)`` (arXiv 2512.02010; the codes of ModelOpt 0.47).
``mse``            the ``s`` among all of E4M3 with the least ``sum (w - q s g)^2``, and of ``GLOBAL_SCALES`` the ``g``
                   with the least sum over the tensor.
``imatrix``        as ``mse``, of ``sum h (w - q s g)^2`` with an importance ``h`` of each column: E[x^2] of the input.
``mse_fp8``        as ``mse``, of ``sum (w - E4M3(q s) g)^2``, and codes for that, as ``activations="fp8"`` multiplies.
=================  ================================================================================================

The search over ``s`` is exact, and short. Below ``6 s``, ``2 s`` has no value that ``s`` has not: so beyond the least
scale that cuts nothing off, seven more decide, or all up to 2^-5 where E4M3 lacks some halves. And a scale that by what
it cuts off alone is worse than the best so far is out, with all below it. Products in E4M3 are taken as normal numbers,
which those of a block 2^12 times smaller than the largest of its row may not be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adallm.formats import E2M1_MAX, E2M1_VALUES, E4M3_MAX, E4M3_VALUES, NVFP4_BLOCK, NVFP4_RANGE
from adallm.rows import row_pieces

RULES = ("max", "four_over_six", "mse", "imatrix", "mse_fp8")
SEARCHED = ("mse", "imatrix", "mse_fp8")
# Multiples of amax / 2688 that are tried: an octave in equal steps, since twice a global scale is half of all scales.
GLOBAL_SCALES = tuple(2 ** (i / 8) for i in range(8))
# What the largest weight of a tensor is in units of the global scale, for rules that do not search it.
RANGES = {"max": NVFP4_RANGE, "four_over_six": E2M1_MAX * 256}

_LARGEST = 0x7E  # the code of 448
_OCTAVE = 8  # codes of E4M3 in an octave
# On the CPU, whatever the default device is where this is imported.
_SCALES = torch.tensor(E4M3_VALUES[: _LARGEST + 1], device="cpu")
_EXPONENT = 0x7F800000  # of FP32
# Added and taken off again, rounds FP32 between 1 and 2 to halves.
_HALVES = 1.5 * 2**22


def _in_e4m3(x: Tensor) -> Tensor:
    """To four significant bits, ties to even: E4M3 without bounds."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 16).round(), exponent - 4)


# [127, 8]: what the FP8 cores multiply, for each code of a scale and each E2M1 magnitude.
PRODUCTS = _in_e4m3(_SCALES[:, None] * torch.tensor(E2M1_VALUES[:8], device="cpu"))


def check_importance(rule: str, importance: Tensor | None, columns: int) -> None:
    """Whether there is one for each column if the rule asks for it, and none if not.

    Raises:
        ValueError: there is not; or one is negative, infinite or NaN, or all are 0.
    """
    if (rule == "imatrix") != (importance is not None):
        what = "needs importance" if importance is None else "takes no importance"
        raise ValueError(f"scale_rule {rule!r} {what}; 'imatrix' alone weighs columns")
    if importance is None:
        return
    if importance.shape != (columns,) or not importance.dtype.is_floating_point:
        raise ValueError(f"importance is {importance.dtype} {list(importance.shape)}; it must be floating [{columns}]")
    bad = (~torch.isfinite(importance) | (importance < 0)).nonzero()
    if len(bad):
        column = int(bad[0])
        raise ValueError(f"importance[{column}] is {float(importance[column])}; it must be finite and not negative")
    if not importance.any():
        raise ValueError("importance is 0 for all columns")


@torch.no_grad()
def best_global_scale(tensors: Sequence[Tensor], amax: Tensor, rule: str, importance: Tensor | None = None) -> Tensor:
    """The ``g`` of ``GLOBAL_SCALES`` for a rule of ``SEARCHED``, with which tensors that share it have the least error.

    Args:
        tensors: ``[..., K]``, on one device; to a multiple of 16 columns zeros are appended.
        amax: ``[]``, the largest magnitude in them, finite and not so small that a 2688th is 0 in FP32.
        importance: of the columns of each tensor, those that are appended included.

    Returns:
        float32 ``[]``.
    """
    candidates = [(amax.double() / NVFP4_RANGE * factor).float() for factor in GLOBAL_SCALES]
    errors = torch.zeros(len(candidates), dtype=torch.float64, device=amax.device)
    for x in tensors:
        for _, piece in row_pieces(x):
            piece = torch.nn.functional.pad(piece.float(), (0, -piece.shape[-1] % NVFP4_BLOCK))
            for i, g in enumerate(candidates):
                errors[i] += block_scales(piece, rule, g, importance)[1].double().sum() * g.double().square()
    return candidates[int(errors.argmin())]


@torch.no_grad()
def block_scales(w: Tensor, rule: str, global_scale: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale of each block by a rule other than ``max``, and its error in units of the global scale.

    Args:
        w: float32 ``[R, K]``, K a multiple of 16.
        global_scale: float32 ``[]`` or ``[R, 1]``.
        importance: ``[K]``, for ``imatrix``.

    Returns:
        float8_e4m3fn and float32 ``[R, K/16]``.
    """
    rows, blocks = w.shape[0], w.shape[1] // NVFP4_BLOCK
    y = (w.abs() / global_scale).view(-1, NVFP4_BLOCK)
    of_column = None if importance is None else importance.to(y.device, torch.float32).view(blocks, NVFP4_BLOCK)
    if rule == "four_over_six":
        code, error = _six_or_four(y)
    else:
        code, error = _searched(y, of_column, products=rule == "mse_fp8")
    # As ModelOpt has a block of zeros.
    code = torch.where(y.amax(-1) > 0, code, 0x38).to(torch.uint8)
    return code.view(torch.float8_e4m3fn).view(rows, blocks), error.view(rows, blocks)


def codes_for_products(w: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """The codes for ``mse_fp8``: those whose products with the scale, in E4M3, are nearest.

    Args:
        w, global_scale: as in ``block_scales``.
        scale: float8_e4m3fn ``[R, K/16]``.

    Returns:
        uint8 ``[R, K]``.
    """
    y = (w.abs() / global_scale).view(-1, NVFP4_BLOCK)
    code = _nearest(y, PRODUCTS.to(w.device)[scale.view(torch.uint8).flatten().long()])
    return (code + 8 * torch.signbit(w).view_as(code)).to(torch.uint8).view_as(w)


def _six_or_four(y: Tensor) -> tuple[Tensor, Tensor]:
    amax, errors, found = y.amax(-1), _Errors(y), []
    for factor in (1.0, 1.5):
        scale = (amax * factor / E2M1_MAX).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        code = scale.view(torch.uint8).long().clamp_(min=1)
        found.append((code, errors(y, code, None)))
    (six, of_six), (four, of_four) = found
    return torch.where(of_four < of_six, four, six), torch.minimum(of_four, of_six)


def _searched(y: Tensor, of_column: Tensor | None, *, products: bool) -> tuple[Tensor, Tensor]:
    """Of ``[n, 16]`` magnitudes in units of the global scale: the best code of E4M3 for each block, and its error."""
    errors = (_ProductErrors if products else _Errors)(y)
    limits = (PRODUCTS[:, -1].contiguous() if products else _SCALES * E2M1_MAX).to(y.device)
    weight = None if of_column is None else of_column.repeat(len(y) // len(of_column), 1)
    amax = y.amax(-1)
    least = torch.searchsorted(limits, amax).clamp_(1, _LARGEST)
    # Of most blocks the next two below have to be looked at: of all they are, which is faster than to pick those.
    steps = torch.tensor([*range(_OCTAVE), -1, -2], device=y.device)
    whole = bool(amax.max() <= limits[-1])
    found = torch.stack(
        [errors(y, (least + step).clamp_(1, _LARGEST), weight, cut=step < 0 or not whole) for step in steps.tolist()]
    )
    best, at = found.min(0)
    code = (least + steps[at]).clamp_(1, _LARGEST)
    if len(low := (least < _OCTAVE).nonzero()[:, 0]):
        for other in range(_OCTAVE, 2 * _OCTAVE):
            _try(errors, y, weight, low, torch.full_like(low, other), code, best)
    left, below = torch.arange(len(y), device=y.device), 3
    while True:
        other = least[left] - below
        limit = limits[other.clamp(min=0)]
        if weight is None:
            lost = (amax[left] - limit).clamp_(min=0).square_()
        else:
            lost = ((y[left] - limit[:, None]).clamp_(min=0).square_().mul_(weight[left])).sum(-1)
        near = ((other >= 1) & (lost < best[left])).nonzero()[:, 0]
        if not len(near):
            return code, best
        left, other = left[near], other[near]
        _try(errors, y, weight, left, other, code, best)
        below += 1


def _try(
    errors: _Errors, y: Tensor, weight: Tensor | None, at: Tensor, other: Tensor, code: Tensor, best: Tensor
) -> None:
    """Other codes for some blocks, taken where they are better."""
    error = errors(y.index_select(0, at), other, None if weight is None else weight.index_select(0, at))
    better = error < best[at]
    code[at] = torch.where(better, other, code[at])
    best[at] = torch.where(better, error, best[at])


class _Errors:
    """``sum h (y - q s)^2`` of blocks ``[n, 16]``, as many as ``like`` or fewer, for codes of scales ``[n]``, not 0.

    ``cut`` is False where a caller knows that no ``y`` is above ``6 s``.
    """

    def __init__(self, like: Tensor) -> None:
        self._buffers = [torch.empty_like(like) for _ in range(4)]
        self._scales, self._ones = _SCALES.to(like.device), like.new_ones(NVFP4_BLOCK)

    def __call__(self, y: Tensor, code: Tensor, weight: Tensor | None, *, cut: bool = True) -> Tensor:
        buffers = [buffer[: len(y)] for buffer in self._buffers]
        quotient, power, _, _ = buffers
        scale = self._scales.index_select(0, code)
        torch.mul(y, scale.reciprocal()[:, None], out=quotient)
        torch.bitwise_and(quotient.view(torch.int32), _EXPONENT, out=power.view(torch.int32))
        error = self._from_grid(*buffers, code, cut).square_()
        if weight is not None:
            error.mul_(weight)
        return torch.mv(error, self._ones).mul_(scale).mul_(scale)

    def _from_grid(self, quotient: Tensor, power: Tensor, out: Tensor, _: Tensor, code: Tensor, cut: bool) -> Tensor:
        """How far quotients are from the nearest value; ``power`` is the power of two below each."""
        # Steps are half of that, and half at least.
        power.clamp_(min=1.0).mul_(_HALVES)
        torch.add(quotient, power, out=out).sub_(power)
        return (out.clamp_(max=E2M1_MAX) if cut else out).sub_(quotient)


class _ProductErrors(_Errors):
    """``sum h (y - E4M3(q s))^2``, otherwise the same."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        # What E4M3 makes of 1.5 s, in units of s.
        self._middle = (PRODUCTS[:, 3] / _SCALES).nan_to_num(1.5).to(like.device)

    def _from_grid(
        self, quotient: Tensor, power: Tensor, nearest: Tensor, other: Tensor, code: Tensor, cut: bool
    ) -> Tensor:
        power.clamp_(1.0, 4.0)

        def nearer(value: Tensor) -> None:
            torch.minimum(nearest, value.abs_(), out=nearest)

        # Of 0, 1/2, the power, one and a half times that rounded, and twice that up to 4.
        torch.sub(quotient, 0.5, out=nearest).abs_()
        torch.minimum(nearest, quotient, out=nearest)
        nearer(torch.sub(quotient, power, out=other))
        nearer(torch.addcmul(quotient, power, self._middle.index_select(0, code)[:, None], value=-1, out=other))
        nearer(torch.sub(quotient, power.mul_(2).clamp_(max=4.0), out=other))
        return nearest


def _nearest(y: Tensor, grid: Tensor) -> Tensor:
    """int64 ``[n, 16]``: which of the ascending ``grid`` ``[n, 8]`` is nearest."""
    return torch.searchsorted((grid[:, 1:] + grid[:, :-1]) / 2, y.contiguous())
