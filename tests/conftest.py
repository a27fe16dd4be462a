"""Skips tests whose marker names something that this machine does not have, and lets Triton interpret without a GPU."""

import os

import pytest
import torch

# Before anything imports Triton. With a GPU the same tests run the kernels themselves.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
