"""GPU data sheets, how many blocks fit on an SM, and what a KV cache takes.

Rates are the makers': boost clock, dense tensor rate with FP32 accumulation, nominal DRAM bandwidth. Sources:
NVIDIA's Ada and Hopper architecture white papers and data sheets; limits of an SM from the CUDA C++ Programming Guide,
"Technical Specifications per Compute Capability"; memory as published output of ``nvidia-smi`` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEDULERS = 4  # of an SM, each issuing one instruction of one warp a clock
WARP = 32

# Granularity in which an SM gives registers (to a warp), shared memory (to a block), and warps (to its schedulers).
_REGISTERS, _SHARED = 256, 128
# Shared memory that the system keeps for each block.
_RESERVED = 1024


@dataclass(frozen=True)
class GPU:
    """A data sheet.

    Attributes:
        device: the name that its driver gives. Relatives of a like name (RTX 4090 D, H100 PCIe) are other chips.
        capability: compute capability.
        sms: streaming multiprocessors.
        clock_ghz: boost clock.
        dram_gb_s: DRAM bandwidth in 10^9 bytes a second.
        l2_mb: L2 cache in MiB.
        memory_gb: DRAM in GB, as the card is sold; of these cards, GiB in truth.
        memory_mib: what the driver counts of it, in MiB, as ``nvidia-smi`` shows. Of L40S and L4 a sixteenth is missing
            that holds the ECC bits of their GDDR6; RTX 4090 and RTX 6000 Ada come with ECC off.
        fp16_tflops: dense FP16 and BF16 tensor rate with FP32 accumulation, in 10^12 operations a second.
        fp8_tflops: dense FP8 tensor rate with FP32 accumulation.
        mma_sync: share of those rates that ``mma.sync`` is taken to reach; Hopper has the whole with ``wgmma`` alone.
        shared_per_block: largest shared memory of a block, in bytes.
        shared_per_sm: shared memory of an SM, in bytes, what is reserved for blocks included.
        warps_per_sm, blocks_per_sm, registers_per_sm: at most, on an SM.
    """

    device: str
    capability: tuple[int, int]
    sms: int
    clock_ghz: float
    dram_gb_s: float
    l2_mb: int
    memory_gb: int
    memory_mib: int
    fp16_tflops: float
    fp8_tflops: float
    mma_sync: float
    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536


def _ada(
    device: str, sms: int, clock: float, dram: float, l2: int, memory: int, mib: int, fp16: float, fp8: float
) -> GPU:
    return GPU(device, (8, 9), sms, clock, dram, l2, memory, mib, fp16, fp8, 1.0, 99 * 1024, 100 * 1024, 48, 24)


def _hopper(device: str, dram: int, memory: int, mib: int) -> GPU:
    sm = (227 * 1024, 228 * 1024, 64, 32)
    return GPU(device, (9, 0), 132, 1.98, dram, 50, memory, mib, 989, 1979, 0.6, *sm)


GPUS: dict[str, GPU] = {
    "RTX 4090": _ada("NVIDIA GeForce RTX 4090", 128, 2.52, 1008, 72, 24, 24564, 165, 330),
    "RTX 6000 Ada": _ada("NVIDIA RTX 6000 Ada Generation", 142, 2.505, 960, 96, 48, 49140, 364, 728),
    "L40S": _ada("NVIDIA L40S", 142, 2.52, 864, 48, 48, 46068, 362, 733),
    "L4": _ada("NVIDIA L4", 58, 2.04, 300, 48, 24, 23034, 121, 242),
    # The SXM modules: one chip, two kinds of memory.
    "H100": _hopper("NVIDIA H100 80GB HBM3", 3352, 80, 81559),
    "H200": _hopper("NVIDIA H200", 4800, 141, 143771),
}


def find(device: str) -> str | None:
    """The name in ``GPUS`` of a device as its driver calls it: ``"NVIDIA H100 80GB HBM3"`` -> ``"H100"``."""
    return next((name for name, gpu in GPUS.items() if gpu.device == device), None)


def blocks_per_sm(gpu: GPU, *, registers: int, shared: int, warps: int) -> int:
    """Blocks that an SM holds at once: the least that registers, shared memory, warps and block slots allow.

    Args:
        registers: of a thread.
        shared: bytes of a block.
        warps: of a block.
    """
    of_warp = max(-(-registers * WARP // _REGISTERS) * _REGISTERS, _REGISTERS)
    # Each scheduler's warps share its quarter of the registers.
    by_registers = gpu.registers_per_sm // SCHEDULERS // of_warp * SCHEDULERS // warps
    if shared > gpu.shared_per_block:
        return 0
    by_shared = gpu.shared_per_sm // (-(-shared // _SHARED) * _SHARED + _RESERVED)
    return min(by_registers, by_shared, gpu.warps_per_sm // warps, gpu.blocks_per_sm)


_CACHE_BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "nvfp4": 4}


def kv_cache_bytes(
    config: Mapping[str, Any], tokens: int, dtype: str, *, block_size: int = 16, token_scales: bool = False
) -> int:
    """Bytes of a sequence's paged KV cache: over the layers, ``2 * blocks * block_size * heads * head size * bytes``.

    A full layer keeps ``ceil(tokens / block_size)`` blocks. One with a sliding window W keeps the blocks that W tokens
    can touch, ``ceil((W - 1) / block_size) + 1`` at most.

    Args:
        config: a Hugging Face ``config.json``; of a multimodal model, its ``text_config`` is used.
        tokens: of the sequence.
        dtype: ``"bf16"``, ``"fp16"``, ``"fp8"`` or ``"nvfp4"``, of which each 16 values have an E4M3 scale: 4.5 bits a
            value. No kernel here reads a cache of 4 bits.
        block_size: tokens of a block.
        token_scales: with ``"fp8"``, an FP32 scale for each token and head of keys and of values.

    Raises:
        ValueError: a dtype that is not supported, a config without the sizes, or a head size that 16 does not divide
            with ``"nvfp4"``.
    """
    if dtype not in _CACHE_BITS or (token_scales and dtype != "fp8"):
        raise ValueError(f"dtype is {dtype!r}; supported: {', '.join(_CACHE_BITS)}, token_scales with 'fp8'")
    config = config.get("text_config") or config
    try:
        layers, q_heads = config["num_hidden_layers"], config["num_attention_heads"]
        heads = config.get("num_key_value_heads") or q_heads
        head = config.get("head_dim") or config["hidden_size"] // q_heads
    except KeyError as error:
        raise ValueError(f"the config has no {error}") from None
    blocks = -(-tokens // block_size)
    window = _windows(config, layers)
    kept = sum(blocks if w is None else min(blocks, -(-(w - 1) // block_size) + 1) for w in window)
    if dtype == "nvfp4" and head % 16:
        raise ValueError(f"heads of {head} with dtype 'nvfp4'; supported: multiples of 16")
    scales = head // 16 if dtype == "nvfp4" else 4 if token_scales else 0
    of_head = head * _CACHE_BITS[dtype] // 8 + scales
    return 2 * kept * block_size * heads * of_head


def _windows(config: Mapping[str, Any], layers: int) -> list[int | None]:
    """The sliding window of each layer, None for a full one."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return [None] * layers
    if types := config.get("layer_types"):
        return [window if kind == "sliding_attention" else None for kind in types]
    # Gemma 3 before layer_types: every sixth layer is full.
    if pattern := config.get("sliding_window_pattern"):
        return [None if (i + 1) % pattern == 0 else window for i in range(layers)]
    return [window] * layers
