"""The kernels as Hopper runs them, compiled without a GPU: what correctness rests on in the compiler's output."""

import os
import subprocess
import sys

import pytest

# In a process of its own: this one may interpret the kernels.
CHECK = r"""
import multiprocessing, re
from adallm.kernels.dequant import check_registers
from adallm.sm89 import build, sass

found = build.products("sm_90")
GMMA = re.compile(r"GMMA\.64x(\d+)x\d+\S* R(\d+), R(\d+)")
WRITES = re.compile(r"^(?!ST|RED|BAR|BRA|LDGSTS|DEPBAR|WARP|UI|UL|US|UM|UF|R2UR)(\S+) (?:P\w+, )?R(\d+)\b")


def overwritten(listing):
    '''Instructions that write registers of a product that is not finished; the loop is gone through twice.'''
    code = sass.instructions(listing)
    at = {address: i for i, (address, _) in enumerate(code)}
    bodies = [body for _, body in code]
    for i, body in enumerate(bodies):
        target = re.search(r"BRA 0x([0-9a-f]+)", body)
        if target and at.get(int(target[1], 16), i) < i and "GMMA" in "".join(bodies[at[int(target[1], 16)] : i]):
            bodies = [*bodies[: i + 1], *bodies[at[int(target[1], 16)] :]]
            break
    groups, open_, bad = [], set(), []
    for body in bodies:
        if product := GMMA.search(body):
            columns, out, a = map(int, product.groups())
            open_ |= {*range(out, out + columns // 2), *range(a, a + 4)}
            if "gsb0" in body:
                groups, open_ = [*groups, open_], set()
        elif wait := re.match(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d)", body):
            groups = groups[len(groups) - int(wait[1]) :] if int(wait[1]) else []
        elif write := WRITES.match(body):
            width = 4 if ".128" in write[1] else 2 if ".64" in write[1] or ".WIDE" in write[1] else 1
            if set().union(open_, *groups) & set(range(int(write[2]), int(write[2]) + width)):
                bad.append(body)
    return bad


def check(index):
    kernel, overlap = build.compiled(found[index].build, 90), found[index].config.overlap
    if overlap:
        listing = sass.listing(kernel.asm["cubin"])
        # One product runs on while the next weights are made: ptxas did not put them one after the other.
        assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in listing, found[index]
        assert not overwritten(listing), (found[index], overwritten(listing))
    else:
        check_registers(kernel.asm["ttgir"])
    return "warp_group_dot" in kernel.asm["ttgir"], overlap


with multiprocessing.get_context("fork").Pool(2) as pool:
    checked = pool.map(check, range(len(found)), chunksize=1)
print(len(checked), *map(sum, zip(*checked)))
racy = "/*0000*/ HGMMA.64x16x16.F32.BF16 R8, R24, gdesc[UR4], R8, gsb0 ;\n/*0010*/ MOV R26, R1 ;\n"
assert overwritten(racy) == ["MOV R26, R1"]
"""


@pytest.mark.slow
def test_every_configuration_of_the_table():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    checked, asynchronous, overlapping = map(int, done.stdout.split())
    # Few tokens go to the synchronous tensor core, all others to the asynchronous one.
    assert checked > asynchronous > overlapping > checked / 4
