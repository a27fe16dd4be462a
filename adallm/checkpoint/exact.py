"""Scales in the other layout, without loss.

ModelOpt stores multipliers ``g`` as scalars ``[]``, compressed-tensors divisors ``d = fl(1/g)`` as ``[1]``. Because
``fl(1/fl(1/x)) != x`` for some FP32 ``x``, a conversion keeps the number that it could not get back, as bytes in the
``__metadata__`` of the new file, and the way back takes it from there if it still fits the number beside it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adallm.checkpoint.quantization import MODELOPT

METADATA_KEY = "adallm.originals"

# What a scale is, by its role in a layer; see layers.py.
RECIPROCAL_ROLES = ("global_scale", "input_scale")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def translate(value: Tensor, role: str, layout: str) -> Tensor:
    """The scale as the other layout, ``layout``, stores it.

    Args:
        value: the stored scale.
        role: ``global_scale`` or ``input_scale`` of an NVFP4 layer (float32, one number), ``fp8_scale`` or
            ``fp8_input_scale`` of an FP8 layer (one number, or one for a channel), ``kv_scale`` (one number).

    Raises:
        ValueError: not one number where one is meant, or its reciprocal is not a finite FP32 number.
    """
    if role == "fp8_scale" and value.numel() > 1:
        return value.reshape(-1) if layout == MODELOPT else value.reshape(-1, 1)
    if value.numel() != 1:
        raise ValueError(f"has shape {list(value.shape)}; the {layout} layout has one number for the tensor")
    value = value.reshape(() if layout == MODELOPT else (1,))
    if role == "kv_scale":
        return value.float()
    if role not in RECIPROCAL_ROLES:
        return value.clone()
    value = value.reciprocal()
    if not torch.isfinite(value).all() or (value == 0).any():
        raise ValueError("has no FP32 reciprocal, which the other layout stores")
    return value


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaN equals NaN and -0 is not 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def pack_originals(originals: Mapping[str, Tensor]) -> dict[str, str]:
    """The entry of ``__metadata__`` that keeps scales: dtype, shape, bytes and CRC, by the tensor that it is beside."""
    if not originals:
        return {}
    records = {}
    for name, value in originals.items():
        data = bytes(value.reshape(-1).view(torch.uint8)).hex()
        record = [str(value.dtype).removeprefix("torch."), list(value.shape), data]
        records[name] = [*record, _checksum(name, record)]
    return {METADATA_KEY: json.dumps(records, separators=(",", ":"))}


def unpack_originals(metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The inverse of ``pack_originals``.

    Entries that cannot be read are left out: the tensors themselves are complete without them.
    """
    try:
        records = dict(json.loads(metadata.get(METADATA_KEY, "{}")))
    except (ValueError, TypeError, RecursionError):
        return {}
    originals = {}
    for name, record in records.items():
        try:
            dtype, shape, data, checksum = record
            if checksum == _checksum(name, [dtype, shape, data]):
                values = torch.frombuffer(bytearray.fromhex(data), dtype=_DTYPES[dtype])
                originals[name] = values.reshape(shape).clone()
        except (ValueError, TypeError, KeyError, RuntimeError):
            continue
    return originals


def _checksum(name: str, record: list[Any]) -> int:
    # A damaged digit can still be a number that fits the scale beside it.
    return zlib.crc32(json.dumps([name, record]).encode())


def original_of(name: str, stored: Tensor, role: str, layout: str, originals: Mapping[str, Tensor]) -> Tensor | None:
    """The kept scale whose translation into ``layout`` is what is stored, or None."""
    kept = originals.get(name)
    if kept is None or kept.numel() != stored.numel():
        return None
    try:
        return kept if same_bytes(translate(kept, role, layout), stored) else None
    except ValueError:
        return None
