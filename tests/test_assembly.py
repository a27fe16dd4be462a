"""The PTX that makes the FP8 weights (``kernels/dequant.py``), run by a few lines of Python where there is no GPU."""

import os
import re
import subprocess
import sys

import numpy as np
import torch

from adallm import fp8
from adallm.formats import E2M1_VALUES
from adallm.kernels import layout

# The strings come from a process of their own, where Triton is not interpreted.
STRINGS = """
from adallm.kernels import dequant
print(dequant._ASM_TABLE.value, dequant._ASM_8.value, dequant._ASM_FOURS.value, sep="\\0", end="")
"""


def _prmt(a, b, selector):
    """PTX ISA, prmt.b32 in its default mode: bytes of {b, a}, of which bit 3 of a selector would repeat the sign."""
    assert not selector & 0x8888
    bytes_ = [(b << 32 | a) >> 8 * i & 0xFF for i in range(8)]
    return sum(bytes_[selector >> 4 * i & 7] << 8 * i for i in range(4))


def _lop3(a, b, c, table):
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


def _mul_f16x2(a, b):
    x, y = (np.array([v & 0xFFFF, v >> 16], dtype=np.uint16).view(np.float16) for v in (a, b))
    low, high = (x * y).view(np.uint16).tolist()
    return high << 16 | low


def _cvt_e4m3x2(a):
    halves = torch.from_numpy(np.array([a & 0xFFFF, a >> 16], dtype=np.uint16).view(np.float16).astype(np.float32))
    low, high = fp8.to_e4m3(halves).view(torch.uint8).tolist()
    return high << 8 | low


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "mov.b32": lambda *parts: parts[0] if len(parts) == 1 else parts[1] << 16 | parts[0],
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "mul.rn.f16x2": _mul_f16x2,
    "cvt.rn.satfinite.e4m3x2.f16x2": _cvt_e4m3x2,
}


def run(text, **registers):
    """What ``{ .reg ..; operation d, a, ..; }`` leaves in its registers."""
    for statement in re.sub(r"^\{|\}$", "", text.strip()).split(";"):
        words = statement.split(maxsplit=1)
        if not words or words[0] == ".reg":
            continue
        destination, *operands = re.split(r"[\s,{}]+", words[1].strip().rstrip("}"))
        values = [registers[o] if o in registers else int(o, 0) for o in operands if o]
        registers[destination] = OPERATIONS[words[0]](*values)
    return registers


def test_every_product_of_a_code_and_a_scale_byte():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", STRINGS]
    text = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    table, values, fours = text.split("\0")
    tables = []
    for byte in (0, *range(8, 31 << 3, 5)):
        scale = 0.0 if not byte else 2.0 ** ((byte >> 3) - layout.SCALE_BIAS) * (1 + (byte & 7) / 8)
        magnitudes = torch.tensor(E2M1_VALUES[:8]) * scale / 2**7
        expected = fp8.to_e4m3(magnitudes).view(torch.uint8).tolist()
        for which in range(4):
            word = 0x5A5A5A5A & ~(0xFF << 8 * which) | byte << 8 * which
            out = run(table, **{"$2": word, "$3": 0x0404 + 0x1010 * which})
            assert [(out["$0"] | out["$1"] << 32) >> 8 * i & 0xFF for i in range(8)] == expected
        tables.append((out["$0"], out["$1"], expected))
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 4)
    codes[8:] = codes[8:].flip(1)
    for lane, of_lane in enumerate(layout._words_8(codes)[0, 0].tolist()):
        g, t = divmod(lane, 4)
        low, high = tables[lane % len(tables)], tables[(7 * lane + 3) % len(tables)]
        for i, word in enumerate(of_lane):
            halves = low[0], low[1], high[0], high[1]
            for text, names in ((values, ("$10", "$18", "$14", "$22")), (fours, ("$3", "$4", "$5", "$6"))):
                out = run(text, **{"$2": word & 0xFFFFFFFF}, **dict(zip(names, halves, strict=True)))
                for rh, (register, (*_, of)) in enumerate((("$0", low), ("$1", high))):
                    row = codes[g + 8 * rh, 16 * t + 4 * i : 16 * t + 4 * i + 4].tolist()
                    expected = [of[code & 7] | (code >> 3) << 7 for code in row]
                    assert [out[register] >> 8 * j & 0xFF for j in range(4)] == expected
