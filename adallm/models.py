"""What the ``config.json`` of known models says of their size: the fields that weights and KV cache depend on.

Sources: the repositories ``Qwen/Qwen3-8B``, ``Qwen/Qwen3-32B``, ``meta-llama/Llama-3.1-8B``,
``meta-llama/Llama-3.1-70B`` and ``google/gemma-3-27b-it`` on the Hugging Face hub. Of Gemma 3 this is the text model,
with what its ``text_config`` leaves to the defaults of ``Gemma3TextConfig``; the vision tower is left out. Every sixth
of its layers is full, the others see 1,024 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_QWEN3 = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "sliding_window": None,
    # Without YaRN, which stretches them.
    "max_position_embeddings": 40960,
}
_LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}

MODELS: dict[str, Mapping[str, Any]] = {
    "Qwen3-8B": _QWEN3
    | {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
    "Qwen3-32B": _QWEN3
    | {"num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64},
    "Llama-3.1-8B": _LLAMA
    | {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "Llama-3.1-70B": _LLAMA
    | {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
    "Gemma3-27B": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 62,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "vocab_size": 262208,
        "tie_word_embeddings": True,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 131072,
    },
}
