"""What differs between the releases of vLLM that are supported, 0.26 to 0.32, and between its platforms."""

from __future__ import annotations

from typing import Any

# Compute capabilities: the first and the last that the kernels are for, and the first with FP8 cores.
FIRST, FP8, LAST = (8, 0), (8, 9), (9, 0)

# Tokens of the steps that CUDA graphs are made for: vLLM's own choice, which ends at 512, and on to steps of a few
# prompts, which the host may take longer to launch than the GPU to compute.
_VLLMS_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
GRAPH_SIZES = (*_VLLMS_SIZES, *range(576, 1025, 64), *range(1152, 2049, 128), *range(2304, 4097, 256))


def capability() -> tuple[int, int] | None:
    """Of the CUDA GPU, without a context on it; None on a CPU."""
    from vllm.platforms import current_platform

    found = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return None if found is None else (found.major, found.minor)


def unsuitable() -> str | None:
    """Why the plugin has nothing to do on this machine; None where it has."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    if not current_platform.is_cuda():
        return f"{current_platform.device_name} is no CUDA GPU"
    found = capability()
    if found is None or found < FIRST:
        return f"the kernels need sm_80, the GPU is {found}"
    if found > LAST:
        return f"vLLM has kernels for the FP4 cores of sm_{found[0]}{found[1]}"
    return None


def is_nvfp4(method: Any) -> bool:
    """Whether a linear method of vLLM runs NVFP4 weights in ModelOpt's layout."""
    from vllm.model_executor.layers.quantization import modelopt

    if hasattr(modelopt, "ModelOptLinearMethod"):
        return isinstance(method, modelopt.ModelOptLinearMethod) and method.spec.weight == modelopt.kNvfp4Static
    return isinstance(method, (modelopt.ModelOptNvFp4LinearMethod, modelopt.ModelOptNvFp4W4A16LinearMethod))
