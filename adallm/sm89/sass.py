"""Counts from the listing of a cubin: instructions by pipe, the main loop, spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import triton

# Where an instruction runs, by its name up to the first dot. ALU and FMA have 16 lanes for each scheduler, so that a
# warp takes two clocks, save FP32 arithmetic: 16-bit pairs occupy both halves of the FMA pipe, and IMAD has only one.
PIPES = {
    "alu": "BMSK BREV F2FP FMNMX FSEL FSET FSETP HMNMX2 HSETP2 IABS IADD IADD3 IMNMX ISETP LEA LOP LOP3 MOV P2R PLOP3 "
    "PRMT R2P SEL SGXT SHF SHL SHR VABSDIFF VIADD VIMNMX VOTE",
    "fma": "FADD FFMA FMUL HADD2 HFMA2 HMUL2 IDP IMAD IMUL",
    "tensor": "BMMA HMMA IMMA QMMA",
    "memory": "ATOM ATOMG ATOMS CCTL LD LDC LDG LDGDEPBAR LDGSTS LDL LDS LDSM MEMBAR RED SHFL ST STG STL STS ULDC",
}
PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", re.MULTILINE)
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_BACK = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)")


def assembled(ptx: str, gpu: str) -> bytes:
    """A cubin for ``"sm_90"``, by Triton's ``ptxas``: about what a driver makes of the PTX when it is loaded there."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        tool = triton.knobs.nvidia.ptxas.path
        done = subprocess.run([tool, f"--gpu-name={gpu}", source, "-o", cubin], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas failed: {done.stderr.strip()}")
        return cubin.read_bytes()


def listing(cubin: bytes) -> str:
    """``cuobjdump -res-usage -sass`` of a cubin, by the tool that Triton's wheel or ``TRITON_CUOBJDUMP_PATH`` has."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "-res-usage", "-sass", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump failed: {done.stderr.strip()}")
    return done.stdout


def instructions(text: str) -> list[tuple[int, str]]:
    """Address and text of each instruction, the predicate left out."""
    found = [(int(address, 16), _PREDICATE.sub("", body)) for address, body in _LINE.findall(text)]
    # The branch to itself and the NOPs that fill up the last cache line never run.
    last = max((i for i, (_, body) in enumerate(found) if opcode(body) == "EXIT"), default=len(found) - 1)
    end = next((i for i in range(last + 1, len(found)) if _target(found[i]) == found[i][0]), len(found))
    return found[:end]


def opcode(body: str) -> str:
    """``"HMMA.16816.F32.BF16 R4, ..."`` -> ``"HMMA"``."""
    return body.split(maxsplit=1)[0].partition(".")[0]


def mma(bodies: Iterable[str]) -> list[str]:
    """The tensor-core instructions, as ``"HMMA.16816.F32.BF16"``."""
    return [body.split(maxsplit=1)[0] for body in bodies if PIPE.get(opcode(body)) == "tensor"]


def _target(instruction: tuple[int, str]) -> int | None:
    match = _BACK.search(instruction[1])
    return int(match[1], 16) if match else None


def main_loop(found: list[tuple[int, str]], *, rare: bool = False) -> list[str]:
    """Body of the loop with the most tensor-core instructions, the shortest of several; ``[]`` where none has any.

    Args:
        rare: leave out what a branch in it passes over, if no tensor-core instruction is there: FP8 sums leave the
            tensor core in one step of many.
    """
    best: tuple[int, int, list[str]] = (0, 0, [])
    for branch in found:
        target = _target(branch)
        if target is None or target >= branch[0]:
            continue
        inside = [(address, text) for address, text in found if target <= address <= branch[0]]
        skipped: set[int] = set()
        for at, _ in inside if rare else ():
            to = _target((at, dict(inside)[at]))
            over = [(address, text) for address, text in inside if to is not None and at < address < to]
            if not mma(text for _, text in over):
                skipped |= {address for address, _ in over}
        body = [text for address, text in inside if address not in skipped]
        best = max(best, (len(mma(body)), -len(body), body), key=lambda loop: loop[:2])
    return best[2]


def pipes(bodies: Iterable[str]) -> dict[str, int]:
    """Instructions for each pipe of ``PIPES``, and ``other``: branches, barriers, the uniform pipe."""
    counts = dict.fromkeys([*PIPES, "other"], 0)
    for body in bodies:
        counts[PIPE.get(opcode(body), "other")] += 1
    return counts


def spill_bytes(text: str) -> int:
    """Bytes a thread stores to and loads from local memory, or the size of its stack where that is more."""
    moved = 0
    for _, body in instructions(text):
        if opcode(body) in ("LDL", "STL"):
            width = re.search(r"\.(64|128)\b", body.split(maxsplit=1)[0])
            moved += int(width[1]) // 8 if width else 4
    return max(moved, *(int(number) for number in _usage(text)[1:]))


def registers(text: str) -> int:
    """Registers of a thread."""
    return int(_usage(text)[0])


def _usage(text: str) -> tuple[str, str, str]:
    match = _USAGE.search(text)
    if match is None:
        raise RuntimeError("cuobjdump printed no resource usage")
    return match.groups()
