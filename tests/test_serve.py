"""``adallm serve`` and ``adallm run``: the options that vLLM gets, and both for real on a CPU."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from adallm import checkpoint, cli, evaluate, serve
from adallm.vllm_plugin import compat

MODEL = evaluate.BUNDLED_MODEL
ADA, HOPPER, AMPERE, BLACKWELL = (8, 9), (9, 0), (8, 6), (12, 0)


@pytest.mark.parametrize(
    ("capability", "given", "kind", "kernel", "added"),
    [
        (None, [], None, True, []),
        (AMPERE, [], None, True, []),
        (BLACKWELL, [], None, True, []),
        (ADA, [], None, True, ["--kv-cache-dtype", "fp8", "--attention-backend", "CUSTOM"]),
        (HOPPER, ["--port", "1"], None, True, ["--kv-cache-dtype", "fp8", "--attention-backend", "CUSTOM"]),
        (ADA, [], "auto", True, []),
        (ADA, [], "fp8_e4m3", True, ["--kv-cache-dtype", "fp8_e4m3", "--attention-backend", "CUSTOM"]),
        (ADA, [], "fp8_e5m2", True, ["--kv-cache-dtype", "fp8_e5m2"]),
        (ADA, [], None, False, ["--kv-cache-dtype", "fp8"]),
        (ADA, ["--attention-backend=FLASHINFER"], None, True, ["--kv-cache-dtype", "fp8"]),
        (ADA, ["--attention_backend", "FLASHINFER"], None, True, ["--kv-cache-dtype", "fp8"]),
        (ADA, ["--attention-config.backend=FLASHINFER"], None, True, ["--kv-cache-dtype", "fp8"]),
        (None, [], "fp8", True, ["--kv-cache-dtype", "fp8"]),
    ],
)
def test_options(capability, given, kind, kernel, added):
    found = options(str(MODEL), given, kv_cache_dtype=kind, decode_kernel=kernel, capability=capability)
    assert found == [*given, *added]


def options(model, given, *, kv_cache_dtype=None, decode_kernel=True, graphs=False, capability):
    return serve.options(
        model, given, kv_cache_dtype=kv_cache_dtype, decode_kernel=decode_kernel, graphs=graphs, capability=capability
    )


@pytest.mark.parametrize(
    ("capability", "given", "added"),
    [
        (None, [], False),
        (BLACKWELL, [], False),
        (AMPERE, [], True),
        (HOPPER, ["--max-num-batched-tokens", "1024", "--config-format", "hf"], True),
        (ADA, ["--cudagraph-capture-sizes", "1", "2"], False),
        (ADA, ["--max_cudagraph_capture_size=64"], False),
        (ADA, ["--compilation-config", "{}"], False),
        (ADA, ["--compilation-config.cudagraph_mode=NONE"], False),
        (ADA, ["-cc.mode=0"], False),
        (ADA, ["-O0"], False),
        (ADA, ["--enforce-eager"], False),
        (ADA, ["--speculative-config", "{}"], False),
        (ADA, ["--spec-tokens", "3"], False),
        (ADA, ["--config", "file.yaml"], False),
    ],
)
def test_graphs(capability, given, added):
    found = options("a/name", given, kv_cache_dtype="auto", graphs=True, capability=capability)
    sizes = ["--cudagraph-capture-sizes", *map(str, compat.GRAPH_SIZES)]
    assert found == [*given, *(sizes if added else [])]


def test_graphs_are_of_vllms_own_sizes_and_more():
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(options("a/name", ["--seed", "1"], graphs=True, capability=AMPERE))
    assert parsed.cudagraph_capture_sizes == list(compat.GRAPH_SIZES)
    assert {1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)} < set(compat.GRAPH_SIZES)
    assert list(compat.GRAPH_SIZES) == sorted(set(compat.GRAPH_SIZES))
    assert compat.GRAPH_SIZES[-1] == 4096


def test_a_model_that_the_decode_kernel_does_not_take(tmp_path):
    for config, fits in (
        ('{"num_attention_heads": 8, "hidden_size": 512}', True),
        ('{"num_attention_heads": 8, "hidden_size": 640}', False),
        ('{"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 128}', False),
        ('{"num_attention_heads": 8, "head_dim": 128, "kv_lora_rank": 512}', False),
        ('{"text_config": {"num_attention_heads": 8, "head_dim": 256}}', True),
    ):
        (tmp_path / "config.json").write_text(config)
        found = options(str(tmp_path), [], capability=ADA)
        assert ("CUSTOM" in found) == fits
    assert "CUSTOM" in options("a/name", [], capability=ADA)


def test_it_becomes_vllm(monkeypatch):
    called = []
    monkeypatch.setattr(os, "execve", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(serve, "capability", lambda: None)
    assert cli.main(["serve", "dir", "--activations", "bf16", "--port", "8001", "--kv-cache-dtype", "fp8"]) == 0
    ((program, command, environment),) = called
    assert program == sys.executable
    assert command[1:] == [
        "-m", "adallm.vllm_command", "serve", "dir", "--port", "8001", "--kv-cache-dtype", "fp8",
        "--shutdown-timeout", "30",
    ]  # fmt: skip
    assert environment["ADALLM_ACTIVATIONS"] == "bf16"


def test_what_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--port", "8001", "dir"])
    assert "MODEL comes before the options" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["inspect", "dir", "--port", "1"])
    assert "unrecognized arguments: --port 1" in capsys.readouterr().err
    pytest.importorskip("vllm", reason="needs vLLM")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert cli.main(["serve", "dir"]) == 2
    assert "VLLM_PLUGINS is 'other'" in capsys.readouterr().err
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["run", "dir", "prompt"]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("vllm", reason="needs vLLM")
    if torch.cuda.is_available():
        pytest.skip("needs vLLM's CPU build")
    path = tmp_path_factory.mktemp("served") / "model"
    checkpoint.convert(MODEL, path, layout="modelopt", progress=False)
    return path


# Other tests leave settings of vLLM's behind in this process.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}


@pytest.mark.slow
@pytest.mark.vllm
def test_run(model):
    def run(*arguments, text=None):
        command = [sys.executable, "-m", "adallm.cli", "run", str(model), *arguments, "--max-model-len", "256"]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)

    options = ("--max-tokens", "12", "--temperature", "0")
    once = run("import os\n", *options)
    assert (once.returncode, once.stdout[-1:]) == (0, "\n"), once.stderr
    long = "x = 1\n" * 300
    several = run(*options, text=f"import os\n\n{long.splitlines()[0] * 300}\nclass A\n\\q\nnever\n")
    assert several.returncode == 0, several.stderr
    # An answer for each prompt but the one that is too long, which is said, and the conversation goes on.
    assert several.stderr.count("adallm: error: ") == 1
    assert "256" in several.stderr
    assert "never" not in several.stdout
    assert len(several.stdout) > len(once.stdout) // 2


@pytest.fixture(scope="module")
def server(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "adallm.cli", "serve", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "256", "--enforce-eager", "--served-model-name", "tiny",
    ]  # fmt: skip
    log = (model.parent / "log").open("w+")
    process = subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    try:
        for _ in range(1200):
            if process.poll() is not None:
                break
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        log.seek(0)
        text = log.read()
        assert process.poll() is None, text[-4000:]
        assert "NVFP4 QKVParallelLinear" in text
        yield process, client, openai
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.vllm
def test_the_server(server):
    process, client, openai = server

    def complete(prompt="import os\n", **options):
        return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 16, "temperature": 0, **options})

    whole = complete().choices[0].text
    assert whole
    assert "".join(piece.choices[0].text for piece in complete(stream=True)) == whole

    prompts = [f"def function_{i}(" for i in range(16)]
    alone = [complete(prompt).choices[0].finish_reason for prompt in prompts[:2]]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(complete, prompts))
    assert [answer.choices[0].finish_reason for answer in answers[:2]] == alone
    assert all(answer.usage.completion_tokens == 16 or answer.choices[0].finish_reason == "stop" for answer in answers)

    # A client that leaves in the middle takes nothing with it.
    stream = complete(stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    assert complete().choices[0].text == whole

    with pytest.raises(openai.BadRequestError, match="256"):
        complete("x = 1\n" * 400)
    assert complete().choices[0].text == whole

    # Asked to end in the middle of requests.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pending = [
            pool.submit(complete, prompt, max_tokens=200, extra_body={"ignore_eos": True}) for prompt in prompts[:4]
        ]
        time.sleep(0.3)
        group = os.getpgid(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        for future in pending:
            assert future.exception() is None or isinstance(future.exception(), openai.APIError)
    assert process.returncode in (0, -signal.SIGTERM)
    for _ in range(30):
        left = subprocess.run(["ps", "-o", "pid,stat,args", "-g", str(group)], capture_output=True, text=True).stdout
        if len(left.splitlines()) == 1:
            break
        time.sleep(0.5)
    assert len(left.splitlines()) == 1, left
