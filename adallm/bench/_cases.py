"""What the cases of benchmarks share: errors, and what is left of an implementation that fails."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class WrongResultError(ValueError):
    """A result that is not what the reference says."""


def rel_err(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest ``||out - expected|| / ||expected||`` of pairs of both, to four digits; NaN if one is NaN."""
    return float(f"{torch.stack([(out - expected).norm() / expected.norm() for out, expected in pairs]).max():.4g}")


def check_errors(errors: dict[str, Any], limits: Mapping[str, float], *, ours: bool, rounds: str = "") -> None:
    """Compare errors with their limits; a peer's that is above has a ``note`` in ``errors``, with what ``rounds`` says.

    Raises:
        WrongResultError: one of ours above its limit, or an error that is no number.
    """
    for name, limit in limits.items():
        if not errors[name] < float("inf"):
            raise WrongResultError(f"{name} is {errors[name]}")
        if errors[name] > limit and ours:
            raise WrongResultError(f"{name} is {errors[name]:.3g}, above {limit:g}")
        if errors[name] > limit:
            errors["note"] = f"{name} is above {limit:g}" + (f": {rounds}" if rounds else "")


def absent(case: Mapping[str, Any], label: str, error: Exception, *, ours: bool) -> dict[str, Any]:
    """What a peer's failure leaves, ``case`` and ``reason``, after a line about it.

    Raises:
        Exception: the error itself, with the label of the case in it, where ours failed.
    """
    if ours:
        if isinstance(error, WrongResultError):
            raise WrongResultError(f"{label}: {error}") from error
        error.add_note(f"in {label}")
        raise error
    message = str(error).strip().partition("\n")[0]
    reason = f"{type(error).__name__}: {message}" if message else type(error).__name__
    print(f"{label}: no row, {reason}", flush=True)
    return {**case, "reason": reason}


def named(distribution: str) -> str:
    """A package and its version; the name alone for one that is on the path without being installed."""
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return distribution
