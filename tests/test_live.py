"""``live``: the benchmark on a GPU, the bundled model on a CPU, and words where neither runs."""

import importlib.util
import json
import subprocess

import pytest
import torch

from adallm import checkpoint, live
from adallm.bench._e2e_process import WorkerError


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


class Worker:
    """In place of a process."""

    def __init__(self, environment, log, command):
        self.environment, self.folder, self.command, self.closed = environment, log.parent, command, False

    def ask(self, request, *, limit_s):
        self.request = request
        self.found = checkpoint.load(request["model"])
        return {"texts": ["one", "two"], "tok_s": 12.4, "path": "adallm W4A16"}

    def close(self):
        self.closed = True


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = live.vllm(process=None)
    assert str(found) == "vLLM is not installed here: nothing was run."
    assert (found.tok_s, found.texts) == (None, {})


@pytest.mark.parametrize(("code", "said"), [(0, "exit code 0."), (2, "without --append it would be replaced.")])
def test_on_a_gpu_the_benchmark_adds_to_the_record(installed, code, said):
    asked = []

    def benchmark(arguments):
        asked.append(arguments)
        return code

    found = live.vllm(gpu=True, benchmark=benchmark, process=None)
    assert asked == [list(live.ARGUMENTS)]
    assert "--append" in asked[0]
    assert str(found).endswith(said)


def test_on_a_cpu_the_bundled_model_in_nvfp4(installed, monkeypatch):
    made = []
    monkeypatch.setenv("ADALLM_DISABLE", "1")

    def process(*arguments):
        made.append(Worker(*arguments))
        return made[0]

    found = live.vllm(gpu=False, prompts=("a", "b"), new=3, process=process)
    [worker] = made
    assert worker.closed
    assert not worker.folder.exists()
    assert "ADALLM_DISABLE" not in worker.environment
    assert worker.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert (worker.request["prompts"], worker.request["new"]) == (["a", "b"], 3)
    assert any(type(tensor).__name__ == "NVFP4Tensor" for tensor in worker.found.values())
    assert found.texts == {"a": "one", "b": "two"}
    assert "12 new tokens a second, 2 prompts\n'a' -> 'one'" in str(found)


def test_a_failure_is_said_without_the_folder(installed):
    class Failing(Worker):
        def ask(self, request, *, limit_s):
            raise WorkerError(f"RuntimeError: {request['model']} does not load")

    found = live.vllm(gpu=False, process=Failing)
    assert str(found) == "vLLM did not run the bundled model: RuntimeError: FOLDER/model does not load"


def test_the_worker_answers_with_an_error_alone():
    done = subprocess.run(live._COMMAND, input="no JSON\n", capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["error"].startswith("JSONDecodeError: Expecting value")


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_itself():
    pytest.importorskip("vllm", reason="needs vLLM")
    if torch.cuda.is_available():
        pytest.skip("needs vLLM's CPU build")
    found = live.vllm(new=4)
    assert found.tok_s > 0, found.said
    assert found.said.startswith("The bundled model in NVFP4 on a CPU: adallm W4A16, head Unquantized")
    assert len(found.texts) == len(live.PROMPTS)
    assert all(found.texts.values())
