"""Perplexity of the bundled model under every rule for scales, W4A16 and W4A8, on the same windows.

========================  ==========================================================================================
``bits_per_byte``         of the held-out text, and its standard error
``delta``                 that above BF16's; ``delta_stderr`` from the difference in each window (``evaluate.py``)
``above_gptq``            that above GPTQ's under the same format, likewise with ``above_gptq_stderr``
========================  ==========================================================================================

``imatrix`` and ``gptq`` read ``windows.TOKENS`` tokens of text that is not held out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adallm import calibrated, evaluate, results
from adallm.checkpoint.quantize import RULES
from adallm.hf_model import FORMATS
from adallm.text import table
from adallm.tiny import corpus

__all__ = ["RULES", "main", "report"]

BASE, BEST = "bf16", "gptq"
QUANTIZED = ("nvfp4", "nvfp4-w4a8")


def measure(limit: int | None = None) -> list[dict[str, Any]]:
    """All rows, ``"gptq"`` among them; ``limit`` documents of each."""
    base = _measured(BASE, "max", limit)
    rows = [_row(base, None, base, None)]
    for form in QUANTIZED:
        found = {rule: _measured(form, rule, limit) for rule in RULES}
        rows += [_row(measured, rule, base, found[BEST]) for rule, measured in found.items()]
    return rows


def _measured(form: str, rule: str, limit: int | None) -> dict[str, Any]:
    options = {"task": evaluate.DEFAULT_TASK, "limit": limit, "format": form, "scale_rule": rule, "backend": "hf"}
    measured = evaluate.cached(evaluate.BUNDLED_MODEL, options, progress=False)
    print(f"{form} {rule}: {measured['bits_per_byte']:.5f} bits per byte", flush=True)
    return measured


def _row(
    measured: Mapping[str, Any], rule: str | None, base: Mapping[str, Any], best: Mapping[str, Any] | None
) -> dict[str, Any]:
    row = {
        "model": evaluate.BUNDLED_NAME,
        "format": measured["format"],
        "rule": rule,
        "from_text": rule in calibrated.RULES,
        "windows": len(measured["windows"]),
        "bits_per_byte": measured["bits_per_byte"],
        "stderr": measured["stderr"],
    }
    for name, other in (("delta", base), ("above_gptq", best)):
        found = (None, None) if other is None else evaluate.difference(measured, other)
        row |= dict(zip((name, f"{name}_stderr"), found, strict=True))
    return row


def report(rows: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """The rows as a table."""
    lines = [
        [
            FORMATS[row["format"]].title,
            row["rule"] or "",
            f"{row['bits_per_byte']:.4f}",
            "" if row["rule"] is None else f"{row['delta']:+.4f} ± {row['delta_stderr']:.4f}",
            "" if row["rule"] in (None, BEST) else f"{row['above_gptq']:+.4f} ± {row['above_gptq_stderr']:.4f}",
        ]
        for row in rows
    ]
    header = ("format", "rule", "bits per byte", "above BF16", "above gptq")
    return table(header, lines, align="llrrr", markdown=markdown)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``results/rules/<slug>.json``."""
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.rules", description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=int, metavar="N", help="documents to use (default: all)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="root of the records (default: results)")
    options = parser.parse_args(argv)
    provenance = results.provenance(seed=0)
    rows = measure(options.limit)
    print(report(rows))
    source = corpus.describe(evaluate.documents())
    # A part does not take the place of the whole.
    slug = results.slug(provenance["gpu"])
    name = slug if options.limit is None else f"{slug}-first-{options.limit}"
    given = {"name": name, "root": options.out, "corpus": source, "limit": options.limit}
    path = results.write("rules", rows, provenance=provenance, **given)
    print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
