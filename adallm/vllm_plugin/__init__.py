"""vLLM with these kernels: ``pip install adallm`` beside vLLM, and NVFP4 checkpoints run on GPUs without FP4 cores.

vLLM finds ``register`` by the entry point ``vllm.general_plugins`` and calls it in each of its processes.

===========================  ======================================  =============================================
environment                  ``--additional-config`` ``adallm``      meaning
===========================  ======================================  =============================================
``ADALLM_ACTIVATIONS``       ``activations``: bf16, fp8, auto        W4A16, W4A8, or by the number of tokens
``ADALLM_LM_HEAD``           ``lm_head``: checkpoint, fp8, nvfp4     a BF16 ``lm_head`` as it is, or quantized
``ADALLM_ALLOW_FALLBACK=1``  ``allow_fallback``: true, false         layers that our kernels do not run go to vLLM's
``ADALLM_FUSE=0``            ``fuse``: true, false                   RMSNorm and SiLU are left to ``torch.compile``
``ADALLM_DISABLE=1``                                                 vLLM as if this package was not there
===========================  ======================================  =============================================
"""

from __future__ import annotations

import importlib.metadata
import logging
import os

logger = logging.getLogger("vllm.adallm")


def disabled() -> bool:
    """Whether ``ADALLM_DISABLE`` says so."""
    return os.environ.get("ADALLM_DISABLE", "") not in ("", "0")


def not_found() -> str | None:
    """Why vLLM would not load the plugin, in words; None where it would."""
    if not any(point.name == "adallm" for point in importlib.metadata.entry_points(group="vllm.general_plugins")):
        return "vLLM does not find the plugin; install this package: pip install adallm, or -e . from source"
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "adallm" not in plugins.split(","):
        return f"VLLM_PLUGINS is {plugins!r}, and vLLM loads these plugins only; add adallm, or unset it"
    return None


def register() -> None:
    """Tell vLLM of ``config.NVFP4Config``, if this machine is one that it is for: a CPU, or a GPU from sm_80 to sm_90.

    Quiet, and does nothing the second time. Nothing of vLLM is replaced.
    """
    if disabled():
        return
    from adallm.vllm_plugin import compat

    reason = compat.unsuitable()
    if reason is not None:
        logger.debug("adallm: not used, %s", reason)
        return
    from adallm.vllm_plugin.config import register_config

    register_config()
