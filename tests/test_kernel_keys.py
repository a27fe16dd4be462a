"""Triton's keys of the kernels, which other processes must find again, whatever was imported or launched first."""

import os
import subprocess
import sys

KEYS = """
import importlib, sys
modules = [importlib.import_module(f"adallm.kernels.{name}") for name in sys.argv[1:]]
for kernel in sorted(vars(m)[n].cache_key for m in modules for n in vars(m) if n.startswith("nvfp4") or "kernel" in n):
    print(kernel)
"""
MODULES = ("decode", "write_kv", "expand", "matmul", "hopper", "silu", "norm")


def test_keys_do_not_depend_on_order():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = {
        subprocess.run(
            [sys.executable, "-c", KEYS, *order], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for order in (MODULES, MODULES[::-1], MODULES[2:] + MODULES[:2])
    }
    assert len(found) == 1
    assert len(found.pop().split()) == len(MODULES)
