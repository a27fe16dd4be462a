"""Walk over the rows of a tensor in pieces, so that converting it needs little memory beside input and output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements in a piece. On a CPU the temporaries of one piece stay in the cache; on a GPU a piece has to fill the device.
_CPU_PIECE = 1 << 18
_GPU_PIECE = 1 << 24


def row_slices(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Yield slices that cover ``rows`` rows of ``columns`` elements, at least one row each."""
    step = max((_CPU_PIECE if device.type == "cpu" else _GPU_PIECE) // max(columns, 1), 1)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def row_pieces(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(rows, x[rows])`` over ``x`` ``[..., K]`` seen as a matrix ``[rows, K]``, with no copy of the whole.

    The pieces are views of ``x``, in row-major order, so they are contiguous only if ``x`` is.
    """
    if x.dim() <= 2 or x.is_contiguous():
        matrix = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(0, 0)
        for rows in row_slices(*matrix.shape, x.device):
            yield rows, matrix[rows]
        return
    # Strides that no matrix has, such as those of a transposed batch: one matrix after the other.
    below = x[0].numel() // max(x.shape[-1], 1)
    for i, matrix in enumerate(x):
        for rows, piece in row_pieces(matrix):
            yield slice(i * below + rows.start, i * below + rows.stop), piece


def finite_amax(x: Tensor) -> Tensor:
    """``max |x|``, 0-dim and in the dtype of ``x``.

    Raises:
        ValueError: a NaN or an infinity, with the index of the first, or no element at all.
    """
    if x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}: no element, so amax is undefined")
    amax = torch.stack([_amax(piece) for _, piece in row_pieces(x)]).amax()
    if not torch.isfinite(amax):
        raise ValueError(_first_non_finite(x))
    return amax


def _amax(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def _first_non_finite(x: Tensor) -> str:
    for rows, piece in row_pieces(x):
        bad = (~torch.isfinite(piece)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            index = torch.unravel_index(torch.tensor(rows.start + row), x.shape[:-1]) if x.dim() > 1 else ()
            return f"x{[*map(int, index), column]} is {float(piece[row, column])}; every value must be finite"
    raise AssertionError("amax is not finite but every value is")
