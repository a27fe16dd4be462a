"""Launches by way of kernels that were found before: the same kernel, for what Triton would take the same one for."""

import itertools

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from adallm import fp8
from adallm.kernels import sizes
from adallm.kernels import start as module
from adallm.kernels.start import start


class Compiled:
    """Stands for a compiled kernel; launches are noted in ``calls``."""

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args: self.calls.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    """A kernel of three arguments and two constants; what Triton was asked to find is in ``asked``."""

    class Kernel(JITFunction):
        def __init__(self):
            self.arg_names, self.asked, self.calls = ["x", "n", "s", "A", "B"], [], []

        def __getitem__(self, grid):
            def find(*args, **constants):
                self.asked.append((grid, args, constants))
                return Compiled(self.calls)

            return find

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


X = torch.zeros(64)


def launched(kernel, x=X, n=3, s=1.5, grid=(2,), **constants):
    start(kernel, grid, (x, n, s), **{"B": True, "A": 1, "num_warps": 4} | constants)


def test_the_second_launch_is_of_what_the_first_has_found(kernel):
    for n in (3, 5, 7):
        launched(kernel, n=n, s=n / 2)
    assert kernel.asked == [((2,), (X, 3, 1.5), {"B": True, "A": 1, "num_warps": 4})]
    # Constants follow in the order of the signature; a grid has three sizes.
    assert kernel.calls == [((2, 1, 1), (X, 5, 2.5, 1, True)), ((2, 1, 1), (X, 7, 3.5, 1, True))]
    launched(kernel, grid=(2, 3, 4))
    assert kernel.calls[-1][0] == (2, 3, 4)


@pytest.mark.parametrize(
    "other",
    [
        {"n": 1}, {"n": 16}, {"n": 2**31}, {"n": 2**35},
        {"n": -(2**31) - 1}, {"x": X[1:]}, {"x": X.half()}, {"x": None}, {"s": None},
        {"s": X}, {"A": 2}, {"B": False}, {"num_warps": 8},
    ],
)  # fmt: skip
def test_what_triton_specializes_on_is_asked_for_again(kernel, other):
    launched(kernel)
    launched(kernel, **other)
    assert len(kernel.asked) == 2


def test_each_device_has_kernels_of_its_own(kernel, monkeypatch):
    launched(kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launched(kernel)
    assert len(kernel.asked) == 2


def test_what_is_no_kernel_of_tritons_compiler_is_called():
    class Stand:
        def __getitem__(self, grid):
            return lambda *args, **constants: (grid, args, constants)

    assert start(Stand(), (1,), (2,), A=3) == ((1,), (2,), {"A": 3})


def test_integers_are_told_apart_as_triton_does():
    """Of any two that Triton would specialize in different ways."""
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    kinds = {}
    for n in (0, 1, 2, 15, 16, 17, 32, -16, -1, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**40, 2**62):
        ours = (n == 1, n & 15 == 0, n + (1 << 31) >> 32)
        kinds.setdefault(ours, set()).add(specialize(CUDABackend, n, False, True, True))
    assert all(len(found) == 1 for found in kinds.values())


def test_sizes():
    for a, b in itertools.product(range(40), range(1, 20)):
        assert sizes.cdiv(a, b) == triton.cdiv(a, b)
    for n in range(1, 300):
        assert sizes.next_power_of_2(n) == triton.next_power_of_2(n)


@pytest.mark.gpu
def test_on_a_gpu():
    """Strides, alignments and sizes that take kernels of their own, each launched twice."""
    from adallm.kernels.quantize import quantize_tokens

    for rows, columns, offset in itertools.product((1, 3, 16), (32, 48, 4096), (0, 16, 1)):
        whole = torch.randn(rows, columns + 16, device="cuda", dtype=torch.bfloat16)
        x = whole.view(-1)[offset : offset + rows * columns].view(rows, columns)
        expected = fp8.quantize(x, granularity="token")
        for _ in range(2):
            data, scale = quantize_tokens(x, ordered=True)
            assert torch.equal(scale, expected.scale.flatten())
            assert torch.equal(data.float(), expected.data.float())
