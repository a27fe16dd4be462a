"""``python -m adallm.sm89 [GPU]``: the counts of every build as JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys

from adallm.sm89.build import builds
from adallm.sm89.counts import count, row

PROCESSES = 8


def _row(index: int, gpu: str) -> dict[str, object]:
    return row(count(builds()[index], gpu))


def main(argv: list[str]) -> int:
    gpu = argv[0] if argv else "sm_89"
    # A fork has the kernels imported already.
    with multiprocessing.get_context("fork").Pool(min(PROCESSES, os.cpu_count() or 1)) as pool:
        json.dump(pool.starmap(_row, [(i, gpu) for i in range(len(builds()))], chunksize=1), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
