"""Launches by way of kernels that were found before: the same kernel, for what Triton would take the same one for."""

import itertools

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from adallm import fp8
from adallm.kernels import sizes
from adallm.kernels import start as module
from adallm.kernels.start import Launch


class Compiled:
    """Stands for a compiled kernel; launches are noted in ``calls``."""

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args: self.calls.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    """A kernel of five arguments, two of them constants; what Triton was asked to find is in ``asked``."""

    class Kernel(JITFunction):
        def __init__(self):
            self.arg_names, self.asked, self.calls = ["x", "s", "n", "A", "B"], [], []

        def __getitem__(self, grid):
            def find(*args, **constants):
                self.asked.append((grid, args, constants))
                return Compiled(self.calls)

            return find

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


X = torch.zeros(64)
CONSTANTS = {"B": True, "A": 1, "num_warps": 4}


def launched(kernel, x=X, n=3, s=1.5, **constants):
    return Launch(kernel, (n,), **CONSTANTS | constants)((2,), x, s)


def test_the_second_launch_is_of_what_the_first_has_found(kernel):
    launch = Launch(kernel, (3,), **CONSTANTS)
    others = torch.zeros(64), torch.zeros(64)
    assert launch((2,), X, 1.5) is not None
    assert [launch((5,), others[0], 2.5), launch((2, 3, 4), others[1], 3.5)] == [None, None]
    assert kernel.asked == [((2,), (X, 1.5, 3), CONSTANTS)]
    # Tensors are addresses. Constants follow in the order of the signature; a grid has three sizes.
    at = [x.data_ptr() for x in others]
    assert kernel.calls == [((5, 1, 1), (at[0], 2.5, 3, 1, True)), ((2, 3, 4), (at[1], 3.5, 3, 1, True))]


def test_launches_that_are_alike_share_what_was_found(kernel):
    assert launched(kernel, n=3) is launched(kernel, n=5, s=2.5)
    assert kernel.calls == [((2, 1, 1), (X, 2.5, 5, 1, True))]
    assert len(kernel.asked) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"n": 1}, {"n": 16}, {"n": 2**31}, {"n": 2**35},
        {"n": -(2**31) - 1}, {"x": X[1:]}, {"x": X.half()}, {"x": None}, {"s": None}, {"s": 2},
        {"s": X}, {"A": 2}, {"B": False}, {"num_warps": 8},
    ],
)  # fmt: skip
def test_what_triton_specializes_on_is_asked_for_again(kernel, other):
    launched(kernel)
    launched(kernel, **other)
    assert len(kernel.asked) == 2


@pytest.mark.parametrize("other", [(X[1:], 1.5), (None, 1.5), (X, None), (X, 2), (X, X), (X, X[1:])])
def test_one_launch_tells_them_apart_too(kernel, other):
    launch = Launch(kernel, (3,), **CONSTANTS)
    for args in ((X, 1.5), other, (X, 1.5), other):
        launch((2,), *args)
    assert [args for _, args, _ in kernel.asked] == [(X, 1.5, 3), (*other, 3)]
    assert len(kernel.calls) == 2


def test_each_device_has_kernels_of_its_own(kernel, monkeypatch):
    launch = Launch(kernel, (3,), **CONSTANTS)
    launch((2,), X, 1.5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch((2,), X, 1.5)
    assert len(kernel.asked) == 2


def test_what_is_no_kernel_of_tritons_compiler_is_called():
    class Stand:
        def __getitem__(self, grid):
            return lambda *args, **constants: (grid, args, constants)

    for _ in range(2):
        assert Launch(Stand(), (2,), A=3)((1,), 5) == ((1,), (5, 2), {"A": 3})


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
