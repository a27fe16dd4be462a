"""The values that a scale may have."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from adallm.checkpoint.errors import fail


def check_scale(file: Path, name: str, role: str, value: Tensor) -> None:
    """Check that a scale is finite and not negative, and not zero unless it is a block scale.

    Args:
        role: of the tensor in its layer (layers.py); ``"scale"`` is a block scale.

    Raises:
        CheckpointError: naming the file, the tensor, the first bad value and its index.
    """
    numbers = value.float()
    bad = ~torch.isfinite(numbers) | torch.signbit(numbers)
    if role != "scale":
        bad |= numbers == 0
    if bad.any():
        index = [int(i) for i in bad.nonzero()[0]] if numbers.dim() else []
        allowed = "finite and not negative" if role == "scale" else "finite and positive"
        fail(file, f"is {float(numbers[tuple(index)])} at {index}; a scale is {allowed}", tensor=name)
