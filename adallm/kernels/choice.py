"""Which configuration runs a product, from (M, N, K, GPU) and what is multiplied; nothing else."""

from __future__ import annotations

from adallm.kernels.matmul import Config

# Per family and kind: rows of (largest M, configurations from the largest tile to the smallest).
TABLES: dict[str, dict[str, tuple[tuple[int, tuple[Config, ...]], ...]]] = {
    "sm_89": {
        "bf16": (
            (8, (Config(64, 8, 64, 4, 1, 4, 3), Config(32, 8, 128, 4, 1, 4, 3), Config(16, 8, 128, 4, 1, 4, 3))),
            (16, (Config(64, 16, 64, 4, 1, 4, 3), Config(32, 16, 64, 4, 1, 4, 3))),
            (64, (Config(128, 32, 64, 1, 1, 4, 3), Config(64, 32, 64, 1, 1, 4, 4))),
            (1 << 30, (Config(128, 128, 64, 1, 1, 8, 3), Config(128, 64, 64, 1, 1, 4, 3))),
        ),
        "fp8": (
            (16, (Config(64, 16, 128, 1, 1, 4, 4),)),
            (64, (Config(128, 32, 128, 1, 1, 4, 3), Config(64, 32, 128, 1, 1, 4, 4))),
            (1 << 30, (Config(128, 128, 128, 1, 1, 8, 3), Config(128, 64, 128, 1, 1, 4, 3))),
        ),
    },
}
for _family in TABLES.values():
    _family["fp16"] = _family["bf16"]


def configurations(family: str) -> list[tuple[str, Config]]:
    """Every (kind, configuration) that the table of a family can choose; splits is 1 or, where it may be more, 2."""
    found = []
    for kind, rows in TABLES[family].items():
        for _, configs in rows:
            for config in configs:
                found += [(kind, config), (kind, Config(**{**vars(config), "splits": 2}))]
    return list(dict.fromkeys(found))
