"""Records drawn as figures: one style, SVG and PNG, the source of the numbers under each figure.

Figure functions take a record, rows or plain arrays and return a ``matplotlib.figure.Figure``; ``show`` saves it and
gives a notebook the very PNG that was saved. ``style`` holds what they share, ``training``, ``weights``,
``rules``, ``kernels``, ``engines``, ``latency``, ``projection``, ``roofline``, ``kv_cache`` and ``evaluation`` the
figures.
"""

from adallm.plots.engines import engine_memory, fp8_cache, throughput, tokens_per_second
from adallm.plots.evaluation import divergence, loss_by_bits, perplexity, published
from adallm.plots.kernels import decode_attention, linear_speedup
from adallm.plots.kv_cache import kv_bytes, kv_fits, kv_magnitudes, kv_model
from adallm.plots.latency import latencies
from adallm.plots.projection import decode_projection
from adallm.plots.roofline import rooflines
from adallm.plots.rules import rule_errors, rule_outputs, rule_perplexity
from adallm.plots.style import COLORS, HATCHES, STYLE, TITLES, save, show, source_of, table
from adallm.plots.training import recipes, training_curve
from adallm.plots.weights import block, block_sizes, global_scales, grids, scale_formats, sqnr, sqnr_by_layer

__all__ = [
    "COLORS",
    "HATCHES",
    "STYLE",
    "TITLES",
    "block",
    "block_sizes",
    "decode_attention",
    "decode_projection",
    "divergence",
    "engine_memory",
    "fp8_cache",
    "global_scales",
    "grids",
    "kv_bytes",
    "kv_fits",
    "kv_magnitudes",
    "kv_model",
    "latencies",
    "linear_speedup",
    "loss_by_bits",
    "perplexity",
    "published",
    "recipes",
    "rooflines",
    "rule_errors",
    "rule_outputs",
    "rule_perplexity",
    "save",
    "scale_formats",
    "show",
    "source_of",
    "sqnr",
    "sqnr_by_layer",
    "table",
    "throughput",
    "tokens_per_second",
    "training_curve",
]
