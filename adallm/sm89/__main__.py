"""``python -m adallm.sm89``: the counts of every build as JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys

from adallm.sm89.build import builds
from adallm.sm89.counts import count, row

PROCESSES = 2


def _row(index: int) -> dict[str, object]:
    return row(count(builds()[index]))


def main() -> int:
    # A fork has the kernels imported already.
    with multiprocessing.get_context("fork").Pool(min(PROCESSES, os.cpu_count() or 1)) as pool:
        json.dump(pool.map(_row, range(len(builds())), chunksize=1), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
