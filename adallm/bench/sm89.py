"""Ada without an Ada card: registers, spills and instructions of each kernel, and projected times.

The counts come from the sm_89 binaries. Times for Ada cards are projected by ``adallm.sm89.model``. On an Ada or Hopper
GPU the same PTX is checked and timed, beside the native build of the same configuration, and the model's two constants,
for linear layers and for decode attention, are fitted to those times, by counts of what that GPU makes of the PTX;
elsewhere both the constants and the model's error are those of the last such record.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adallm import hardware, results, text
from adallm.bench import _sm89_decode
from adallm.bench._timing import copies, graph_us
from adallm.hardware import GPUS
from adallm.sm89 import check, model
from adallm.sm89 import counts as read_back
from adallm.sm89.cases import CARD, KINDS, TOKENS, Case, DecodeCase, cases, decode_cases
from adallm.sm89.counts import Counts
from adallm.sm89.model import Constants

CARDS = (CARD, "L40S")
Key = tuple[str, str, int]  # of a case
IMPL = {"bf16": "adallm-w4a16", "fp8": "adallm-w4a8", "decode": "adallm"}
_COUNTED = (
    *("regs", "spills", "shared", "blocks_per_sm", "mma", "instr_per_weight"),
    *("loop", "outside", "steps", "alu", "fma", "tensor", "memory", "other", "problem"),
)


@dataclass(frozen=True)
class Part:
    """What the model has constants of its own for.

    Attributes:
        what: in words.
        kinds: of its cases.
        prefix: of the constants' names in the record.
        cases: of these counts.
        assumed: the constants until there are measured times.
    """

    what: str
    kinds: tuple[str, ...]
    prefix: str
    cases: Callable[[Sequence[Counts]], Sequence[Case | DecodeCase]]
    assumed: Constants


PARTS = (
    Part("linear layers", KINDS, "", cases, model.ASSUMED),
    Part("decode attention", ("decode",), "decode_", decode_cases, model.ASSUMED_DECODE),
)


@torch.no_grad()
def measure(found: Sequence[Case | DecodeCase], *, repeats: int) -> dict[Key, dict[str, float]]:
    """Times and errors of both builds, by the key of a case.

    Raises:
        ValueError: a result is off by more than ``check.LIMIT``, or that of decode attention.
    """
    measured = {}
    linear = [case for case in found if isinstance(case, Case)]
    decode = [case for case in found if isinstance(case, DecodeCase)]
    for case, both in itertools.chain(_checked(linear), _sm89_decode.checked(decode)):
        print(f"measuring {' '.join(map(str, case.key))}", flush=True)
        figures = {}
        for name, (error, calls) in both.items():
            us, spread = graph_us(calls, repeats=repeats)
            name = "measured" if name == "sm_89" else name
            figures |= {f"{name}_us": round(us, 3), f"{name}_us_spread": round(spread, 3)}
            figures["rel_err" if name == "measured" else f"{name}_rel_err"] = float(f"{error:.4g}")
        measured[case.key] = figures
    return measured


def _checked(found: Sequence[Case]) -> Iterator[tuple[Case, check.Checked]]:
    for (_, kind), group in itertools.groupby(found, key=lambda case: case.key[:2]):
        group = list(group)
        p = group[0].product
        operands = check.Operands.random(kind, max(TOKENS), p.n, p.k, copies=copies)
        for case in group:
            yield case, check.checked(operands.first(case.product.m), case.config)
        del operands


def count_rows(counts: Sequence[Counts]) -> list[dict[str, Any]]:
    """Rows of the record, one for each build."""
    return [
        {"kernel": c.kernel, "kind": c.kind, "config": c.label} | {name: getattr(c, name) for name in _COUNTED}
        for c in counts
    ]


def time_row(case: Case | DecodeCase, gpu: str, constants: Constants) -> dict[str, Any]:
    """Row of the record: a case projected for a GPU; nulls for a GPU without a data sheet."""
    shape, kind, m = case.key
    row = {"shape": shape, **case.sizes, "m": m, "impl": IMPL[kind], "kind": kind, "kernel": case.counts.kernel}
    row |= {"config": case.label, "gpu": gpu, "projected_us": None, "bound": None}
    if gpu in GPUS:
        projection = case.project(GPUS[gpu], constants)
        row |= {"projected_us": round(projection.us, 2), "bound": projection.bound}
    return row


def measured_row(
    case: Case | DecodeCase, gpu: str, constants: Constants, figures: Mapping[str, float]
) -> dict[str, Any]:
    """``time_row`` with what was measured, and ``model_error = projected / measured - 1``."""
    row = time_row(case, gpu, constants) | dict(figures)
    projected = row["projected_us"]
    return row | {"model_error": None if projected is None else round(projected / row["measured_us"] - 1, 4)}


def last_measured(root: Path | None = None) -> dict[str, Any] | None:
    """The latest record with measured times and constants fitted to them."""
    records = [r for r in results.read_all("sm89", root=root).values() if r.get("fitted")]
    return max(records, key=lambda record: record["provenance"]["date"], default=None)


def model_errors(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str] = KINDS) -> dict[Key, float]:
    """``model_error`` of each measured row of these kinds, by shape, kind and M."""
    return {
        (r["shape"], r["kind"], r["m"]): r["model_error"]
        for r in rows
        if r.get("model_error") is not None and r["kind"] in kinds
    }


def count_table(counts: Sequence[Counts]) -> str:
    """What each build takes."""
    header = ("kernel", "kind", "config", "regs", "spills", "shared", "blocks/SM", "instr/number", "ALU", "FMA")
    lines = []
    for c in counts:
        numbers = (c.regs, c.spills, c.shared, c.blocks_per_sm, f"{c.instr_per_weight:.2f}" * bool(c.instr_per_weight))
        last = c.problem.partition("\n")[0] or c.mma
        lines.append((c.kernel, c.kind, c.label * bool(c.config), *map(str, (*numbers, c.alu, c.fma, c.memory)), last))
    return text.table((*header, "memory", "tensor instruction"), lines, align="lllrrrrrrrrl")


def time_table(rows: Sequence[Mapping[str, Any]], known: Mapping[Key, float]) -> str:
    """Times in us of each case, projected and, where it was, measured, with the model's error where it is known."""
    by_case: dict[Key, dict[str, Mapping[str, Any]]] = {}
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
    header = ["shape", "kind", "M", "config", *(f"{card}, projected" for card in CARDS), "bound", "model's error"]
    header += [f"{here}, measured", "native build"] if here else []
    return text.table(header, lines, align="llrl" + "r" * len(CARDS) + "lr" + "rr" * bool(here))


def summary(known: Mapping[Key, float], where: str | None, what: str = "linear layers") -> str:
    """One line on how far the model can be trusted."""
    if not known:
        return f"For {what} the model is not yet checked on a GPU, and its two constants are assumed."
    sizes = sorted(map(abs, known.values()))
    return (
        f"For {what} the model's two constants are fitted to {len(known)} times on {where}; there its error is "
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
    here, there = None, ()
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= GPUS[CARD].capability:
        device = torch.cuda.get_device_name()
        here = hardware.find(device) or device
        there = read_back.measured("sm_{}{}".format(*torch.cuda.get_device_capability()))
    measured = measure([case for part in PARTS for case in part.cases(there)], repeats=options.repeats)

    rows, known, fields, said = [], {}, {}, []
    for part in PARTS:
        ran, where, errors, constants = part.cases(there), None, {}, part.assumed
        if here in GPUS and ran:
            times = [(case.project(GPUS[here], model.ALONE), measured[case.key]["measured_us"]) for case in ran]
            where, constants = here, model.fit(times)
        elif last and f"{part.prefix}latency_us" in last:
            where, errors = last["provenance"]["gpu"], model_errors(last["rows"], part.kinds)
            constants = Constants(last[f"{part.prefix}issue_efficiency"], last[f"{part.prefix}latency_us"])
        of_part = [time_row(case, card, constants) for case in part.cases(counts) for card in CARDS if card != here]
        of_part += [measured_row(case, here, constants, measured[case.key]) for case in ran]
        errors = model_errors(of_part, part.kinds) or errors
        said.append(summary(errors, where, part.what))
        fields |= {f"{part.prefix}issue_efficiency": constants.issue, f"{part.prefix}latency_us": constants.latency_us}
        rows, known = rows + of_part, known | errors
    print("\n".join(("", time_table(rows, known), "", *said)))
    path = results.write(
        "sm89",
        count_rows(counts) + rows,
        provenance=results.provenance(seed=check.SEED),
        root=options.out,
        **fields,
        fitted=here in GPUS,
        fitted_on=here if here in GPUS else last and last["provenance"]["gpu"],
    )
    print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
