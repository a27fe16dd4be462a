"""Which path runs a product: a table for each GPU family, read by (M, N, K, GPU) and by what is multiplied, "bf16",
"fp16" or "fp8". Nothing else decides.

A table is a list of rows; the first whose ``m`` is not below M applies. A row without a configuration is for a library:
the weight is expanded into a scratch buffer in front of its matrix product. In rows without times the first
configuration that gives each multiprocessor one and a half blocks is taken, K being split until it has three. In rows
with times, what takes the least is taken of each configuration, alone, split along K, and shared evenly, in us::

    start + waves * us * K / (4096 * splits) + exchange, waves = ceil(blocks * splits / multiprocessors)
    start + us * K / 4096 * blocks / multiprocessors + exchange, where programs share all blocks evenly
    exchange = join + bytes / rate, of sums that are left to another block

"sm_90" was fitted to times on an H100 (``results/tune``). Not in that record: the last configuration of a row with
times, which serves a K that the others do not take and was not timed, but for the first row of 16 bits; and there a
block of 16 rows alone, timed with N of 1024 and 2048. "sm_89" was chosen without an Ada card, among configurations that
compile without spills into the 99 KB of shared memory that every GPU from sm_80 on has; it serves unknown ones too.
``adallm bench tune`` measures the GPU at hand; what it writes into the user's cache directory goes before the table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import torch

from adallm.kernels.matmul import Config, blocks, workspace
from adallm.results import slug

# Blocks for each multiprocessor: at least, or the next configuration is tried; at most by splitting K, in rows without
# times and with them.
_FILLED, _SPLIT_TO, _SPLIT_UNDER = 1.5, 3, 5
# Output tiles that may be split, each of which has a counter.
MAX_SPLIT_TILES = 4096
# Tokens from which on a weight that is stored for 16-bit products is multiplied in FP8 by a library, where that is left
# to us. sm_90, without a record: W4A16 kernels are the slower from 640 tokens on, but one launch in place of four, and
# in steps of vLLM with a prompt of up to 1,500 tokens, outside CUDA graphs, the host was waited for.
# Not timed on sm_89: an estimate of where expanding the weight is paid for.
FP8_FROM = {"sm_90": 1025, "sm_89": 384}
# us, us and bytes a us, written and read.
_START, _JOIN, _RATE = 2.0, 2.0, 5e6


@dataclasses.dataclass(frozen=True)
class Row:
    """For up to ``m`` tokens.

    Attributes:
        configs: from the largest tile to the smallest, ``splits`` being the most that are tried.
        us: for each, what a block over 4096 columns takes on a multiprocessor of its own, and what each takes of one
            that several share; empty for the other rule.
    """

    m: int
    configs: tuple[Config, ...]
    us: tuple[tuple[float, float], ...] = ()


ANY = 1 << 62

# fmt: off
_MANY_16 = (Config(128, 256, 64,  1, 2, 8, 5, True, 1), Config(128, 128, 64, 1, 1, 8, 4, True),
            Config(128, 256, 64,  1, 2, 8, 3)), ((44.0, 47.0), (28.0, 28.0), (55.0, 55.0))
_SM_90_16 = (
    #            n    m    k  slices splits warps stages overlap programs, and us of a block alone and of one in company
    Row(8,    (Config(64,  8,   256, 1, 1, 4, 3), Config(64, 8, 256, 1, 3, 4, 4), Config(16, 8, 128, 4, 2, 4, 4)),
              ((9.0, 6.4), (7.7, 6.6), (3.0, 2.0))),
    Row(16,   (Config(64,  16,  128, 1, 4, 4, 7, True, 3), Config(64, 16, 128, 1, 4, 4, 5, True, 3),
               Config(64,  16,  256, 1, 4, 4, 3)), ((8.7, 7.7), (8.9, 7.6), (9.0, 9.0))),
    Row(32,   (Config(64,  32,  128, 1, 4, 4, 5, True, 3), Config(64, 32, 128, 1, 4, 4, 4)),
              ((9.6, 8.1), (14.0, 10.0))),
    Row(64,   (Config(64,  64,  128, 1, 4, 4, 5, True, 2), Config(64, 64, 64, 1, 1, 4, 5, True, 3),
               Config(64,  64,  128, 1, 4, 4, 3)), ((11.4, 10.5), (14.8, 10.8), (20.0, 14.0))),
    Row(128,  (Config(128, 128, 64,  1, 4, 8, 6, True, 1), Config(64, 128, 128, 1, 2, 4, 4, True),
               Config(64,  128, 64,  1, 4, 4, 4)), ((27.2, 29.6), (16.1, 19.6), (26.0, 20.0))),
    Row(256,  (Config(128, 256, 64,  1, 4, 8, 5, True, 1), Config(128, 128, 64, 1, 2, 8, 4, True, 1),
               Config(64,  128, 128, 1, 1, 4, 4, True), Config(64, 128, 64, 1, 4, 4, 4)),
              ((45.2, 49.1), (27.2, 28.5), (16.3, 17.8), (26.0, 20.0))),
    Row(384,  (Config(128, 128, 64,  1, 4, 8, 6, True, 1), Config(128, 256, 64, 1, 2, 8, 5, True, 1),
               Config(128, 256, 64,  1, 2, 8, 3)), ((27.2, 29.6), (44.0, 47.0), (55.0, 55.0))),
    Row(2047, *_MANY_16),
    Row(ANY,  ()),
)
_SM_90_8 = (
    Row(8,    (Config(64,  8,   256, 1, 4, 4, 4, True, 2), Config(64, 8, 256, 1, 4, 4, 6, True, 2),
               Config(64,  8,   256, 1, 4, 4, 3)), ((6.9, 7.2), (6.2, 7.3), (9.0, 9.0))),
    Row(16,   (Config(64,  16,  256, 1, 4, 4, 4, True, 2), Config(64, 16, 256, 1, 4, 4, 6, True, 2),
               Config(64,  16,  256, 1, 4, 4, 3)), ((7.0, 7.3), (6.5, 7.5), (9.0, 9.0))),
    Row(32,   (Config(64,  32,  128, 1, 4, 4, 5, True, 3), Config(64, 32, 256, 1, 6, 4, 3)),
              ((8.5, 7.5), (12.0, 10.0))),
    Row(64,   (Config(64,  64,  128, 1, 4, 4, 5, True, 3), Config(64, 64, 256, 1, 3, 4, 4, True, 2),
               Config(64,  64,  256, 1, 4, 4, 3)), ((9.3, 8.0), (8.4, 8.6), (20.0, 14.0))),
    Row(128,  (Config(128, 128, 128, 1, 3, 8, 5, True, 1), Config(64, 128, 128, 1, 3, 4, 5, True, 1),
               Config(64,  128, 128, 1, 4, 4, 4)), ((18.3, 20.7), (11.4, 12.2), (22.0, 17.5))),
    Row(256,  (Config(128, 256, 64,  1, 4, 8, 6, True, 1), Config(64, 256, 128, 1, 2, 4, 4, True),
               Config(64,  128, 128, 1, 4, 4, 4)), ((29.5, 32.2), (16.9, 19.1), (22.0, 17.5))),
    Row(384,  (Config(128, 128, 128, 1, 3, 8, 5, True, 1), Config(128, 256, 64, 1, 2, 8, 6, True, 1),
               Config(128, 256, 128, 1, 2, 8, 4)), ((18.3, 20.7), (29.1, 30.5), (42.5, 42.5))),
    Row(512,  (Config(128, 256, 64,  1, 2, 8, 6, True, 1), Config(64, 256, 128, 1, 1, 4, 4, True),
               Config(128, 256, 128, 1, 2, 8, 4)), ((29.1, 30.5), (17.3, 17.9), (42.5, 42.5))),
    Row(2047, (Config(128, 256, 128, 1, 1, 8, 3, True, 1), Config(128, 256, 64, 1, 1, 8, 6, True, 1),
               Config(128, 256, 128, 1, 2, 8, 4)), ((29.5, 29.7), (30.1, 30.1), (42.5, 42.5))),
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


def choose(m: int, n: int, k: int, kind: str, gpu: GPU) -> Config | None:
    """The configuration for ``[M, K]`` tokens and a weight ``[N, K]``, or None for the library.

    Raises:
        ValueError: as ``rows``.
    """
    for row in tuned(gpu.slug).get((kind, n, k), ()):
        if m <= row.m:
            return row.configs[0] if row.configs else None
    for index, row in enumerate(rows(kind, gpu)):
        if m <= row.m:
            # Rounded up within a tile: numbers of tokens that never came before are what prompts have.
            return _picked(index, -(-m // 8) * 8 if m <= 512 else -(-m // 64) * 64, n, k, kind, gpu)
    raise AssertionError(f"the table of {gpu.family} ends before M = {m}")


@functools.lru_cache(maxsize=1 << 14)
def _picked(index: int, m: int, n: int, k: int, kind: str, gpu: GPU) -> Config | None:
    return pick(rows(kind, gpu)[index], m, n, k, gpu.sms, fp8=kind == "fp8")


def pick(row: Row, m: int, n: int, k: int, sms: int, *, fp8: bool = False) -> Config | None:
    """A row's configuration, with its splits or programs, for a GPU of ``sms`` multiprocessors; None of none."""
    if row.us:
        options = [
            (option, us)
            for config, us in zip(row.configs, row.us, strict=True)
            for option in shared(config, m, n, k, sms)
        ]
        return min(options, key=lambda option: _estimate(*option, m, n, k, sms, fp8=fp8))[0]
    chosen = None
    for config in row.configs:
        if not config.takes(k):
            continue
        count = blocks(config, m, n)
        splits = max(min(_most_splits(config, m, n, k), _SPLIT_TO * sms // count), 1)
        chosen = dataclasses.replace(config, splits=splits)
        if count * splits >= _FILLED * sms:
            break
    return chosen


def shared(config: Config, m: int, n: int, k: int, sms: int) -> list[Config]:
    """The ways in which a table's configuration can share K: by each number of splits, and evenly last."""
    if not config.takes(k):
        return []
    tiles, programs = blocks(config, m, n), config.programs * sms
    found = [
        dataclasses.replace(config, splits=splits, programs=0)
        for splits in range(1, _most_splits(config, m, n, k) + 1)
        # With more than a tile each, some would have one split more than others.
        if splits == 1 or (tiles <= sms if config.overlap else tiles * splits <= _SPLIT_UNDER * sms)
    ]
    several = programs == sms or tiles > sms
    if several and 0 < 2 * programs <= tiles * (k // config.step) and programs != tiles <= MAX_SPLIT_TILES:
        found.append(dataclasses.replace(config, splits=1, programs=programs))
    return found


def _most_splits(config: Config, m: int, n: int, k: int) -> int:
    """As many as the configuration allows, with two steps of K for each and a counter for each tile."""
    steps = -(-k // (config.slices * config.k))
    return max(min(config.splits, steps // 2), 1) if blocks(config, m, n) <= MAX_SPLIT_TILES else 1


def _estimate(config: Config, us: tuple[float, float], m: int, n: int, k: int, sms: int, *, fp8: bool) -> float:
    tiles, sums = blocks(config, m, n), 4 * workspace(config, m, n, fp8=fp8)
    exchange = _JOIN + 2 * sums / _RATE if sums else 0.0
    if config.programs:
        return _START + us[1] * k / 4096 * tiles / sms + exchange
    waves = -(-tiles * config.splits // sms)
    return _START + (us[0] if waves == 1 else waves * us[1]) * k / (4096 * config.splits) + exchange


def configurations(family: str) -> list[tuple[str, Config]]:
    """Every (kind, configuration) that the table of a family can choose: alone, in 2 splits, and by ``programs``."""
    found = []
    for kind, table in TABLES[family].items():
        for config in (config for row in table for config in row.configs):
            found.append((kind, dataclasses.replace(config, splits=1, programs=0)))
            if config.splits > 1:
                found.append((kind, dataclasses.replace(config, splits=2, programs=0)))
            if config.programs:
                found.append((kind, dataclasses.replace(config, splits=1)))
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
