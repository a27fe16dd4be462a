"""One line for each record: what it says first, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adallm import results
from adallm.bench import _attention_summary, _e2e_summary, _linear_summary, global_scale
from adallm.text import rounded_down

Rows = Sequence[Mapping[str, Any]]
HEADER = ("experiment", "machine", "date", "commit", "rows", "headline")


def headline(record: Mapping[str, Any]) -> str:
    """``"-"`` for an experiment that has none, or a record without the rows that it is made of."""
    make = _HEADLINES.get(record["experiment"])
    try:
        return make(record["rows"]) if make else "-"
    except (KeyError, IndexError, StopIteration, ValueError):
        return "-"


def lines(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line under ``HEADER`` for each record; a commit with ``+`` had changes."""
    found = []
    for record in records:
        p = record["provenance"]
        commit = (p["commit"] or "-")[:9] + ("+" if p["dirty"] else "")
        machine = (p["gpu"] or "CPU").removeprefix("NVIDIA ")
        rows = f"{len(record['rows']):,}"
        found.append((record["experiment"], machine, p["date"][:10], commit, rows, headline(record)))
    return found


def _attention(rows: Rows) -> str:
    groups = _attention_summary.summary(rows)["groups"]
    one = next(g for g in groups if g["group"] == "all" and g["against"] == "vs_sm89")
    least = rounded_down(one["minimum"])
    return f"{one['geomean']:.2f} times the best sm_89 peer in {one['cases']} cases, {least} at least"


def _linear(rows: Rows) -> str:
    groups = _linear_summary.summary(rows)["groups"]
    parts = [
        f"{g['geomean']:.2f} ({g['group']})"
        for g in groups
        if g["impl"] == _linear_summary.BETTER and g["against"] == "vs_w4"
    ]
    return f"times the best W4 peer: {', '.join(parts)}" if parts else "-"


def _vllm_e2e(rows: Rows) -> str:
    one = next(c for c in _e2e_summary.summary(rows) if (c["metric"], c["batch"]) == ("decode_tok_s", 1))
    against = [f"{one[key]:.2f} times {of}" for key, of in (("vs_stock", "stock"), ("vs_bf16", "BF16")) if one[key]]
    return ", ".join([f"{one['model']} decode x1 {one['value']:.0f} tok/s", *against])


def _eval(rows: Rows) -> str:
    base, *others = rows
    parts = [f"{row['title']} {row['delta']:+.4f}" for row in others if row["format"] in ("nvfp4", "nvfp4-w4a8")]
    return f"bits per byte: {base['title']} {base['bits_per_byte']:.4f}, {', '.join(parts)}"


def _rules(rows: Rows) -> str:
    of = {row["rule"]: row["delta"] for row in rows if row["format"] == "nvfp4"}
    best = min(of, key=of.__getitem__)
    return f"bits per byte above BF16, W4A16: max {of['max']:+.4f}, {best} {of[best]:+.4f}"


def _quantizers(rows: Rows) -> str:
    of = {r["rule"]: r["vs_max"] for r in rows if (r["source"], r["format"]) == ("tiny", "nvfp4")}
    parts = [f"{rule} {of[rule]:.2f}" for rule in ("four_over_six", "mse") if rule in of]
    return f"squared error over the max rule's, bundled model: {', '.join(parts)}" if parts else "-"


def _quantize_speed(rows: Rows) -> str:
    largest = max(row["n"] * row["k"] for row in rows)
    of = {r["rule"]: r["mweights_s"] for r in rows if r["n"] * r["k"] == largest and r["op"] == "quantize"}
    return f"M weights a second: max {of['max']:.0f}, mse {of['mse']:.1f}"


def _convert(rows: Rows) -> str:
    return f"{rows[0]['model']} in " + ", ".join(f"{row['s']:.0f} s ({row['rule']}, {row['device']})" for row in rows)


def _divergence(rows: Rows) -> str:
    of = {row["format"]: row for row in rows if row["text"] == "held out"}
    parts = [f"{row['title']} {row['kl']:.4f}" for name, row in of.items() if name in ("nvfp4", "mxfp4", "int4-g128")]
    return f"nats a token from BF16: {', '.join(parts)}"


def _global_scale(rows: Rows) -> str:
    found = [global_scale.plateau(rows, source) for source in dict.fromkeys(row["source"] for row in rows)]
    return f"within 1% from 2^{max(low for low, _ in found)} to 2^{min(high for _, high in found)} of the max rule's"


def _kv_cache(rows: Rows) -> str:
    of = {row["title"]: row["delta"] for row in rows if row["part"] == "perplexity" and row["cache"] != "bf16"}
    return f"bits per byte above a BF16 cache: {'; '.join(f'{title} {delta:+.4f}' for title, delta in of.items())}"


def _sm89(rows: Rows) -> str:
    builds = [row for row in rows if row.get("spills") is not None]
    spilling = sum(row["spills"] > 0 for row in builds)
    return f"{len(builds)} builds, {spilling} with spills"


def _tiny_training(rows: Rows) -> str:
    last = max(row["epoch"] for row in rows)
    row = next(row for row in rows if (row["epoch"], row["split"]) == (last, "heldout"))
    return f"{row['bits_per_byte']:.4f} bits per byte held out after {last} epochs"


def _tiny_recipes(rows: Rows) -> str:
    best = min((row for row in rows if row["split"] == "validation"), key=lambda row: row["bits_per_byte"])
    return f"best on validation: {best['recipe']}, {best['bits_per_byte']:.4f} bits per byte"


def _tune(rows: Rows) -> str:
    cases = {(row["kind"], row["m"], row["n"], row["k"]) for row in rows}
    return f"{len(cases)} products, {len(rows):,} times"


_HEADLINES: dict[str, Callable[[Rows], str]] = {
    "attention": _attention,
    "convert": _convert,
    "divergence": _divergence,
    "eval": _eval,
    "global_scale": _global_scale,
    "kv_cache": _kv_cache,
    "linear": _linear,
    "quantize_speed": _quantize_speed,
    "quantizers": _quantizers,
    "rules": _rules,
    "sm89": _sm89,
    "tiny_recipes": _tiny_recipes,
    "tiny_training": _tiny_training,
    "tune": _tune,
    "vllm_e2e": _vllm_e2e,
}


def records(experiments: Sequence[str], root: Any = None) -> list[dict[str, Any]]:
    """All records of some experiments, or of all if none is named.

    Raises:
        ValueError: an experiment without a record; it names those that have one.
    """
    folder = root or results.default_root()
    known = sorted(path.parent.name for path in folder.glob("*/*.json"))
    for name in experiments:
        if name not in known:
            raise ValueError(f"no record of {name!r} in {folder.name}/; there are: {', '.join(dict.fromkeys(known))}")
    wanted = dict.fromkeys(experiments or known)
    return [record for name in wanted for record in results.read_all(name, root=folder).values()]
