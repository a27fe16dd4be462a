"""Records drawn as figures: one style, SVG and PNG, the source of the numbers under each figure.

Figure functions take a record, rows or plain arrays and return a ``matplotlib.figure.Figure``; ``show`` saves it and
gives a notebook the very PNG that was saved. ``style`` holds what they share, ``training``, ``weights``,
``rules``, ``kernels``, ``roofline``, ``kv_cache`` and ``evaluation`` the figures.
"""

from adallm.plots.evaluation import divergence, loss_by_bits, perplexity, published
from adallm.plots.kernels import decode_attention, linear_speedup, throughput
from adallm.plots.kv_cache import kv_bytes, kv_fits, kv_magnitudes, kv_model
from adallm.plots.roofline import rooflines
from adallm.plots.rules import rule_errors, rule_outputs, rule_perplexity
from adallm.plots.style import COLORS, HATCHES, STYLE, TITLES, save, show, source_of, table
from adallm.plots.training import recipes, training_curve
from adallm.plots.weights import block, block_sizes, grids, scale_formats, sqnr, sqnr_by_layer

__all__ = [
    "COLORS",
    "HATCHES",
    "STYLE",
    "TITLES",
    "block",
    "block_sizes",
    "decode_attention",
    "divergence",
    "grids",
    "kv_bytes",
    "kv_fits",
    "kv_magnitudes",
    "kv_model",
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
    "training_curve",
]
