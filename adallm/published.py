"""Figures that others published, each with its source, to set beside our own. Nothing here was measured by us."""

from __future__ import annotations

import math
from typing import Any

RAZER = "RaZeR, arXiv 2501.04052, table 3"
ADALLM = "the AdaLLM project that this one follows"

# WikiText-2 perplexity of a token; weights quantized, activations in 16 bits.
_WIKITEXT = {
    "Llama-3.1-8B": {
        "FP16": 6.24,
        "NVFP4": 6.63,
        "MXFP4": 7.04,
        "NVFP4, four-over-six": 6.60,
        "NVFP4, GPTQ": 6.59,
        "RaZeR": 6.50,
    },
    "Qwen3-8B": {"FP16": 9.73, "NVFP4": 9.92, "MXFP4": 10.53, "NVFP4, four-over-six": 9.89},
}


def perplexity() -> list[dict[str, Any]]:
    """WikiText-2 perplexities under 4-bit weights, as flat rows.

    ``delta_bits = log2(perplexity / perplexity of FP16)`` is in bits a token, a unit in which models and texts compare
    better than in perplexity.
    """
    return [
        {
            "model": model,
            "task": "WikiText-2",
            "format": form,
            "perplexity": value,
            "delta_bits": math.log2(value / of_format["FP16"]),
            "source": RAZER,
        }
        for model, of_format in _WIKITEXT.items()
        for form, value in of_format.items()
    ]


# Qwen3-8B in NVFP4 on an RTX 4090: batch -> tokens a second, and the most memory. How long the prompts were, how many
# tokens were generated and what counts as memory is not known here.
_DECODE = {1: 37.8, 2: 72.2, 4: 149.0, 8: 297.0, 16: 469.0}
_PEAK_GB = 7.55


def throughput() -> list[dict[str, Any]]:
    """Decode throughput and memory on an RTX 4090, as flat rows with ``metric`` and ``value``.

    ``decode_tok_s`` is in tokens a second of all sequences together, ``peak_gb`` in 10^9 bytes, as published.
    """
    case = {"gpu": "RTX 4090", "model": "Qwen3-8B", "format": "NVFP4", "source": ADALLM}
    rows = [{**case, "metric": "decode_tok_s", "batch": batch, "value": value} for batch, value in _DECODE.items()]
    return [*rows, {**case, "metric": "peak_gb", "batch": None, "value": _PEAK_GB}]
