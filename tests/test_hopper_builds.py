"""The kernels as Hopper runs them, compiled without a GPU: what correctness rests on in the compiler's output."""

import os
import subprocess
import sys

import pytest

# In a process of its own: this one may interpret the kernels.
CHECK = """
import multiprocessing
from adallm.kernels.dequant import check_registers
from adallm.sm89 import build

found = build.products("sm_90")

def check(index):
    ttgir = build.compiled(found[index].build, 90).asm["ttgir"]
    check_registers(ttgir)
    return "warp_group_dot" in ttgir

with multiprocessing.get_context("fork").Pool(2) as pool:
    asynchronous = pool.map(check, range(len(found)), chunksize=1)
print(len(asynchronous), sum(asynchronous))
"""


@pytest.mark.slow
def test_every_configuration_of_the_table():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    checked, asynchronous = map(int, done.stdout.split())
    # Few tokens go to the synchronous tensor core, all others to the asynchronous one.
    assert checked > asynchronous > checked / 2
