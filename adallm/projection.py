"""Decode throughput of a whole engine on a card that it was not measured on, from its record on another card.

A step of decoding reads every weight once, and the keys and values of every sequence. By a data sheet that takes::

    floor = max(bytes / DRAM bandwidth, operations / dense tensor rate)

Measured, it takes longer: ``t = batch / tokens a second``. What the rest, ``t - floor``, becomes on the other card is
not known, so there are two projections, and the truth is expected between them::

    same share: t' = floor' * t / floor          everything takes as many times longer as the floor does
    same rest:  t' = floor' + (t - floor)        what is beyond the floor takes the time that it took

The first suits what depends on memory, the second launches, synchronization and whatever the host does. From a card
with more bandwidth than the other the first is the lower throughput.

Left out: the other card's host and clocks, kernels that are slower there for want of instruction slots or of ``wgmma``
(``adallm.sm89`` counts those), the L2 cache, activations, and the operations of attention. ``check`` compares such a
projection with a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adallm import hardware, memory
from adallm.hardware import GPU, GPUS
from adallm.models import MODELS

METRIC = "decode_tok_s"
# Bytes of a weight of lm_head, by what multiplies it, as the row's path calls it.
_HEADS = {"adallm W4A16": 9 / 16, "adallm W8A8": 1.0, "Unquantized": 2.0}


@dataclass(frozen=True)
class Step:
    """What a step of decoding takes of a card.

    Attributes:
        nbytes: that are read: linear layers, norms, ``lm_head``, keys and values. Of the embedding a row is read.
        operations: of linear layers and ``lm_head``.
        fp8: whether the linear layers multiply in FP8.
    """

    nbytes: float
    operations: float
    fp8: bool

    def floor(self, gpu: GPU) -> tuple[float, str]:
        """Seconds, and what takes them: ``"memory"`` or ``"tensor"``."""
        rate = gpu.fp8_tflops if self.fp8 else gpu.fp16_tflops
        seconds = {"memory": self.nbytes / gpu.dram_gb_s / 1e9, "tensor": self.operations / rate / 1e12}
        bound = max(seconds, key=seconds.__getitem__)
        return seconds[bound], bound


def step(row: Mapping[str, Any]) -> Step:
    """Of a row ``decode_tok_s``: formats by its ``path``, and half of the new tokens in the cache, on average.

    Raises:
        ValueError: a model without a configuration here, or a path that names no ``lm_head`` that is known.
    """
    if row["model"] not in MODELS:
        raise ValueError(f"model {row['model']!r}; supported: {', '.join(MODELS)}")
    config = {**MODELS[row["model"]], "num_hidden_layers": row["layers"]}
    linear, _, rest = row["path"].partition(", head ")
    head = next((size for name, size in _HEADS.items() if rest.startswith(name)), None)
    if head is None:
        raise ValueError(f"path {row['path']!r} has no known lm_head; supported: {', '.join(_HEADS)}")
    weights = "bf16" if linear.startswith("Unquantized") else "nvfp4"
    vocabulary = config["vocab_size"] * config["hidden_size"]
    embeddings = vocabulary * (1 if config["tie_word_embeddings"] else 2)
    layers = memory.weight_bytes(config, weights) - 2 * embeddings
    parameters = memory.weight_bytes(config, "bf16") / 2 - embeddings + vocabulary
    cache = "fp8" if "KV cache fp8" in row["path"] else "bf16"
    kept = memory.cache_bytes(config, row["prompt"] + row["new"] // 2, cache)
    nbytes = layers + head * vocabulary + row["batch"] * kept
    return Step(nbytes, 2 * parameters * row["batch"], "W4A8" in linear)


def decode(record: Mapping[str, Any], gpu: str, *, impls: Sequence[str]) -> list[dict[str, Any]]:
    """Projected decode throughput on ``gpu``, a row for each implementation and batch of a ``vllm_e2e`` record.

    Returns:
        Rows ``impl``, ``batch``, ``gpu``; ``measured_on`` and ``measured``, tokens a second there; ``share``, the floor
        over the time there; ``low`` and ``high``, the two projections in tokens a second; ``roof``, tokens a second at
        the floor of ``gpu``, and its ``bound``. Ordered as ``impls``, then by batch.

    Raises:
        ValueError: a card of the record, or ``gpu``, without a data sheet; as ``step``.
    """
    here = hardware.find(record["provenance"]["gpu"])
    if here is None or gpu not in GPUS:
        missing = record["provenance"]["gpu"] if here is None else gpu
        raise ValueError(f"no data sheet of {missing!r}; supported: {', '.join(GPUS)}")
    rows = [row for row in record["rows"] if row["metric"] == METRIC and row["impl"] in impls]
    rows.sort(key=lambda row: (impls.index(row["impl"]), row["batch"]))
    return [_projected(row, here, gpu) for row in rows]


def _projected(row: Mapping[str, Any], here: str, gpu: str) -> dict[str, Any]:
    of = step(row)
    batch, seconds = row["batch"], row["batch"] / row["value"]
    (floor, _), (there, bound) = of.floor(GPUS[here]), of.floor(GPUS[gpu])
    both = (batch * floor / (seconds * there), batch / (there + seconds - floor))
    found = {"impl": row["impl"], "batch": batch, "gpu": gpu, "measured_on": here, "measured": row["value"]}
    found |= {"share": floor / seconds, "low": min(both), "high": max(both)}
    return found | {"roof": batch / there, "bound": bound}


def nearest(known: Sequence[Mapping[str, Any]], gpu: str, *, impls: Sequence[str]) -> Mapping[str, Any] | None:
    """The record to project from: of those with a row of ``impls``, that of the card whose bandwidth is nearest.

    None where there is none, or of cards without a data sheet alone.
    """

    def distance(record: Mapping[str, Any]) -> float:
        ratio = GPUS[hardware.find(record["provenance"]["gpu"])].dram_gb_s / GPUS[gpu].dram_gb_s
        return max(ratio, 1 / ratio)

    usable = [
        record
        for record in known
        if hardware.find(record["provenance"]["gpu"])
        and any(row["metric"] == METRIC and row["impl"] in impls for row in record["rows"])
    ]
    return min(usable, key=distance, default=None)


def check(source: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What ``source`` projects for the card of ``target``, with what was measured there.

    Returns:
        Rows of ``decode`` for each implementation and batch that both have, with ``truth``, the tokens a second of
        ``target``, and ``inside``, whether they are from ``low`` to ``high``. Kernels of this project may change from
        commit to commit; with them only what both measured at the same one is compared.

    Raises:
        ValueError: as ``decode``.
    """
    gpu = hardware.find(target["provenance"]["gpu"])
    alike = source["provenance"].get("commit") == target["provenance"].get("commit")
    rows = [r for r in target["rows"] if r["metric"] == METRIC and (alike or not r["path"].startswith("adallm"))]
    truth = {(r["impl"], r["batch"]): r["value"] for r in rows}
    for row in decode(source, gpu or target["provenance"]["gpu"], impls=list(dict.fromkeys(i for i, _ in truth))):
        if (value := truth.get((row["impl"], row["batch"]))) is not None:
            yield row | {"truth": value, "inside": row["low"] <= value <= row["high"]}
