"""What an FP8 KV cache costs: error of attention by magnitude and by layer, and perplexity, for three kinds of scales.

==============  ====================================================================================================
``magnitude``   Gaussian keys and values of standard deviation 2^e, with queries that keep the logits as they are:
                ``rel_err`` of attention's output against FP32 over keys and values that were not rounded
``layer``       the same for each layer of the bundled model on held-out text, FP32 arithmetic, with the shares of
                keys and values that scale and format leave as subnormals or cut
``perplexity``  bits per byte of the bundled model with NVFP4 weights; ``delta`` above that with a BF16 cache and
                ``above_one`` above that with scale 1, with errors from the difference in each window
==============  ====================================================================================================

Caches: scale 1; one calibrated scale a layer for keys and one for values, ``amax / 448`` over text that is not held out
(``calibrate.py``; for ``magnitude`` over another draw); ``amax / 448`` for each token and head. NVFP4 along the heads,
which no kernel here reads, is an outlook. ``rel_err_stderr`` is a jackknife over draws, or over windows.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adallm import calibrate, checkpoint, evaluate, results
from adallm.bench import _kv_error
from adallm.bench._cases import check_errors
from adallm.bench._kv_error import CACHES
from adallm.bench._kv_observe import held_out, keys_and_values
from adallm.text import table
from adallm.tiny import corpus

__all__ = ["CACHES", "main", "measure", "measure_layers", "measure_magnitudes", "report"]

EXPONENTS = tuple(range(-14, 13))
DRAWS = 4
WINDOWS = 9
QUERIES = 8
# A cache in BF16 adds no more than BF16's rounding, 2^-9 of each number.
LIMITS = {"rel_err": 2.0**-7}
_TOKENS, _KV_HEADS, _Q_HEADS, _SIZE = 1024, 2, 8, 128
_PERPLEXITY = {
    "bf16": "nvfp4",
    "fp8-one": "nvfp4-fp8kv",
    "fp8-calibrated": "nvfp4-fp8kv",
    "fp8-token": "nvfp4-fp8kv-token",
}


def measure_magnitudes(exponents: Sequence[int] = EXPONENTS, draws: int = DRAWS) -> list[dict[str, Any]]:
    """Rows of ``magnitude``: the same draws at every magnitude, so that only the format can tell them apart."""
    lengths = range(_TOKENS // 4, _TOKENS + 1, _TOKENS // 4)
    drawn, scales = [], []
    for draw in range(draws):
        g = torch.Generator().manual_seed(draw)
        q = torch.randn(len(lengths), QUERIES, _Q_HEADS, _SIZE, generator=g)
        k, v, *others = (torch.randn(_TOKENS, _KV_HEADS, _SIZE, generator=g) for _ in range(4))
        drawn.append((q, k, v))
        scales.append([_kv_error.scale_of(x) for x in others])
    rows = []
    for e in exponents:
        s = 2.0**e
        parts = [
            _kv_error.squares(q / s, k * s, v * s, lengths, k_scale * s, v_scale * s)
            for (q, k, v), (k_scale, v_scale) in zip(drawn, scales, strict=True)
        ]
        rows += _errors({"part": "magnitude", "log2_std": e, "draws": draws}, parts)
    return rows


def measure_layers(
    scales: Sequence[calibrate.LayerScales], windows: Sequence[Tensor], model: Path = evaluate.BUNDLED_MODEL
) -> list[dict[str, Any]]:
    """Rows of ``layer``: attention of the last tokens of eight lengths, up to all, in each window.

    Args:
        scales: of each layer, as ``calibrate.calibrate`` finds them.
        windows: token ids, each as many as the others, a multiple of 128.
    """
    lengths = range(len(windows[0]) // 8, len(windows[0]) + 1, len(windows[0]) // 8)
    seen = keys_and_values(model, windows)
    rows = []
    for i, layer in enumerate(scales):
        parts = []
        for q, k, v in (of_window[i] for of_window in seen):
            last = torch.stack([q[n - QUERIES : n] for n in lengths])
            parts.append(_kv_error.squares(last, k, v, lengths, layer.k_scale, layer.v_scale))
        both = [torch.stack([of_window[i][side] for of_window in seen]) for side in (1, 2)]
        case = {"part": "layer", "layer": i, "windows": len(windows)}
        case |= {"k_amax": float(both[0].abs().amax()), "v_amax": float(both[1].abs().amax())}
        for row in _errors(case, parts):
            calibrated = row["cache"] == "fp8-calibrated"
            if calibrated or row["cache"] == "fp8-one":
                for side, x, scale in zip("kv", both, (layer.k_scale, layer.v_scale), strict=True):
                    used = scale if calibrated else 1.0
                    subnormal, saturated = _kv_error.shares(x, used)
                    row |= {f"{side}_scale": used, f"{side}_subnormal": subnormal, f"{side}_saturated": saturated}
            rows.append(row)
    return rows


def _errors(case: Mapping[str, Any], parts: Sequence[Mapping[str, tuple[float, float]]]) -> list[dict[str, Any]]:
    rows = []
    for cache, title in CACHES.items():
        of_cache = [part[cache] for part in parts]
        errors = {"rel_err": _kv_error.pooled(of_cache), "rel_err_stderr": _kv_error.spread(of_cache)}
        if cache == "bf16":
            check_errors(errors, LIMITS, ours=True)
        rows.append({**case, "cache": cache, "title": title, **errors})
    return rows


def measure_perplexity(calibrated: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of ``perplexity``.

    Args:
        calibrated: the bundled model in NVFP4 with calibrated scales for its cache.
        limit: documents to use, all by default.
    """
    measured: dict[str, dict[str, Any]] = {}
    for cache, form in _PERPLEXITY.items():
        options = {"task": evaluate.DEFAULT_TASK, "limit": limit, "format": form, "scale_rule": "max", "backend": "hf"}
        if cache == "fp8-calibrated":
            measured[cache] = evaluate.perplexity(calibrated, **options)
        else:
            measured[cache] = evaluate.cached(evaluate.BUNDLED_MODEL, options, progress=False)
        print(f"{CACHES[cache]}: {measured[cache]['bits_per_byte']:.5f} bits per byte", flush=True)
    rows = []
    for cache, found in measured.items():
        row = {"part": "perplexity", "cache": cache, "title": CACHES[cache], "model": evaluate.BUNDLED_NAME}
        row |= {name: found[name] for name in ("tokens", "bytes", "bits_per_byte", "stderr")}
        row |= {"windows": len(found["windows"])}
        for name, base in (("delta", "bf16"), ("above_one", "fp8-one")):
            row |= dict(zip((name, f"{name}_stderr"), evaluate.difference(found, measured[base]), strict=True))
        rows.append(row)
    return rows


def measure(windows: int = WINDOWS, limit: int | None = None) -> list[dict[str, Any]]:
    """All rows; ``windows`` for the layers, ``limit`` documents for perplexity."""
    with tempfile.TemporaryDirectory(prefix="adallm-kv-") as scratch:
        nvfp4 = checkpoint.convert(evaluate.BUNDLED_MODEL, Path(scratch) / "nvfp4").path
        found = calibrate.calibrate(nvfp4, Path(scratch) / "calibrated")
        print(f"calibrated on {found.tokens:,} tokens", flush=True)
        rows = measure_magnitudes() + measure_layers(found.layers, held_out(windows))
        return rows + measure_perplexity(found.path, limit)


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two tables: error of each layer, and perplexity."""
    layers = [row for row in rows if row["part"] == "layer"]
    error = {(row["layer"], row["cache"]): f"{row['rel_err']:.4f}" for row in layers}
    lines = [[str(i), *(error[i, cache] for cache in CACHES)] for i in sorted({row["layer"] for row in layers})]
    first = table(["layer", *CACHES.values()], lines, align="r" * (1 + len(CACHES)))
    lines = [
        [
            row["title"],
            f"{row['bits_per_byte']:.5f}",
            f"{row['delta']:+.5f} ± {row['delta_stderr']:.5f}",
            f"{row['above_one']:+.5f} ± {row['above_one_stderr']:.5f}",
        ]
        for row in rows
        if row["part"] == "perplexity"
    ]
    return first + "\n\n" + table(["cache", "bits per byte", "above BF16", "above scale 1"], lines, align="lrrr")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``results/kv_cache/<slug>.json``."""
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.kv_cache", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, metavar="N", help="for the layers (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents for perplexity (default: all)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="root of the records (default: results)")
    options = parser.parse_args(argv)
    provenance = results.provenance(seed=0)
    rows = measure(options.windows, options.limit)
    print(report(rows))
    # A part does not take the place of the whole.
    whole = options.limit is None and options.windows == WINDOWS
    slug = results.slug(provenance["gpu"])
    given = {"name": slug if whole else f"{slug}-part", "root": options.out, "limit": options.limit}
    source = corpus.describe(evaluate.documents())
    path = results.write("kv_cache", rows, provenance=provenance, corpus=source, **given)
    print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
