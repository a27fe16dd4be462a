"""Data sheets: units, and figures of one chip against each other."""

import pytest
import torch

from adallm import hardware
from adallm.hardware import GPUS, blocks_per_sm

# Operations of one SM and clock on the tensor cores in FP16: half of the chip's in the GeForce cards.
FP16_PER_CLOCK = {"RTX 4090": 512, "RTX 6000 Ada": 1024, "L40S": 1024, "L4": 1024, "H100": 4096, "H200": 4096}


@pytest.mark.parametrize("name", GPUS)
def test_tensor_rate_is_that_of_the_sms_and_the_clock(name):
    gpu = GPUS[name]
    peak = gpu.sms * gpu.clock_ghz * FP16_PER_CLOCK[name] / 1e3
    # Hopper's rate is stated at less than its highest clock.
    assert gpu.fp16_tflops == pytest.approx(peak, rel=0.1 if gpu.capability == (9, 0) else 0.02)
    assert gpu.fp8_tflops == pytest.approx(2 * gpu.fp16_tflops, rel=0.02)


@pytest.mark.parametrize("name", GPUS)
def test_units(name):
    gpu = GPUS[name]
    assert 1 < gpu.clock_ghz < 3
    assert 100 < gpu.dram_gb_s < 10_000
    assert 16 <= gpu.memory_gb <= 200
    # A sixteenth goes to ECC where it is on, and little to the driver.
    assert 15 / 16 * 1024 * gpu.memory_gb * 0.995 < gpu.memory_mib < 1024 * gpu.memory_gb
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
    assert hardware.find("NVIDIA H200") == "H200"
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


QWEN3_8B = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
QWEN3_8B |= {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 36}
LLAMA_8B = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
GEMMA3_27B = {"num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
GEMMA3_27B |= {"sliding_window": 1024, "sliding_window_pattern": 6}


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("tokens", [1, 16, 1000, 8192])
@pytest.mark.parametrize("config", [QWEN3_8B, LLAMA_8B, GEMMA3_27B, {"text_config": GEMMA3_27B}], ids=str)
def test_bytes_of_a_cache_are_those_of_its_tensors(config, tokens, dtype):
    # Four bits: two values a byte.
    size, per = {"bf16": (torch.bfloat16, 1), "fp8": (torch.float8_e4m3fn, 1), "nvfp4": (torch.uint8, 2)}[dtype]
    text = config.get("text_config", config)
    head = text.get("head_dim", 128)
    allocated = scales = 0
    for layer in range(text["num_hidden_layers"]):
        slides = text.get("sliding_window") and (layer + 1) % 6
        # Of 1024 tokens in a row, the first and the last block may each be there in part.
        blocks = min(-(-tokens // 16), 65) if slides else -(-tokens // 16)
        cache = torch.empty(2, blocks, 16, text["num_key_value_heads"], head // per, dtype=size, device="meta")
        allocated += cache.nbytes
        if dtype == "nvfp4":
            allocated += cache.numel() * per // 16
        scales += cache[..., 0].numel() * 4
    assert hardware.kv_cache_bytes(config, tokens, dtype) == allocated
    if dtype == "fp8":
        assert hardware.kv_cache_bytes(config, tokens, dtype, token_scales=True) == allocated + scales


def test_bytes_of_a_token():
    assert hardware.kv_cache_bytes(QWEN3_8B, 1, "bf16", block_size=1) == 2 * 36 * 8 * 128 * 2
    types = ["sliding_attention", "full_attention"]
    of_types = {**LLAMA_8B, "num_hidden_layers": 2, "sliding_window": 4, "layer_types": types}
    assert hardware.kv_cache_bytes(of_types, 100, "fp8", block_size=1) == 2 * (4 + 100) * 8 * 128
    everywhere = {**LLAMA_8B, "num_hidden_layers": 2, "sliding_window": 4}
    assert hardware.kv_cache_bytes(everywhere, 100, "fp8", block_size=1) == 2 * 8 * 8 * 128


def test_a_cache_of_no_known_size():
    with pytest.raises(ValueError, match=r"dtype is 'int4'; supported: bf16, fp16, fp8, nvfp4"):
        hardware.kv_cache_bytes(QWEN3_8B, 1, "int4")
    with pytest.raises(ValueError, match="token_scales with 'fp8'"):
        hardware.kv_cache_bytes(QWEN3_8B, 1, "bf16", token_scales=True)
    with pytest.raises(ValueError, match="heads of 40 with dtype 'nvfp4'; supported: multiples of 16"):
        hardware.kv_cache_bytes({**LLAMA_8B, "head_dim": 40}, 1, "nvfp4")
    with pytest.raises(ValueError, match="the config has no 'num_attention_heads'"):
        hardware.kv_cache_bytes({"num_hidden_layers": 1}, 1, "bf16")
