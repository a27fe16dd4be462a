"""vLLM with these kernels: ``pip install adallm`` beside vLLM, and NVFP4 checkpoints run on GPUs without FP4 cores.

vLLM finds ``register`` by the entry point ``vllm.general_plugins`` and calls it in each of its processes.

===========================  ======================================  =============================================
environment                  ``--additional-config`` ``adallm``      meaning
===========================  ======================================  =============================================
``ADALLM_ACTIVATIONS``       ``activations``: bf16, fp8, auto        W4A16, W4A8, or by the number of tokens
``ADALLM_LM_HEAD``           ``lm_head``: checkpoint, nvfp4          a BF16 ``lm_head`` as it is, or quantized
``ADALLM_ALLOW_FALLBACK=1``  ``allow_fallback``: true, false         layers that our kernels do not run go to vLLM's
``ADALLM_DISABLE=1``                                                 vLLM as if this package was not there
===========================  ======================================  =============================================
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("vllm.adallm")


def register() -> None:
    """Tell vLLM of ``config.NVFP4Config``, if this machine is one that it is for: a CPU, or a GPU from sm_80 to sm_90.

    Quiet, and does nothing the second time. Nothing of vLLM is replaced.
    """
    if os.environ.get("ADALLM_DISABLE", "") not in ("", "0"):
        return
    from adallm.vllm_plugin import compat

    reason = compat.unsuitable()
    if reason is not None:
        logger.debug("adallm: not used, %s", reason)
        return
    from adallm.vllm_plugin.config import register_config

    register_config()
