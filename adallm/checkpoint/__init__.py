"""Hugging Face directories with NVFP4 weights: read, write and convert the two layouts in use.

================  =======================================  ==============================================
                  ModelOpt                                 compressed-tensors ``nvfp4-pack-quantized``
================  =======================================  ==============================================
weight            ``weight`` U8 [N, K/2]                   ``weight_packed`` U8 [N, K/2]
block scale       ``weight_scale`` F8_E4M3 [N, K/16]       the same
global scale      ``weight_scale_2`` F32 [], multiplies    ``weight_global_scale`` F32 [1], divides
activation scale  ``input_scale`` F32 [], multiplies       ``input_global_scale`` F32 [1], divides
KV-cache scales   ``k_proj.k_scale``, ``v_proj.v_scale``   ``k_scale``, ``v_scale`` of the attention
declared in       ``hf_quant_config.json`` and             ``quantization_config`` of ``config.json``
                  ``quantization_config``
================  =======================================  ==============================================

Only safetensors are read, never pickles; headers, index and config are checked before a tensor is, and whatever is
damaged or contradicts itself is a ``CheckpointError`` that names the file and the tensor.
"""

from adallm.checkpoint.compare import LayerError, errors, total
from adallm.checkpoint.convert import Conversion, convert, plan
from adallm.checkpoint.errors import CheckpointError
from adallm.checkpoint.kv_scales import attention_layers, write_kv_scales
from adallm.checkpoint.opened import quantization_of
from adallm.checkpoint.quantization import Group, Quantization, Scheme
from adallm.checkpoint.reader import load, load_dense
from adallm.checkpoint.table import Row, inspect

__all__ = [
    "CheckpointError",
    "Conversion",
    "Group",
    "LayerError",
    "Quantization",
    "Row",
    "Scheme",
    "attention_layers",
    "convert",
    "errors",
    "inspect",
    "load",
    "load_dense",
    "plan",
    "quantization_of",
    "total",
    "write_kv_scales",
]
