"""The commands of ``adallm`` that are about vLLM: ``serve``, ``run`` and ``doctor``, as ``cli.py`` has the others."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from adallm import text


def _add_vllm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations",
        choices=("auto", "bf16", "fp8"),
        help="of NVFP4 layers: W4A16, W4A8, or by the number of tokens (default: ADALLM_ACTIVATIONS, or auto)",
    )
    parser.add_argument("--kv-cache-dtype", metavar="DTYPE", help="default: fp8 where the GPU has FP8 cores, else auto")
    parser.add_argument(
        "--no-fp8-decode-kernel", action="store_true", help="leave decode attention over an FP8 cache to vLLM's choice"
    )
    parser.epilog = "Every other option is that of `vllm serve`, whose --help lists them."
    parser.set_defaults(vllm_options=[])


def _vllm_options(args: argparse.Namespace, *, graphs: bool = False) -> list[str]:
    from adallm import serve

    return serve.options(
        args.model,
        args.vllm_options,
        kv_cache_dtype=args.kv_cache_dtype,
        decode_kernel=not args.no_fp8_decode_kernel,
        graphs=graphs,
        capability=serve.capability(),
    )


def add_serve(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model with vLLM, our kernels in it",
        description="Become `vllm serve MODEL`: the OpenAI-compatible server, with our kernels for NVFP4 layers. On "
        "GPUs that these are for, steps of up to 4,096 tokens get CUDA graphs, unless an option is about graphs.",
        usage="adallm serve MODEL [OPTION ...]",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hugging Face hub name")
    _add_vllm_options(parser)
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from adallm import serve

    serve.serve(args.model, _vllm_options(args, graphs=True), activations=args.activations)
    return 0


def add_run(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        help="generate text on the terminal",
        description="Print what the model answers to PROMPT, as it comes. Without PROMPT, ask for one after the other; "
        "\\q or the end of the input quits, and an interrupt ends an answer.",
        usage="adallm run MODEL [PROMPT] [OPTION ...]",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hugging Face hub name")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 for the likeliest (default: the model's)")
    _add_vllm_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from adallm import serve

    # argparse would take the value of an option of vLLM's for a prompt.
    prompt = None
    if args.vllm_options and not args.vllm_options[0].startswith("-"):
        prompt = args.vllm_options.pop(0)
    options = _vllm_options(args)
    conversation = serve.Conversation(
        args.model,
        options,
        activations=args.activations,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
    )
    if prompt is not None:
        _print_answer(conversation, prompt)
        return 0
    while True:
        try:
            prompt = input(">>> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if prompt.strip() == "\\q":
            return 0
        if prompt.strip():
            try:
                _print_answer(conversation, prompt)
            except KeyboardInterrupt:
                print()
            except ValueError as error:
                print(f"adallm: error: {text.one_line(error)}", file=sys.stderr)


def _print_answer(conversation: Any, prompt: str) -> None:
    answer = conversation.answer(prompt)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
        print()
    finally:
        answer.close()


def add_doctor(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what would run here, and what is wrong with a set-up",
        description="Print GPU, versions and kernels, and for MODEL what its layers run on and the memory that weights "
        "and KV cache take. The exit status is 1 if something is wrong.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a Hugging Face directory with safetensors")
    parser.add_argument("--context", type=int, default=32_768, metavar="N", help="tokens (default: %(default)s)")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from adallm import doctor

    checks = doctor.checks(args.model, context=args.context)
    print(doctor.table(checks))
    return int(any(check.problem for check in checks))
