"""The command ``adallm``: ``quantize SRC DST``, ``calibrate MODEL DST``, ``inspect DIR``, ``eval``, ``bench WHAT``,
``results``, ``serve MODEL``, ``run MODEL [PROMPT]``, ``doctor [MODEL]``.

A subcommand is a function in ``COMMANDS`` that adds its parser and names the function to run; what is heavy to import
is imported in there, so that ``adallm --help`` is quick. A run function takes the parsed arguments and returns an exit
status. Errors that are the user's to mend (ValueError, OSError) are one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adallm import cli_vllm, text

_UNITS = ("B", "KB", "MB", "GB", "TB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for an error, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="adallm", description="NVFP4 models on GPUs that have no FP4 cores.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    given = sys.argv[1:] if arguments is None else list(arguments)
    args, others = parser.parse_known_args(given)
    if not hasattr(args, "vllm_options"):
        if others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
    else:
        # Which there are, and which have a value, only vLLM knows.
        if given[1:2] != [args.model]:
            parser.error(f"{given[0]}: MODEL comes before the options")
        args.vllm_options = others
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            status = args.run(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print("adallm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left, as `head` does. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"adallm: error: {text.one_line(error)}", file=sys.stderr)
        return 2


def _add_quantize(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="write a BF16, FP16 or FP32 model as NVFP4, or an NVFP4 model in the other layout",
        description="Write the model in SRC to the new directory DST with NVFP4 weights. A model that is NVFP4 already "
        "changes its layout, without loss. DST appears only when it is whole.",
    )
    parser.add_argument("src", metavar="SRC", help="a Hugging Face directory with safetensors")
    parser.add_argument("dst", metavar="DST", help="the directory to write; it must not exist")
    parser.add_argument("--layout", choices=("modelopt", "compressed-tensors"), default="modelopt")
    parser.add_argument(
        "--scale-rule",
        default="max",
        metavar="RULE",
        help="how scales are chosen: max (the default), four_over_six, mse or mse_fp8; by text, imatrix or gptq",
    )
    _add_text(parser, "UTF-8 text for imatrix and gptq")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave matching modules dense, beside lm_head: a name, a shell pattern, or re:REGEX; may be repeated",
    )
    parser.add_argument("--lm-head", action="store_true", help="quantize lm_head too")
    parser.add_argument("--kv-cache", choices=("fp8",), help="declare a quantized KV cache, with scales of 1.0")
    parser.add_argument(
        "--separate-scales",
        action="store_true",
        help="a global scale for each of q, k, v and gate, up; vLLM itself would use one of them for all",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where scales are chosen; auto, the default, is a GPU if there is one",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_quantize)


def _add_text(parser: argparse.ArgumentParser, what: str) -> None:
    """What ``windows.read_windows`` reads."""
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help=f"{what}; may be repeated (default: source of Python's standard library that is not held out)",
    )
    parser.add_argument("--tokens", type=int, default=65_536, metavar="N", help="tokens to read (default: %(default)s)")


def _quantize(args: argparse.Namespace) -> int:
    import torch

    from adallm.calibrated import convert

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        done = convert(
            args.src,
            args.dst,
            layout=args.layout,
            scale_rule=args.scale_rule,
            text=args.text,
            tokens=args.tokens,
            ignore=(*(() if args.lm_head else ("lm_head",)), *args.ignore),
            kv_cache=args.kv_cache,
            share_scales=not args.separate_scales,
            device=device,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print("adallm: what is finished is kept; the same command goes on behind it", file=sys.stderr)
        raise
    print(
        f"{done.path}: {done.quantized} NVFP4 weights in the {done.layout} layout, "
        f"{_size(done.source_bytes)} -> {_size(done.nbytes)}"
    )
    return 0


def _add_calibrate(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="compute the scales of an FP8 KV cache from text",
        description="Run the quantized model in MODEL over text and write it to the new directory DST with one scale "
        "for the keys and one for the values of each layer, where vLLM reads them. DST appears only when it is whole.",
    )
    parser.add_argument("model", metavar="MODEL", help="a quantized directory of either layout, with its tokenizer")
    parser.add_argument("dst", metavar="DST", help="the directory to write; it must not exist")
    _add_text(parser, "UTF-8 text")
    parser.add_argument(
        "--method",
        choices=("max", "percentile"),
        default="max",
        help="what a scale covers: the largest magnitude, or a percentile of the magnitudes (default: max)",
    )
    parser.add_argument("--percentile", type=float, metavar="P", help="for --method percentile (default: 99.99)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    from adallm.calibrate import calibrate, table

    done = calibrate(
        args.model,
        args.dst,
        text=args.text,
        tokens=args.tokens,
        method=args.method,
        percentile=args.percentile,
        progress=not args.quiet,
    )
    print(table(done.layers, saturated=args.method == "percentile"))
    print(f"{done.path}: KV-cache scales of {len(done.layers)} layers, from {done.tokens:,} tokens")
    return 0


def _add_inspect(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what each layer of a model is stored as",
        description="Print layer, format, shape, bits a weight and bytes (scales included), and totals. Only headers "
        "are read; they, the index and the config are checked against each other. With --error, how far each quantized "
        "layer is from the model that it was made from, the worst first.",
    )
    parser.add_argument("directory", metavar="DIR", help="a Hugging Face directory with safetensors")
    parser.add_argument("--error", metavar="REFERENCE", help="the BF16, FP16 or FP32 model to compare with")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    if args.error is not None:
        return _inspect_error(args)
    from adallm.checkpoint import inspect, quantization_of

    quantization, rows = quantization_of(args.directory), inspect(args.directory)
    if quantization is None:
        print(f"{args.directory}: not quantized")
    else:
        print(
            f"{args.directory}: {quantization.algorithm} in the {quantization.layout} layout, "
            f"KV cache {quantization.kv_cache or 'not quantized'}, ignored: {', '.join(quantization.ignored) or 'none'}"
        )
    table = [("layer", "format", "shape", "bits/weight", "bytes")]
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        table.append((row.name, row.format, shape, f"{row.bits_per_weight:.3f}", f"{row.nbytes:,}"))
    elements, nbytes = _elements(rows), sum(row.nbytes for row in rows)
    bits = 8 * nbytes / elements if elements else 0
    table.append(("total", "", f"{elements:,} values", f"{bits:.3f}", f"{nbytes:,}"))
    for kind in dict.fromkeys(row.format for row in rows):
        same = [row for row in rows if row.format == kind]
        elements, nbytes = _elements(same), sum(row.nbytes for row in same)
        bits = 8 * nbytes / elements if elements else 0
        table.append((f"  {len(same)} tensors", kind, f"{elements:,} values", f"{bits:.3f}", f"{nbytes:,}"))
    print(text.table(table[0], table[1:], align="lllrr"))
    return 0


def _add_eval(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure perplexity under several formats with lm-eval",
        description="Measure a model under several formats on the same text and windows; print the table, write the "
        "record and the figure. What is unchanged since an earlier run is not measured again.",
    )
    parser.add_argument("--model", help="a directory or a Hugging Face hub name (default: the bundled model)")
    parser.add_argument("--tasks", type=_names, default=["stdlib_ppl"], metavar="TASK,...", help="lm-eval tasks")
    parser.add_argument(
        "--formats", type=_names, metavar="FORMAT,...", help="the first is what the others are compared with"
    )
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--scale-rule", default="max", metavar="RULE", help="how NVFP4 block scales are chosen")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task to use (default: all)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where record and figure go (default: results/)")
    parser.set_defaults(run=_eval)


def _names(value: str) -> list[str]:
    return [name for name in value.replace(",", " ").split() if name]


def _eval(args: argparse.Namespace) -> int:
    from adallm import evaluate, plots, results

    path = evaluate.compare(
        args.model,
        tasks=args.tasks,
        formats=args.formats,
        limit=args.limit,
        scale_rule=args.scale_rule,
        backend=args.backend,
        root=args.results,
    )
    record = results.read(path)
    print(f"\n{evaluate.table(record['rows'])}\n\nrecord: {path}\ntable:  {path.with_suffix('.md')}")
    for task in args.tasks:
        if any(row["task"] == task and "delta" in row for row in record["rows"]):
            figure = plots.perplexity(record, task=task)
            for file in plots.save(figure, f"eval-{path.stem}-{task}", root=args.results):
                print(f"figure: {file}")
    return 0


def _add_bench(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="run a benchmark, or list them",
        description="Run the benchmark WHAT with its own options (WHAT --help lists them). Without WHAT, list them.",
        add_help=False,
        prefix_chars="\0",  # options are the benchmark's
    )
    parser.add_argument("arguments", nargs="*", metavar="WHAT [OPTION ...]")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from adallm import bench

    return bench.main(args.arguments)


def _add_results(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "results",
        help="list the records of measurements",
        description="List records: experiment, machine, date, commit (+: with changes), rows, and what they say first.",
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all")
    parser.add_argument("--root", type=Path, metavar="DIR", help="where they are (default: results/)")
    parser.set_defaults(run=_results)


def _results(args: argparse.Namespace) -> int:
    from adallm.bench import _headlines

    found = _headlines.records(args.experiments, args.root)
    print(text.table(_headlines.HEADER, _headlines.lines(found), align="llllrl"))
    return 0


def _inspect_error(args: argparse.Namespace) -> int:
    from adallm.checkpoint import errors, total

    found = errors(args.directory, args.error)
    rows = [
        (error.name, error.format, "x".join(map(str, error.shape)), f"{error.sqnr_db:.2f}", f"{error.relative:.5f}")
        for error in [*found, total(found)]
    ]
    print(text.table(("layer", "format", "shape", "SQNR dB", "relative error"), rows, align="lllrr"))
    return 0


def _elements(rows: Sequence[Any]) -> int:
    import math

    return sum(math.prod(row.shape) for row in rows)


def _size(nbytes: int) -> str:
    power = min(len(_UNITS) - 1, max(0, (len(str(nbytes)) - 1) // 3))
    return f"{nbytes} B" if power == 0 else f"{nbytes / 1000**power:.2f} {_UNITS[power]}"


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"adallm: warning: {' '.join(str(message).split())}", file=sys.stderr)


COMMANDS: tuple[Callable[[Any], None], ...] = (
    _add_quantize,
    _add_calibrate,
    _add_inspect,
    _add_eval,
    _add_bench,
    _add_results,
    cli_vllm.add_serve,
    cli_vllm.add_run,
    cli_vllm.add_doctor,
)

if __name__ == "__main__":
    sys.exit(main())
