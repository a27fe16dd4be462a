"""Data sheets: units, and figures of one chip against each other."""

import pytest

from adallm import hardware
from adallm.hardware import GPUS, blocks_per_sm

# Operations of one SM and clock on the tensor cores in FP16: half of the chip's in the GeForce cards.
FP16_PER_CLOCK = {"RTX 4090": 512, "RTX 6000 Ada": 1024, "L40S": 1024, "L4": 1024, "H100": 4096}


@pytest.mark.parametrize("name", GPUS)
def test_tensor_rate_is_that_of_the_sms_and_the_clock(name):
    gpu = GPUS[name]
    peak = gpu.sms * gpu.clock_ghz * FP16_PER_CLOCK[name] / 1e3
    # H100's rate is stated at less than its highest clock.
    assert gpu.fp16_tflops == pytest.approx(peak, rel=0.1 if name == "H100" else 0.02)
    assert gpu.fp8_tflops == pytest.approx(2 * gpu.fp16_tflops, rel=0.02)


@pytest.mark.parametrize("name", GPUS)
def test_units(name):
    gpu = GPUS[name]
    assert 1 < gpu.clock_ghz < 3
    assert 100 < gpu.dram_gb_s < 10_000
    assert 16 <= gpu.memory_gb <= 200
    assert 32 <= gpu.l2_mb <= 128
    assert 0 < gpu.mma_sync <= 1
    assert gpu.shared_per_sm - gpu.shared_per_block == 1024
    assert gpu.registers_per_sm == 64 * 1024
    assert (gpu.capability, gpu.shared_per_block) in [((8, 9), 101376), ((9, 0), 232448)]


def test_find_takes_the_driver_s_name():
    assert hardware.find("NVIDIA GeForce RTX 4090") == "RTX 4090"
    assert hardware.find("NVIDIA RTX 6000 Ada Generation") == "RTX 6000 Ada"
    assert hardware.find("NVIDIA L40S") == "L40S"
    assert hardware.find("NVIDIA L4") == "L4"
    assert hardware.find("NVIDIA H100 80GB HBM3") == "H100"
    for other in ("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe"):
        assert hardware.find(other) is None


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (128, 0, 4, 4),  # 4096 registers a warp, four warps for each scheduler
        (129, 0, 4, 3),  # 4352 registers a warp
        (255, 0, 8, 1),
        (32, 0, 1, 24),
        (16, 0, 4, 12),  # 48 warps
        (64, 99 * 1024, 4, 1),
        (64, 49 * 1024, 4, 2),  # and 1 KB for each block
        (64, 49 * 1024 + 1, 4, 1),
        (64, 100 * 1024, 4, 0),
    ],
)
def test_blocks_of_an_ada_sm(registers, shared, warps, blocks):
    assert blocks_per_sm(GPUS["RTX 4090"], registers=registers, shared=shared, warps=warps) == blocks
