"""Ada without an Ada card: registers, spills and instructions of each kernel, and projected times.

The counts come from the sm_89 binaries. Times for Ada cards are projected by ``adallm.sm89.model``. On an Ada or Hopper
GPU the same PTX is checked and timed, beside the native build of the same configuration, and the model's two constants
are fitted to those times, by counts of what that GPU makes of the PTX; elsewhere both the constants and the model's
error are those of the last such record.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adallm import hardware, results, text
from adallm.bench._timing import copies, graph_us
from adallm.hardware import GPUS
from adallm.sm89 import check, model
from adallm.sm89 import counts as read_back
from adallm.sm89.cases import CARD, TOKENS, Case, cases
from adallm.sm89.counts import Counts
from adallm.sm89.model import Constants

CARDS = (CARD, "L40S")
IMPL = {"bf16": "adallm-w4a16", "fp8": "adallm-w4a8"}
_COUNTED = (
    *("regs", "spills", "shared", "blocks_per_sm", "mma", "instr_per_weight"),
    *("loop", "outside", "steps", "alu", "fma", "tensor", "memory", "other", "problem"),
)


@torch.no_grad()
def measure(found: Sequence[Case], *, repeats: int) -> dict[tuple[str, str, int], dict[str, float]]:
    """Times and errors of both builds, by layer, kind and M.

    Raises:
        ValueError: a product is off by more than ``check.LIMIT``.
    """
    measured = {}
    for (shape, kind), group in itertools.groupby(found, key=lambda case: case.key[:2]):
        group = list(group)
        p = group[0].product
        print(f"measuring {shape} {kind}", flush=True)
        operands = check.Operands.random(kind, max(TOKENS), p.n, p.k, copies=copies)
        for case in group:
            figures = {}
            both = check.checked(operands.first(case.product.m), case.config)
            for name, (error, calls) in both.items():
                us, spread = graph_us(calls, repeats=repeats)
                name = "measured" if name == "sm_89" else name
                figures |= {f"{name}_us": round(us, 3), f"{name}_us_spread": round(spread, 3)}
                figures["rel_err" if name == "measured" else f"{name}_rel_err"] = float(f"{error:.4g}")
            measured[case.key] = figures
        del operands
    return measured


def count_rows(counts: Sequence[Counts]) -> list[dict[str, Any]]:
    """Rows of the record, one for each build."""
    return [
        {"kernel": c.kernel, "kind": c.kind, "config": c.label} | {name: getattr(c, name) for name in _COUNTED}
        for c in counts
    ]


def time_row(case: Case, gpu: str, constants: Constants) -> dict[str, Any]:
    """Row of the record: a case projected for a GPU; nulls for a GPU without a data sheet."""
    p, counts = case.product, case.counts
    row = {"shape": case.shape, "n": p.n, "k": p.k, "m": p.m, "impl": IMPL[counts.kind], "kind": counts.kind}
    row |= {"kernel": counts.kernel, "config": case.label, "gpu": gpu, "projected_us": None, "bound": None}
    if gpu in GPUS:
        projection = model.project(counts, GPUS[gpu], p, constants)
        row |= {"projected_us": round(projection.us, 2), "bound": projection.bound}
    return row


def measured_row(case: Case, gpu: str, constants: Constants, figures: Mapping[str, float]) -> dict[str, Any]:
    """``time_row`` with what was measured, and ``model_error = projected / measured - 1``."""
    row = time_row(case, gpu, constants) | dict(figures)
    projected = row["projected_us"]
    return row | {"model_error": None if projected is None else round(projected / row["measured_us"] - 1, 4)}


def last_measured(root: Path | None = None) -> dict[str, Any] | None:
    """The latest record with measured times and constants fitted to them."""
    records = [r for r in results.read_all("sm89", root=root).values() if r.get("fitted")]
    return max(records, key=lambda record: record["provenance"]["date"], default=None)


def model_errors(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], float]:
    """``model_error`` of each measured row, by layer, kind and M."""
    return {(r["shape"], r["kind"], r["m"]): r["model_error"] for r in rows if r.get("model_error") is not None}


def count_table(counts: Sequence[Counts]) -> str:
    """What each build takes."""
    header = ("kernel", "kind", "config", "regs", "spills", "shared", "blocks/SM", "instr/number", "ALU", "FMA")
    lines = []
    for c in counts:
        numbers = (c.regs, c.spills, c.shared, c.blocks_per_sm, f"{c.instr_per_weight:.2f}" * bool(c.instr_per_weight))
        last = c.problem.partition("\n")[0] or c.mma
        lines.append((c.kernel, c.kind, c.label * bool(c.config), *map(str, (*numbers, c.alu, c.fma, c.memory)), last))
    return text.table((*header, "memory", "tensor instruction"), lines, align="lllrrrrrrrrl")


def time_table(rows: Sequence[Mapping[str, Any]], known: Mapping[tuple[str, str, int], float]) -> str:
    """Times in us of each case, projected and, where it was, measured, with the model's error where it is known."""
    by_case: dict[tuple[str, str, int], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_case.setdefault((row["shape"], row["kind"], row["m"]), {})[row["gpu"]] = row
    here = next((row["gpu"] for row in rows if "measured_us" in row), None)
    lines = []
    for key, by_gpu in by_case.items():
        ada = by_gpu[CARD]
        lines.append(
            (
                *map(str, key),
                ada["config"],
                *(f"{by_gpu[card]['projected_us']:.1f}" for card in CARDS),
                ada["bound"],
                f"{known[key]:+.0%}" if key in known else "unchecked",
                *(f"{by_gpu[here][name]:.1f}" for name in ("measured_us", "native_us") if here),
            )
        )
    header = ["layer", "kind", "M", "config", *(f"{card}, projected" for card in CARDS), "bound", "model's error"]
    header += [f"{here}, measured", "native build"] if here else []
    return text.table(header, lines, align="llrl" + "r" * len(CARDS) + "lr" + "rr" * bool(here))


def summary(known: Mapping[tuple[str, str, int], float], where: str | None) -> str:
    """One line on how far the model can be trusted."""
    if not known:
        return "The model is not yet checked on a GPU, and its two constants are assumed."
    sizes = sorted(map(abs, known.values()))
    return (
        f"The model's two constants are fitted to {len(known)} times on {where}; there its error is "
        f"{statistics.median(sizes):.0%} in the median and {sizes[-1]:.0%} at most."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables and write ``results/sm89/<slug>.json``."""
    parser = argparse.ArgumentParser(prog="python -m adallm.bench.sm89", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed replays for each row (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="root of the records (default: results)")
    options = parser.parse_args(argv)
    counts = read_back.measured()
    print(count_table(counts), flush=True)

    last = last_measured(options.out)
    constants = Constants(last["issue_efficiency"], last["latency_us"]) if last else model.ASSUMED
    where, known = (last["provenance"]["gpu"], model_errors(last["rows"])) if last else (None, {})
    found = cases(counts)
    measured: dict[tuple[str, str, int], dict[str, float]] = {}
    here, ran = None, []
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= GPUS[CARD].capability:
        device = torch.cuda.get_device_name()
        here = hardware.find(device) or device
        ran = cases(read_back.measured("sm_{}{}".format(*torch.cuda.get_device_capability())))
        measured = measure(ran, repeats=options.repeats)
    if here in GPUS:
        times = [(case.counts, GPUS[here], case.product, measured[case.key]["measured_us"]) for case in ran]
        where, constants = here, model.fit(times)

    rows = [time_row(case, card, constants) for case in found for card in CARDS if card != here]
    rows += [measured_row(case, here, constants, measured[case.key]) for case in ran]
    known = model_errors(rows) or known
    print(f"\n{time_table(rows, known)}\n\n{summary(known, where)}")
    path = results.write(
        "sm89",
        count_rows(counts) + rows,
        provenance=results.provenance(seed=check.SEED),
        root=options.out,
        issue_efficiency=constants.issue,
        latency_us=constants.latency_us,
        fitted=here in GPUS,
        fitted_on=where,
    )
    print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
