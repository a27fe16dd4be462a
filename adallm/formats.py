"""Number formats as plain Python: every value of E2M1, E4M3 and E8M0, their maxima, and the block sizes built on them.

Sources: OCP Microscaling Formats (MX) v1.0 for E2M1, E8M0 and MXFP4; OCP 8-bit Floating Point v1.0 for E4M3;
NVIDIA's NVFP4 (E2M1, one E4M3 scale for 16 values, one FP32 scale for a tensor).
"""

from __future__ import annotations

import math

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9
E8M0_BIAS = 127

NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
INT4_GROUP = 128

# amax / NVFP4_RANGE is the global scale that puts the largest block scale at the top of E4M3.
NVFP4_RANGE = E2M1_MAX * E4M3_MAX


def e2m1_value(code: int) -> float:
    """``(-1)^s * 2^(e-1) * (1 + m/2)``, or ``(-1)^s * m/2`` for e = 0, of the nibble ``s e e m``.

    Raises:
        ValueError: ``code`` is not in 0..15.
    """
    if not 0 <= code <= 15:
        raise ValueError(f"E2M1 code {code} is not in 0..15")
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -magnitude if code & 8 else magnitude


def e4m3_value(byte: int) -> float:
    """``(-1)^s * 2^(e-7) * (1 + m/8)``, or ``(-1)^s * m * 2^-9`` for e = 0; 0x7F and 0xFF are NaN, there is no Inf.

    Raises:
        ValueError: ``byte`` is not in 0..255.
    """
    if not 0 <= byte <= 255:
        raise ValueError(f"E4M3 byte {byte} is not in 0..255")
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa * E4M3_MIN_SUBNORMAL if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -magnitude if byte & 0x80 else magnitude


def e8m0_value(byte: int) -> float:
    """``2^(byte - 127)``; 0xFF is NaN, there is neither sign nor zero.

    Raises:
        ValueError: ``byte`` is not in 0..255.
    """
    if not 0 <= byte <= 255:
        raise ValueError(f"E8M0 byte {byte} is not in 0..255")
    return math.nan if byte == 255 else 2.0 ** (byte - E8M0_BIAS)


E2M1_VALUES = tuple(e2m1_value(code) for code in range(16))
E4M3_VALUES = tuple(e4m3_value(byte) for byte in range(256))
E8M0_VALUES = tuple(e8m0_value(byte) for byte in range(256))

# Stored bits a weight, scales included, tensor-wide scales left out.
BITS_PER_WEIGHT = {
    "bf16": 16.0,
    "fp8": 8.0,
    "nvfp4": 4 + 8 / NVFP4_BLOCK,
    "mxfp4": 4 + 8 / MXFP4_BLOCK,
    "int4-g128": 4 + (16 + 4) / INT4_GROUP,
    "int4-g128-sym": 4 + 16 / INT4_GROUP,
}
