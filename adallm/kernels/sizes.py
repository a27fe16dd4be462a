"""Sizes of launches. Triton has functions of these names, wrapped for its compiler; launchers call them often."""


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``, which is 1 or more."""
    return 1 << (n - 1).bit_length()
