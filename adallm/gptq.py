"""GPTQ for NVFP4: columns are rounded one after the other, and those still to come make up for what each has lost.

For a layer ``y = w x`` whose inputs have the second moments ``H = sum x x^T``, quantizing costs
``sum |(w - w') x|^2 = tr (w - w') H (w - w')^T``. With ``U`` the upper Cholesky factor of ``H^-1``, rounding column
``j`` to ``w'_j`` leaves ``e = (w_j - w'_j) / U_jj``, and the best that a later column ``k`` can do is ``w_k - e U_jk``
(arXiv 2210.17323; for NVFP4, 2509.23202). Columns with large inputs come first. Before, ``DAMPING`` times the mean of
its diagonal is added to that of ``H``.

Block scales are fixed beforehand, those of the rule ``imatrix`` with the diagonal of ``H``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adallm import nvfp4, quantizers
from adallm.formats import E2M1_VALUES, NVFP4_BLOCK

DAMPING = 0.01
# Columns whose errors are passed on to all behind them at once.
_COLUMNS = 128


@torch.no_grad()
def quantize(
    weight: Tensor, moments: Tensor, *, global_scale: Tensor, layout: str = "modelopt", damping: float = DAMPING
) -> nvfp4.NVFP4Tensor:
    """``weight`` in NVFP4 with the least ``sum |(w - w') x|^2`` that GPTQ finds.

    Args:
        weight: bfloat16, float16 or float32 ``[N, K]``, K a multiple of 16, finite.
        moments: ``[K, K]``, ``sum x x^T`` or a multiple of it, on the same device; float64 is best.
        global_scale: float32 ``[]``, of ``quantizers.best_global_scale``.
        layout: as for ``nvfp4.quantize``.
        damping: of the mean of the diagonal, added to it.

    Raises:
        ValueError: shapes that do not fit; moments that are not finite, or so singular that with ``damping`` they have
            no Cholesky factor.
    """
    rows, columns = weight.shape
    if moments.shape != (columns, columns) or columns % NVFP4_BLOCK:
        raise ValueError(f"moments are {list(moments.shape)} for a weight of {[rows, columns]}; they must be [K, K]")
    importance = moments.diagonal().float()
    quantizers.check_importance("imatrix", importance, columns)
    global_scale, divisor = nvfp4.resolve_global_scale(weight, None, global_scale, layout, nvfp4.NVFP4_RANGE)
    w = weight.float()
    scale = quantizers.block_scales(w, "imatrix", global_scale, importance)[0]
    step = nvfp4.block_step(scale, global_scale, divisor)
    order = importance.argsort(descending=True, stable=True)
    factor = _factor(moments.double()[order][:, order], damping)
    codes = _rounded(w[:, order], factor, step, (order // NVFP4_BLOCK).tolist())
    packed = nvfp4.pack(codes[:, order.argsort()])
    return nvfp4.NVFP4Tensor(packed, scale, global_scale, divisor)


def _factor(h: Tensor, damping: float) -> Tensor:
    """``U`` with ``U^T U`` the inverse of ``h``, whose diagonal this changes; float32."""
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(h)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not torch.isfinite(upper).all():
        raise ValueError(
            f"the second moments of its inputs are singular, with {damping:g} of their mean added to the diagonal too; "
            "more text, or more damping, makes them regular"
        )
    return upper.float()


def _rounded(w: Tensor, upper: Tensor, step: Tensor, blocks: list[int]) -> Tensor:
    """The code of each element, with the error of its column passed on.

    Args:
        w: float32 ``[N, K]``, columns in the order in which they are rounded; it is changed.
        step: float32 ``[N, K/16]``; ``blocks`` has the block of each column.
    """
    values = torch.tensor(E2M1_VALUES, device=w.device)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for first in range(0, w.shape[1], _COLUMNS):
        last = min(first + _COLUMNS, w.shape[1])
        part, within = w[:, first:last].clone(), upper[first:last, first:last]
        errors = torch.empty_like(part)
        for j in range(last - first):
            at = step[:, blocks[first + j]]
            code = nvfp4.encode_e2m1(part[:, j] / at)
            codes[:, first + j] = code
            errors[:, j] = (part[:, j] - values[code.long()] * at) / within[j, j]
            part[:, j + 1 :].addr_(errors[:, j], within[j, j + 1 :], alpha=-1)
        w[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return codes
