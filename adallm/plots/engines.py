"""vLLM end to end, by implementation: throughput and memory. All of it is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from adallm.plots.style import COLORS, GREY, HATCHES, MARKERS, STYLE, new_figure, write_source

IMPLS = {
    "bf16": "BF16",
    "bf16-fp8kv": "BF16, FP8 cache",
    "stock-marlin-flashinfer": "Stock: Marlin, FlashInfer",
    "stock-marlin-triton": "Stock: Marlin, Triton",
    "stock-humming-flashinfer": "Stock: Humming, FlashInfer",
    "stock-humming-triton": "Stock: Humming, Triton",
    "stock-humming-flashinfer-graphs": "Stock: Humming, FlashInfer, more graphs",
    "stock-humming-triton-graphs": "Stock: Humming, Triton, more graphs",
    "stock-humming-bf16kv": "Stock: Humming, BF16 cache",
    "adallm-w4a16-bf16kv": "AdaLLM W4A16, BF16 cache",
    "adallm-w4a8-bf16kv": "AdaLLM W4A8, BF16 cache",
    "adallm-w4a16": "AdaLLM W4A16",
    "adallm-w4a8": "AdaLLM W4A8",
    "adallm-auto": "AdaLLM auto",
    "adallm-auto-graphs": "AdaLLM auto, more graphs",
    "adallm-auto-lm-head": "AdaLLM auto, NVFP4 lm_head",
    "adallm-auto-lm-head-graphs": "AdaLLM auto, NVFP4 lm_head, more graphs",
}
# A figure of few lines has these. Of stock vLLM with an FP8 cache the fastest in each case stands for all, and of one
# engine the faster of with CUDA graphs for steps of more tokens and without.
STOCK = "stock"
ENGINES = {
    "bf16": "BF16",
    STOCK: "the best of stock NVFP4",
    "adallm-w4a16": "AdaLLM W4A16",
    "adallm-w4a8": "AdaLLM W4A8",
    "adallm-auto-lm-head": "AdaLLM auto,\nNVFP4 lm_head",
    "adallm-auto": "AdaLLM auto",
}
_BF16_CACHE, _FP8_CACHE, _GRAPHS = "-bf16kv", "-fp8kv", "-graphs"

Key = tuple[str, int | None]


def throughput(record: Mapping[str, Any]) -> Any:
    """Tokens a second of vLLM by implementation: decode for each batch over that of BF16, and prefill."""
    values = _grouped(record)
    keys = sorted(values, key=lambda key: (key[0], key[1] or 0))
    impls = [impl for impl in ENGINES if any(impl in of for of in values.values())]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(8.5, 3.8))
        width = 0.85 / len(impls)
        for i, impl in enumerate(impls):
            found = [
                (group, values[key][impl] / values[key]["bf16"])
                for group, key in enumerate(keys)
                if {impl, "bf16"} <= values[key].keys()
            ]
            color, hatch, _ = look(impl)
            at = [group + (i - (len(impls) - 1) / 2) * width for group, _ in found]
            ratios = [ratio for _, ratio in found]
            bars = axes.bar(at, ratios, width, color=color, hatch=hatch, edgecolor="white", label=ENGINES[impl])
            axes.bar_label(bars, fmt="%.1f", fontsize=6, padding=1)
        axes.axhline(1, color=GREY, linewidth=0.8)
        axes.set_xticks(range(len(keys)), [_measure(*key, values[key].get("bf16")) for key in keys])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("sequences (tokens a second of BF16)")
        axes.set_ylabel("tokens a second over those of BF16")
        axes.set_title(f"{where(record)}, NVFP4 with an FP8 KV cache")
        figure.legend(loc="outside upper right", ncols=len(impls), fontsize=7)
        write_source(figure, record)
    return figure


def tokens_per_second(record: Mapping[str, Any]) -> Any:
    """Decode by batch, a line for each kind of engine, and prefill, a bar for each implementation: tokens a second."""
    values = _grouped(record)
    prefill = {row["impl"]: row["value"] for row in record["rows"] if row["metric"] == "prefill_tok_s"}
    batches = sorted(batch for metric, batch in values if metric == "decode_tok_s")
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(1, 2, size=(8.5, 4.0), width_ratios=(1.15, 1))
        for impl, title in ENGINES.items():
            of = {b: values["decode_tok_s", b][impl] for b in batches if impl in values["decode_tok_s", b]}
            if of:
                color, _, marker = look(impl)
                label = title.replace("\n", " ")
                left.plot(*zip(*of.items(), strict=True), color=color, marker=marker, markersize=4.5, label=label)
        left.set_xscale("log", base=2)
        left.set_yscale("log")
        left.set_xticks(batches, [str(batch) for batch in batches])
        left.yaxis.set_major_formatter("{x:,.0f}")
        left.set_xlabel("sequences")
        left.set_ylabel("tokens a second, all sequences")
        left.set_title(_decode(record))
        left.legend(fontsize=7)
        impls = [impl for impl in order(record) if impl in prefill]
        for y, impl in enumerate(impls):
            # As the same with the other cache, and hollow if that of NVFP4 weights is BF16.
            color, hatch, _ = look(_group(impl.removesuffix(_BF16_CACHE).removesuffix(_FP8_CACHE)))
            fill, edge = ("white", color) if impl.endswith(_BF16_CACHE) else (color, "white")
            bar = right.barh(y, prefill[impl], 0.75, color=fill, hatch=hatch, edgecolor=edge)
            right.bar_label(bar, fmt="{:,.0f}", fontsize=7, padding=2)
        names(right, impls)
        right.margins(x=0.16)
        right.xaxis.set_major_formatter("{x:,.0f}")
        right.locator_params(axis="x", nbins=4)
        right.set_xlabel("tokens of prompts a second")
        right.set_title(f"Prefill: {_prompts(record, 'prefill_tok_s')}")
        figure.suptitle(where(record), fontsize="medium", x=0.01, ha="left")
        write_source(figure, record)
    return figure


def fp8_cache(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Any:
    """Tokens a second with an FP8 cache over those with a BF16 cache, a bar for each implementation and measure.

    Args:
        rows: ``title``, ``metric``, ``batch``, ``ratio``, at least one.
        record: that they come from.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no rows: the record has no implementation with a BF16 cache and with an FP8 cache")
    keys = sorted({(row["metric"], row["batch"]) for row in rows})
    titles = list(dict.fromkeys(row["title"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(8.5, 3.6))
        width = 0.85 / len(titles)
        # BF16 has the first colour, here too.
        first = int(titles[0] != IMPLS["bf16"])
        for i, title in enumerate(titles):
            found = [(keys.index((row["metric"], row["batch"])), row["ratio"]) for row in rows if row["title"] == title]
            at = [group + (i - (len(titles) - 1) / 2) * width for group, _ in found]
            ratios = [ratio for _, ratio in found]
            bars = axes.bar(at, ratios, width, color=COLORS[first + i], hatch=HATCHES[first + i], edgecolor="white")
            bars.set_label(title)
            # A label below 1 stands on the line.
            for label in axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=1):
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=1)
        axes.set_xticks(range(len(keys)), [_measure(*key, None) for key in keys])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("sequences")
        axes.set_ylabel("FP8 cache over BF16 cache")
        axes.set_title(f"{where(record)}: tokens a second")
        figure.legend(loc="outside upper right", ncols=len(titles), fontsize=7)
        write_source(figure, record)
    return figure


def engine_memory(record: Mapping[str, Any]) -> Any:
    """GiB of weights, and what reading prompts takes beside them at most, a bar for each implementation.

    ``peak_gib`` counts the weights and leaves out the KV cache; of an implementation without it the weights are drawn.
    """
    of = {(row["impl"], row["metric"]): row["value"] for row in record["rows"]}
    impls = [impl for impl in order(record) if (impl, "weights_gib") in of]
    weights = [of[impl, "weights_gib"] for impl in impls]
    beside = [max(of.get((impl, "peak_gib"), held) - held, 0) for impl, held in zip(impls, weights, strict=True)]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(7.5, 1.4 + 0.26 * len(impls)))
        bars = axes.barh(range(len(impls)), weights, 0.75, color=COLORS[0], edgecolor="white", label="weights")
        axes.bar_label(bars, fmt="%.2f", fontsize=7, label_type="center", color="white")
        look = {"color": COLORS[1], "hatch": HATCHES[1], "edgecolor": "white"}
        bars = axes.barh(range(len(impls)), beside, 0.75, left=weights, label="beside them, at most", **look)
        axes.bar_label(bars, [f"{a + b:.2f}" for a, b in zip(weights, beside, strict=True)], fontsize=7, padding=3)
        names(axes, impls)
        axes.margins(x=0.08)
        axes.set_xlabel("GiB, without the KV cache; at the end of a bar, the whole")
        axes.set_title(f"{where(record)}: memory with {_prompts(record, 'peak_gib')}", pad=18)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 0.99), ncols=2, borderaxespad=0.2, fontsize=7)
        write_source(figure, record)
    return figure


def _group(impl: str) -> str | None:
    """The name in ``ENGINES`` that an implementation stands for; None for one with the other kind of cache."""
    if impl.endswith((_BF16_CACHE, _FP8_CACHE)):
        return None
    return STOCK if impl.startswith(STOCK) else impl.removesuffix(_GRAPHS)


def _grouped(record: Mapping[str, Any]) -> dict[Key, dict[str, float]]:
    """Decode and prefill: measure -> name in ``ENGINES`` -> tokens a second."""
    values: dict[Key, dict[str, float]] = {}
    for row in record["rows"]:
        group = _group(row["impl"])
        if row["metric"] in ("decode_tok_s", "prefill_tok_s") and group is not None:
            of = values.setdefault((row["metric"], row["batch"]), {})
            of[group] = max(row["value"], of.get(group, 0.0))
    return values


def look(impl: str) -> tuple[str, str, str]:
    """Colour, hatching and marker: of a name in ``ENGINES`` the same in every figure."""
    i = list(ENGINES).index(impl) if impl in ENGINES else len(COLORS) - 1
    return COLORS[i], HATCHES[i], MARKERS[i]


def order(record: Mapping[str, Any]) -> list[str]:
    """The implementations of a record as ``IMPLS`` has them, others behind."""
    there = dict.fromkeys(row["impl"] for row in record["rows"])
    return [*(impl for impl in IMPLS if impl in there), *(impl for impl in there if impl not in IMPLS)]


def names(axes: Any, impls: Sequence[str]) -> None:
    """Implementations from top to bottom."""
    axes.set_yticks(range(len(impls)), [IMPLS.get(impl, impl) for impl in impls], fontsize=7)
    axes.set_ylim(len(impls) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def where(record: Mapping[str, Any]) -> str:
    return f"vLLM with {record['rows'][0]['model']}'s shapes"


def _decode(record: Mapping[str, Any]) -> str:
    row = next(row for row in record["rows"] if row["metric"] == "decode_tok_s")
    return f"Decode: {row['new']} tokens behind each prompt of {row['prompt']}"


def _prompts(record: Mapping[str, Any], metric: str) -> str:
    """``"8 prompts of 2,048"``, or which metric is missing."""
    rows = [row for row in record["rows"] if row["metric"] == metric]
    return f"{rows[0]['batch']} prompts of {rows[0]['prompt']:,}" if rows else f"no {metric}"


def _measure(metric: str, batch: int | None, of_bf16: float | None) -> str:
    name = metric.removesuffix("_tok_s")
    return f"{name}\nx{batch}" + ("" if of_bf16 is None else f"\n({of_bf16:,.0f})")
