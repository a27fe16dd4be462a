"""vLLM measured in a notebook as it runs: the benchmark where there is a GPU, and without one the bundled model, small.

The model is quantized to NVFP4 in a temporary folder and generates through vLLM itself, with the plugin, in a process
of its own. On a CPU the plugin runs the reference: the tokens a second say that it runs, and nothing of a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adallm import checkpoint, tiny
from adallm.bench import vllm_e2e
from adallm.bench._e2e_process import Process, WorkerError

PROMPTS = ("def __init__(self", "import os\nimport sys\n", "class TestCase(unittest.TestCase):\n    def")
NEW = 24  # tokens behind each prompt
# On a GPU: BF16, one of stock and one of ours, which takes some minutes each. Without arguments of its own the
# benchmark measures all.
ARGUMENTS = ("--impls", "bf16", "stock-humming-triton", "adallm-auto-lm-head", "--append")
MODEL = Path(tiny.__file__).parent / "model"
_COMMAND = (sys.executable, "-m", "adallm.bench._vllm_small_worker")
_LIMIT_S = 300
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # In one process, with threads where the system puts them and one GiB of cache: a start of seconds.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@dataclass(frozen=True)
class Live:
    """What was run; in print, some lines.

    Attributes:
        said: what ran, or why nothing did.
        tok_s: new tokens a second of all prompts together; None where nothing was generated here.
        texts: prompt -> what the model wrote behind it.
    """

    said: str
    tok_s: float | None
    texts: Mapping[str, str]

    def __str__(self) -> str:
        speed = [] if self.tok_s is None else [f"{self.tok_s:.0f} new tokens a second, {len(self.texts)} prompts"]
        return "\n".join([self.said, *speed, *(f"{prompt!r} -> {text!r}" for prompt, text in self.texts.items())])


def vllm(
    *,
    arguments: Sequence[str] = ARGUMENTS,
    prompts: Sequence[str] = PROMPTS,
    new: int = NEW,
    gpu: bool | None = None,
    benchmark: Callable[[Sequence[str]], int] = vllm_e2e.main,
    process: Callable[..., Any] = Process,
) -> Live:
    """Run ``adallm.bench.vllm_e2e`` on a CUDA GPU, which adds to the record, or the bundled model on a CPU.

    Args:
        arguments: of the benchmark.
        prompts, new: of the bundled model: texts, and tokens generated behind each.
        gpu: None for what there is.
        benchmark, process: take the place of the real ones in a test.
    """
    if importlib.util.find_spec("vllm") is None:
        return Live("vLLM is not installed here: nothing was run.", None, {})
    if torch.cuda.is_available() if gpu is None else gpu:
        code = benchmark(list(arguments))
        said = f"adallm.bench.vllm_e2e {' '.join(arguments)}: exit code {code}."
        if code and "--append" in arguments:
            said += " A record of another commit or version is kept; without --append it would be replaced."
        return Live(said, None, {})
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        checkpoint.convert(MODEL, model)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ADALLM_")}
        worker = process(kept | _ENVIRONMENT, Path(folder) / "log", _COMMAND)
        options = {"max_model_len": 256, "seed": 0, "enforce_eager": True, "distributed_executor_backend": "uni"}
        request = {"model": str(model), "prompts": list(prompts), "new": new, "options": options}
        try:
            answer = worker.ask(request, limit_s=_LIMIT_S)
        except WorkerError as error:
            return Live(f"vLLM did not run the bundled model: {error}".replace(folder, "FOLDER"), None, {})
        finally:
            worker.close()
    texts = dict(zip(prompts, answer["texts"], strict=True))
    return Live(f"The bundled model in NVFP4 on a CPU: {answer['path']}", answer["tok_s"], texts)
