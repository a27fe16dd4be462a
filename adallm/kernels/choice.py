"""Which path runs a product: a table for each GPU family, read by (M, N, K, GPU) and by what is multiplied, "bf16",
"fp16" or "fp8". Nothing else decides.

A table is a list of rows; the first whose ``m`` is not below M applies. A row without a configuration is for a library:
the weight is expanded into a scratch buffer in front of its matrix product. In rows for few tokens, which read memory
most of the time, the first configuration that gives each multiprocessor one and a half blocks is taken, K being split
until it has three. In rows for more tokens each configuration has times, and what takes the least is taken::

    waves * us * K / (4096 * splits) + what adding up the splits takes, waves = ceil(blocks * splits / multiprocessors)

"sm_90" comes from times on an H100 (``results/tune``), rounded medians over layers; those of FP8 are of weights made in
another way than today. The last configuration of each row with times, which serves a K that the others do not take, was
not timed. "sm_89" was chosen without an Ada card, among configurations that compile without spills into the 99 KB of
shared memory that every GPU from sm_80 on has; it serves unknown ones too. ``adallm bench tune`` measures the GPU at
hand; what it writes into the user's cache directory goes before the table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import torch

from adallm.kernels.matmul import Config, blocks
from adallm.results import slug

# Blocks for each multiprocessor: at least, or the next configuration is tried; at most, by splitting K.
_FILLED, _SPLIT_TO = 1.5, 3
# Output tiles that may be split, each of which has a counter.
MAX_SPLIT_TILES = 4096
# Splits cost a fixed time in us, and their FP32 sums are written and read at this many bytes a us.
_SPLIT_US, _SPLIT_BYTES = 3.0, 1.6e6


@dataclasses.dataclass(frozen=True)
class Row:
    """For up to ``m`` tokens.

    Attributes:
        configs: from the largest tile to the smallest, ``splits`` being the most that are tried.
        us: for each, what a block over 4096 columns takes on a multiprocessor of its own, and what each takes of one
            that several share; empty for few tokens.
        library: where that is an option too, what it takes in us to expand 10^6 weights, and for 10^9 operations.
    """

    m: int
    configs: tuple[Config, ...]
    us: tuple[tuple[float, float], ...] = ()
    library: tuple[float, float] | None = None


ANY = 1 << 62

# fmt: off
_MANY_16 = (Config(128, 256, 64,  1, 2, 8, 4, True), Config(128, 128, 64, 1, 2, 8, 4, True),
            Config(64,  128, 64,  1, 2, 4, 4, True), Config(128, 256, 64, 1, 2, 8, 3))
_MANY_8 = (Config(128, 256, 128, 1, 2, 8, 3, True), Config(128, 128, 128, 1, 2, 8, 4, True),
           Config(64,  128, 128, 1, 2, 4, 4, True), Config(128, 256, 128, 1, 2, 8, 4))
_MANY_8_US = ((31.5, 33.2), (23.0, 22.3), (16.0, 11.0), (42.5, 42.5))
_SM_90_16 = (
    #            n    m    k  slices splits warps stages overlap, and us of a block alone and of one in company
    Row(8,    (Config(64,  8,   256, 1, 1, 4, 3), Config(16, 8, 128, 4, 1, 4, 4))),
    Row(16,   (Config(64,  16,  128, 1, 4, 4, 5, True), Config(64, 16, 256, 1, 4, 4, 3))),
    Row(32,   (Config(64,  32,  128, 1, 4, 4, 5, True), Config(64, 32, 128, 1, 4, 4, 4))),
    Row(64,   (Config(64,  64,  64,  1, 2, 4, 5, True), Config(64, 64, 128, 1, 6, 4, 5, True),
               Config(64,  64,  128, 1, 4, 4, 3)), ((16.0, 10.6), (13.0, 11.4), (20.0, 14.0))),
    Row(128,  (Config(64,  128, 64,  1, 4, 4, 4, True), Config(64, 64, 128, 1, 4, 4, 5, True),
               Config(64,  128, 128, 1, 4, 4, 4, True), Config(64, 128, 64, 1, 4, 4, 4)),
              ((22.9, 14.3), (13.2, 9.7), (17.0, 17.8), (26.0, 20.0))),
    Row(256,  (Config(64,  128, 64,  1, 3, 4, 4, True), Config(64, 128, 128, 1, 3, 4, 4, True),
               Config(128, 128, 64,  1, 3, 8, 4, True), Config(128, 256, 64, 1, 2, 8, 4, True),
               Config(64,  128, 64,  1, 4, 4, 4)),
              ((22.9, 14.1), (17.5, 17.0), (26.5, 28.5), (42.5, 45.5), (26.0, 20.0))),
    Row(512,  _MANY_16, ((43.5, 45.0), (27.5, 27.3), (30.0, 14.4), (55.0, 55.0))),
    Row(3072, _MANY_16, ((43.5, 45.0), (27.5, 27.3), (30.0, 16.4), (55.0, 55.0))),
    Row(ANY,  ()),
)
_SM_90_8 = (
    Row(8,    (Config(64,  8,   256, 1, 4, 4, 4, True), Config(64, 8, 256, 1, 4, 4, 3))),
    Row(16,   (Config(64,  16,  256, 1, 4, 4, 4, True), Config(64, 16, 256, 1, 4, 4, 3))),
    Row(32,   (Config(64,  32,  128, 1, 4, 4, 5, True), Config(64, 32, 256, 1, 6, 4, 3))),
    Row(64,   (Config(64,  64,  128, 1, 6, 4, 5, True), Config(64, 64, 256, 1, 4, 4, 4, True),
               Config(64,  64,  256, 1, 4, 4, 3)), ((12.8, 8.9), (11.5, 9.9), (20.0, 14.0))),
    Row(128,  (Config(64,  128, 128, 1, 4, 4, 4, True), Config(64, 64, 256, 1, 4, 4, 4, True),
               Config(64,  128, 128, 1, 4, 4, 4)), ((14.7, 12.4), (11.5, 8.7), (22.0, 17.5))),
    Row(256,  (Config(128, 256, 128, 1, 2, 8, 3, True), Config(128, 128, 128, 1, 2, 8, 4, True),
               Config(64,  128, 128, 1, 3, 4, 4, True), Config(64, 128, 128, 1, 4, 4, 4)),
              ((31.5, 34.5), (23.0, 23.5), (15.0, 11.4), (22.0, 17.5))),
    Row(512,  _MANY_8, _MANY_8_US),
    Row(2048, _MANY_8, _MANY_8_US, (0.60, 0.82)),
    Row(ANY,  ()),
)
_SM_89_16 = (
    Row(8,    (Config(64,  8,   64,  4, 1, 4, 3), Config(32, 8, 128, 4, 1, 4, 3), Config(16, 8, 128, 4, 1, 4, 3))),
    Row(16,   (Config(64,  16,  64,  4, 1, 4, 3), Config(32, 16, 64, 4, 2, 4, 3))),
    Row(64,   (Config(128, 32,  64,  1, 2, 4, 3), Config(64, 32, 64, 1, 4, 4, 4))),
    Row(1024, (Config(128, 64,  64,  1, 2, 4, 3), Config(64, 32, 64, 1, 4, 4, 4))),
    Row(ANY,  ()),
)
_SM_89_8 = (
    Row(16,   (Config(128, 16,  128, 1, 2, 4, 3), Config(64, 16, 128, 1, 6, 4, 3))),
    Row(64,   (Config(128, 32,  128, 1, 2, 4, 3), Config(64, 32, 128, 1, 4, 4, 3))),
    Row(ANY,  (Config(128, 64,  128, 1, 2, 4, 3), Config(64, 32, 128, 1, 4, 4, 3))),
)
# fmt: on
TABLES = {
    "sm_90": {"bf16": _SM_90_16, "fp16": _SM_90_16, "fp8": _SM_90_8},
    "sm_89": {"bf16": _SM_89_16, "fp16": _SM_89_16, "fp8": _SM_89_8},
    "sm_80": {"bf16": _SM_89_16, "fp16": _SM_89_16},
}


@dataclasses.dataclass(frozen=True)
class GPU:
    """What a choice depends on: ``family`` is a key of ``TABLES``, ``slug`` names the user's own table."""

    family: str
    sms: int
    slug: str


@functools.cache
def gpu(device: int) -> GPU:
    """The CUDA device with this index.

    Raises:
        ValueError: older than sm_80.
    """
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        raise ValueError(
            f"{properties.name} is sm_{properties.major}{properties.minor}; the NVFP4 kernels need sm_80 or newer"
        )
    family = "sm_90" if capability == (9, 0) else "sm_89" if capability >= (8, 9) else "sm_80"
    return GPU(family, properties.multi_processor_count, slug(properties.name))


def rows(kind: str, gpu: GPU) -> tuple[Row, ...]:
    """The built-in table for a GPU.

    Raises:
        ValueError: a kind that the family has no tensor cores for.
    """
    if kind not in TABLES[gpu.family]:
        raise ValueError(
            f"{gpu.slug} has no FP8 tensor cores, which activations='fp8' needs; supported there: activations='bf16'"
        )
    return TABLES[gpu.family][kind]


@functools.lru_cache(maxsize=1 << 14)
def choose(m: int, n: int, k: int, kind: str, gpu: GPU) -> Config | None:
    """The configuration for ``[M, K]`` tokens and a weight ``[N, K]``, or None for the library.

    Raises:
        ValueError: as ``rows``.
    """
    for row in tuned(gpu.slug).get((kind, n, k), ()):
        if m <= row.m:
            return row.configs[0] if row.configs else None
    for row in rows(kind, gpu):
        if m <= row.m:
            return pick(row, m, n, k, gpu.sms)
    raise AssertionError(f"the table of {gpu.family} ends before M = {m}")


def pick(row: Row, m: int, n: int, k: int, sms: int, *, library: bool = True) -> Config | None:
    """A row's configuration, with its splits, for a GPU of ``sms`` multiprocessors; None of none, and for the library
    where that is allowed.
    """
    if row.us:
        options = [
            (dataclasses.replace(config, splits=splits), us)
            for config, us in zip(row.configs, row.us, strict=True)
            if config.takes(k)
            for splits in range(1, most_splits(config, m, n, k) + 1)
        ]
        config, us = min(((c, _estimate(c, us, m, n, k, sms)) for c, us in options), key=lambda option: option[1])
        if library and row.library and row.library[0] * n * k / 1e6 + row.library[1] * 2 * m * n * k / 1e9 < us:
            return None
        return config
    chosen = None
    for config in row.configs:
        if not config.takes(k):
            continue
        count = blocks(config, m, n)
        splits = max(min(most_splits(config, m, n, k), _SPLIT_TO * sms // count), 1)
        chosen = dataclasses.replace(config, splits=splits)
        if count * splits >= _FILLED * sms:
            break
    return chosen


def most_splits(config: Config, m: int, n: int, k: int) -> int:
    """As many as the configuration allows, with two steps of K for each and a counter for each tile."""
    steps = -(-k // (config.slices * config.k))
    return max(min(config.splits, steps // 2), 1) if blocks(config, m, n) <= MAX_SPLIT_TILES else 1


def _estimate(config: Config, us: tuple[float, float], m: int, n: int, k: int, sms: int) -> float:
    waves = -(-blocks(config, m, n) * config.splits // sms)
    time = (us[0] if waves == 1 else waves * us[1]) * k / (4096 * config.splits)
    return time if config.splits == 1 else time + _SPLIT_US + config.splits * m * n * 8 / _SPLIT_BYTES


def configurations(family: str) -> list[tuple[str, Config]]:
    """Every (kind, configuration) that the table of a family can choose, ``splits`` being 1 or, split at all, 2."""
    found = []
    for kind, table in TABLES[family].items():
        for config in (config for row in table for config in row.configs):
            found.append((kind, dataclasses.replace(config, splits=1)))
            if config.splits > 1:
                found.append((kind, dataclasses.replace(config, splits=2)))
    return list(dict.fromkeys(found))


def cache_file(slug: str) -> Path:
    """Where ``adallm bench tune`` keeps a GPU's table: ``$XDG_CACHE_HOME/adallm/tune/<slug>.json``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "adallm" / "tune" / f"{slug}.json"


@functools.cache
def tuned(slug: str) -> dict[tuple[str, int, int], tuple[Row, ...]]:
    """Rows by (kind, N, K) that ``adallm bench tune`` measured on a GPU, each with the one configuration that was the
    fastest, its splits as measured, or none for the library; no rows where it never ran.

    Raises:
        ValueError: the file is not what ``write_tuned`` writes; it names the file.
    """
    path = cache_file(slug)
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())["entries"]
        return {
            (e["kind"], e["n"], e["k"]): tuple(Row(r["m"], tuple(Config(**c) for c in r["configs"])) for r in e["rows"])
            for e in entries
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a tuning table ({error}); delete it, or run adallm bench tune again") from None


def write_tuned(slug: str, table: dict[tuple[str, int, int], tuple[Row, ...]]) -> Path:
    """Replace a GPU's table in the user's cache directory."""
    path = cache_file(slug)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {
            "kind": kind,
            "n": n,
            "k": k,
            "rows": [{"m": row.m, "configs": list(map(dataclasses.asdict, row.configs))} for row in found],
        }
        for (kind, n, k), found in table.items()
    ]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"entries": entries}, indent=1) + "\n")
    partial.replace(path)
    reload()
    return path


def reload() -> None:
    """Look at the user's tables again: one was written or deleted."""
    tuned.cache_clear()
    choose.cache_clear()
