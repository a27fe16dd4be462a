"""The end-to-end benchmark without a GPU: its cases, record and ratios with a worker that is made up, and the worker
itself with the bundled model on a CPU.
"""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from adallm import bench, evaluate, results
from adallm.bench import _e2e_impls, _e2e_load, _e2e_model, _e2e_process, _e2e_worker, vllm_e2e
from adallm.bench._e2e_impls import IMPLS, OURS, STOCK
from adallm.bench._e2e_process import Process, WorkerError
from adallm.bench._e2e_worker import Measure
from adallm.vllm_plugin import compat

PROVENANCE = dict.fromkeys(results.PROVENANCE) | {"command": "first", "commit": "c0", "dirty": False, "gpu": "H100"}
HEAD, LINEAR = "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod"


class Fake:
    """Makes workers that take ``seconds`` of a clock of its own for an answer; what they are asked is in ``asked``."""

    def __init__(self, *, seconds=10.0, fails=(), breaks=()):
        self.seconds, self.fails, self.breaks, self.gib = seconds, fails, breaks, 6.25
        self.now, self.asked, self.open, self.environments = 0.0, [], [], {}

    def __call__(self, environment, log):
        impl = log.stem
        assert self.open == []
        self.open.append(impl)
        self.environments[impl] = environment

        def ask(request):
            self.now += self.seconds
            if "model" in request:
                config = json.loads((log.parent / impl / "config.json").read_text())
                self.asked.append((impl, request["options"], config))
                if impl in self.fails:
                    raise WorkerError("linear is EmulationNvFp4LinearKernel; it must be MarlinNvFp4")
                return {"start_s": 12.5, "weights_gib": self.gib, "path": f"path of {impl}"}
            self.asked.append((impl, request["metric"], request["batch"]))
            if request["metric"] in self.breaks:
                raise WorkerError("RuntimeError: out of memory")
            times = 1 if request["metric"] in _e2e_load.METRICS else request["times"]
            return {"values": [1.0, 1.0, 99.0, 100.0, 101.0, 100.0, 100.0][:times]}

        return types.SimpleNamespace(ask=ask, close=lambda: self.open.remove(impl), tail=lambda: "the log")


def run(tmp_path, *argv, fake=None, **provenance):
    fake = fake or Fake()
    options = vllm_e2e.parse([*argv, "--out", str(tmp_path)])
    code = vllm_e2e.run(options, PROVENANCE | provenance, started=0.0, process=fake, clock=lambda: fake.now)
    assert fake.open == []
    return code, fake


def record(tmp_path):
    return results.read(tmp_path / "vllm_e2e" / "h100.json")


def test_it_is_listed():
    assert "vllm_e2e" in bench.benchmarks()


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vllm_e2e.main([]) == bench.main(["vllm_e2e"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("no CUDA GPU") == err.count("\n") == 2


def test_vllm_is_not_imported_with_it():
    code = (
        "import sys; import adallm.bench.vllm_e2e, adallm.bench._e2e_worker\n"
        "print(sorted({'triton', 'vllm', 'flashinfer'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_implementations():
    others = {"bf16", "stock-humming-bf16kv", "adallm-w4a16-bf16kv", "adallm-w4a8-bf16kv"}
    assert IMPLS.keys() == {*OURS, *STOCK, *others, "bf16-fp8kv"}
    assert (len(OURS), len(STOCK)) == (6, 6)
    for name in (*OURS, *STOCK):
        plain, graphs = (_e2e_impls.options(IMPLS[of]) for of in (name.removesuffix("-graphs"), name))
        more = {"cudagraph_capture_sizes": list(compat.GRAPH_SIZES)} if name.endswith("-graphs") else {}
        assert graphs == plain | more
    for name in others:
        options = _e2e_impls.options(IMPLS[name])
        assert not {"kv_cache_dtype", "attention_backend"} & options.keys()
        assert ("linear_backend" in options, "additional_config" in options) == ("stock" in name, "adallm" in name)
    for name in STOCK:
        options = _e2e_impls.options(IMPLS[name])
        _, linear, attention, *_ = name.split("-")
        assert options["linear_backend"] == linear
        assert options["attention_backend"] == {"flashinfer": "FLASHINFER", "triton": "TRITON_ATTN"}[attention]
        assert options["kv_cache_dtype"] == "fp8"
        assert "additional_config" not in options
    for name, settings in {"w4a16": ("bf16", "checkpoint"), "auto-lm-head": ("auto", "nvfp4")}.items():
        options = _e2e_impls.options(IMPLS[f"adallm-{name}"])
        assert options["additional_config"]["adallm"] == dict(zip(("activations", "lm_head"), settings, strict=True))
        assert (options["attention_backend"], options["kv_cache_dtype"]) == ("CUSTOM", "fp8")
    cached = _e2e_impls.options(IMPLS["bf16-fp8kv"])
    assert (cached["attention_backend"], cached["kv_cache_dtype"]) == ("TRITON_ATTN", "fp8")
    assert not {"linear_backend", "additional_config"} & cached.keys()
    bf16 = _e2e_impls.options(IMPLS["bf16"])
    assert not {"kv_cache_dtype", "attention_backend", "linear_backend"} & bf16.keys()
    assert (bf16["load_format"], bf16["enable_prefix_caching"]) == ("dummy", False)


def test_options_that_vllm_has():
    vllm = pytest.importorskip("vllm", reason="needs vLLM")
    for impl in IMPLS.values():
        arguments = vllm.EngineArgs(model="m", **_e2e_impls.options(impl))
        assert arguments.worker_extension_cls == ""


def test_environment():
    given = {"PATH": "p", "ADALLM_ACTIVATIONS": "bf16", "ADALLM_DISABLE": "1"}
    for name, impl in IMPLS.items():
        found = _e2e_impls.environment(impl, given, Path("/caches"))
        assert found["TRITON_CACHE_DIR"] == "/caches/triton"
        assert (found["PATH"], found.get("ADALLM_DISABLE")) == ("p", None if name.startswith("adallm") else "1")
        assert "ADALLM_ACTIVATIONS" not in found


def test_what_runs_must_be_what_is_claimed():
    facts = {
        "quantization": "modelopt", "linear": ["MarlinNvFp4LinearKernel"], "head": [HEAD], "attention": ["FLASHINFER"],
        "kv_cache": ["fp8_e4m3"],
    }  # fmt: skip
    ours = facts | {"quantization": "adallm", "linear": ["adallm W4A8"], "attention": ["CUSTOM"]}
    dense = {**facts, "quantization": "None", "linear": [LINEAR], "kv_cache": ["auto"], "attention": ["FLASH_ATTN"]}
    for name, found, said in (
        ("stock-marlin-flashinfer", facts, None),
        ("stock-marlin-triton", facts, "attention is FLASHINFER; it must be TRITON_ATTN"),
        ("stock-humming-flashinfer", facts, "linear is MarlinNvFp4LinearKernel; it must be HummingNvFp4"),
        ("stock-marlin-flashinfer", ours, "quantization is adallm; it must be modelopt"),
        ("stock-marlin-flashinfer", facts | {"kv_cache": ["auto"]}, "kv_cache is auto; it must be fp8"),
        ("adallm-auto", ours, None),
        ("adallm-w4a8", ours, None),
        ("adallm-w4a16", ours, "linear is adallm W4A8; it must be adallm W4A16"),
        ("adallm-auto", facts, "quantization is modelopt; it must be adallm"),
        ("adallm-auto", ours | {"linear": ["MarlinNvFp4LinearKernel", "adallm W4A8"]}, "linear is Marlin"),
        ("adallm-auto", ours | {"attention": []}, "attention is nothing; it must be CUSTOM"),
        ("adallm-auto-lm-head", ours, f"head is {HEAD}; it must be adallm W4A16"),
        ("adallm-auto-lm-head", ours | {"head": ["adallm W4A16"]}, None),
        ("bf16", dense, None),
        ("bf16", facts, "quantization is modelopt; it must be None"),
        ("adallm-w4a8-bf16kv", ours | {"kv_cache": ["auto"], "attention": ["FLASH_ATTN"]}, None),
        ("adallm-w4a8-bf16kv", ours, "kv_cache is fp8_e4m3; it must be auto"),
        ("stock-humming-bf16kv", facts, "linear is MarlinNvFp4LinearKernel; it must be HummingNvFp4"),
    ):
        reason = _e2e_impls.mismatch(IMPLS[name].expected, found)
        assert reason is None if said is None else reason.startswith(said)
    assert _e2e_impls.path(facts) == f"MarlinNvFp4LinearKernel, head {HEAD}, FLASHINFER, KV cache fp8_e4m3"


def test_the_model(tmp_path):
    name, config = _e2e_model.config(None, None)
    assert (name, config["num_hidden_layers"], config["hidden_size"]) == ("Qwen3-8B", 36, 4096)
    (tmp_path / "m").mkdir()
    old = {"num_hidden_layers": 3, "layer_types": ["full"] * 3, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(old))
    assert _e2e_model.config(tmp_path / "m", 2) == ("m", {"num_hidden_layers": 2, "layer_types": ["full"] * 2})
    for model, layers, said in ((tmp_path, None, "no config.json"), (None, 37, "supported: 1 to 36")):
        with pytest.raises(ValueError, match=said):
            _e2e_model.config(model, layers)
    _e2e_model.write(tmp_path / "dense", config, quantized=False)
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == config
    _e2e_model.write(tmp_path / "nvfp4", config, quantized=True)
    found = json.loads((tmp_path / "nvfp4" / "config.json").read_text())["quantization_config"]
    assert (found["quant_method"], found["quant_algo"], found["ignore"]) == ("modelopt", "NVFP4", ["lm_head"])
    # With null activations vLLM would take Marlin whatever is asked for.
    assert found["config_groups"]["group_0"]["input_activations"]["num_bits"] == 4


@pytest.mark.parametrize(
    "argv",
    [["--repeats", "2"], ["--batches", "3"], ["--impls", "stock"], ["--metrics", "ttft"], ["--layers", "0"]],
)
def test_options_that_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        vllm_e2e.parse(argv)
    assert argv[0] in capsys.readouterr().err


def test_a_model_that_is_too_short_is_refused(capsys):
    with pytest.raises(SystemExit):
        vllm_e2e.parse(["--model", str(evaluate.BUNDLED_MODEL)])
    assert "2048 positions; at least 8448" in capsys.readouterr().err


def test_every_case_is_measured_and_recorded(tmp_path, capsys):
    code, fake = run(tmp_path)
    assert code == 0
    starts = [asked for asked in fake.asked if isinstance(asked[1], dict)]
    assert [start[0] for start in starts] == list(IMPLS)
    assert ["quantization_config" in start[2] for start in starts] == [impl.quantized for impl in IMPLS.values()]
    assert fake.environments["bf16"]["ADALLM_DISABLE"] == "1"
    rows = record(tmp_path)["rows"]
    assert len(rows) == 17 * (5 + 6 + 12)
    assert [(row["metric"], row["batch"]) for row in rows[:11]] == [
        ("start_s", None), ("weights_gib", None), ("prefill_tok_s", 8), ("decode_tok_s", 1), ("decode_tok_s", 2),
        ("decode_tok_s", 4), ("decode_tok_s", 8), ("decode_tok_s", 16), ("decode_tok_s", 64), ("long_tok_s", 1),
        ("peak_gib", 8),
    ]  # fmt: skip
    assert [(row["metric"], row["batch"], row["prompt"], row["new"], row["repeats"]) for row in rows[11:14]] == [
        ("ttft_p50_ms", 16, 1024, 128, 1), ("ttft_p50_ms", 64, 1024, 128, 1), ("ttft_p90_ms", 16, 1024, 128, 1),
    ]  # fmt: skip
    assert (rows[0]["value"], rows[0]["spread"], rows[0]["repeats"], rows[1]["value"]) == (12.5, None, 1, 6.25)
    assert rows[3] == {
        "model": "Qwen3-8B", "layers": 36, "impl": "bf16", "metric": "decode_tok_s", "batch": 1, "prompt": 32,
        "new": 128, "value": 100.0, "spread": 0.0, "repeats": 5, "path": "path of bf16",
            "card": None,
    }  # fmt: skip
    assert record(tmp_path)["absent"] == []
    out = capsys.readouterr().out
    assert out.startswith("391 cases to measure on H100, 0 in the record already\nbf16: starting\nbf16 start: 12.5 s\n")
    assert "bf16 decode x1: 100 tok/s" in out


def test_an_implementation_that_does_not_start_has_no_rows(tmp_path, capsys):
    argv = ("--impls", "bf16", "stock-marlin-triton", "adallm-auto", "--metrics", "start_s", "decode_tok_s")
    code, fake = run(tmp_path, *argv, "--batches", "1", fake=Fake(fails=["stock-marlin-triton"]))
    assert code == 0
    assert {row["impl"] for row in record(tmp_path)["rows"]} == {"bf16", "adallm-auto"}
    absent = record(tmp_path)["absent"]
    assert [(entry["impl"], entry["metric"], entry["batch"]) for entry in absent] == [
        ("stock-marlin-triton", "start_s", None), ("stock-marlin-triton", "decode_tok_s", 1),
    ]  # fmt: skip
    assert absent[0]["reason"].startswith("linear is EmulationNvFp4LinearKernel; it must be")
    out, err = capsys.readouterr()
    assert out.count("stock-marlin-triton: no row, linear is Emulation") == 1
    assert "the log" in err
    # It is not tried again.
    _, fake = run(tmp_path, *argv, "--batches", "1", "--append")
    assert fake.asked == []


def test_nothing_but_failures(tmp_path):
    assert run(tmp_path, "--impls", "adallm-auto", fake=Fake(fails=["adallm-auto"]))[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_measure_that_fails_leaves_the_others(tmp_path):
    argv = ("--impls", "bf16", "--metrics", "decode_tok_s", "long_tok_s", "peak_gib", "--batches", "1")
    run(tmp_path, *argv, fake=Fake(breaks=["long_tok_s"]))
    assert [row["metric"] for row in record(tmp_path)["rows"]] == ["decode_tok_s", "peak_gib"]
    (absent,) = record(tmp_path)["absent"]
    assert (absent["metric"], absent["reason"]) == ("long_tok_s", "RuntimeError: out of memory")


def test_memory_that_vllm_does_not_count(tmp_path):
    fake = Fake()
    fake.gib = None
    run(tmp_path, "--impls", "bf16", "--metrics", "start_s", "weights_gib", fake=fake)
    assert [row["metric"] for row in record(tmp_path)["rows"]] == ["start_s"]
    assert record(tmp_path)["absent"][0]["reason"] == "vLLM did not say weights_gib"


def test_budget_and_append(tmp_path, capsys):
    argv = ("--impls", "bf16", "adallm-auto", "--metrics", "weights_gib", "decode_tok_s", "--batches", "1", "2")
    # A start is expected to take 200 s, and then as long as the longest one.
    code, fake = run(tmp_path, *argv, "--budget", "200")
    assert (code, fake.asked) == (0, [])
    code, fake = run(tmp_path, *argv, "--budget", "230", fake=Fake(seconds=60.0))
    assert [asked[:3] for asked in fake.asked[1:]] == [("bf16", "decode_tok_s", 1), ("bf16", "decode_tok_s", 2)]
    left = "--append takes them up: adallm-auto: weights, decode x1, decode x2\n"
    assert left in capsys.readouterr().out
    code, fake = run(tmp_path, *argv, "--append", command="second")
    assert {asked[0] for asked in fake.asked} == {"adallm-auto"}
    assert [entry["command"] for entry in record(tmp_path)["runs"]] == ["first", "second"]
    assert len(record(tmp_path)["rows"]) == 6
    _, fake = run(tmp_path, *argv, "--append", commit="c1")
    assert fake.asked == []
    assert "is of commit c0, this run of c1" in capsys.readouterr().err


def test_runs_at_the_same_time_fill_one_record(tmp_path, monkeypatch):
    argv = ("--metrics", "weights_gib", "--append")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")

    class Slow(Fake):
        def __call__(self, environment, log):
            # Another run begins and ends in the meantime.
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
            run(tmp_path, *argv, "--impls", "adallm-auto", command="second")
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
            return super().__call__(environment, log)

    run(tmp_path, *argv, "--impls", "bf16", fake=Slow())
    found = record(tmp_path)
    assert [(row["impl"], row["card"]) for row in found["rows"]] == [("bf16", "3"), ("adallm-auto", "1")]
    assert [entry["command"] for entry in found["runs"]] == ["second", "first"]
    assert [path.name for path in (tmp_path / "vllm_e2e").iterdir()] == ["h100.json"]


def test_other_models_have_rows_of_their_own(tmp_path):
    argv = ("--impls", "bf16", "--metrics", "weights_gib")
    run(tmp_path, *argv)
    run(tmp_path, *argv, "--layers", "2", "--append")
    assert [row["layers"] for row in record(tmp_path)["rows"]] == [2, 36]


def row(impl, value, metric="decode_tok_s", batch=1):
    return {"model": "Qwen3-8B", "layers": 36, "impl": impl, "metric": metric, "batch": batch, "value": value}


ROWS = [
    row("bf16", 100.0), row("stock-marlin-triton", 150.0), row("stock-marlin-flashinfer", 160.0),
    row("adallm-w4a16", 200.0), row("adallm-auto", 240.0),
    row("bf16", 15.0, "weights_gib", None), row("stock-marlin-triton", 6.0, "weights_gib", None),
    row("adallm-auto", 5.0, "weights_gib", None), row("adallm-auto-lm-head", 4.0, "weights_gib", None),
    row("adallm-auto", 2000.0, batch=64), row("bf16", 3000.0, batch=16),
]  # fmt: skip


def test_summary():
    weights, one, many = vllm_e2e.summary(ROWS)
    assert one == {
        "model": "Qwen3-8B", "layers": 36, "metric": "decode_tok_s", "batch": 1, "ours": "adallm-auto", "value": 240.0,
        "stock": "stock-marlin-flashinfer", "vs_stock": 1.5, "vs_bf16": 2.4,
        "same_head": 1.5,
    }  # fmt: skip
    # Less is better.
    assert (weights["ours"], weights["vs_stock"], weights["vs_bf16"]) == ("adallm-auto-lm-head", 1.5, 3.75)
    # The smallest of ours has an NVFP4 lm_head, which stock vLLM has not.
    assert weights["same_head"] == 1.2
    assert (many["batch"], many["stock"], many["vs_stock"], many["vs_bf16"]) == (64, None, None, None)
    assert vllm_e2e.summary([]) == []


def test_report():
    lines = vllm_e2e.report(ROWS).splitlines()
    assert lines[0].split("  ")[0] == "Qwen3-8B, 36 layers"
    assert "weights GiB" in lines[0]
    assert "decode x1 tok/s" in lines[0]
    assert lines[1].split() == ["bf16", "15.00", "100.0", "3000", "-"]
    assert "decode x1 240.0 tok/s adallm-auto 1.50 2.40 1.50 stock-marlin-flashinfer" in [
        " ".join(x.split()) for x in lines
    ]
    assert vllm_e2e.report([]) == ""
    waits = [row("bf16", 20.5, "itl_p99_ms", 16), row("adallm-auto", 10.25, "itl_p99_ms", 16)]
    both = vllm_e2e.report(ROWS + waits)
    assert both.startswith(vllm_e2e.report(ROWS) + "\n\n")
    assert both.removeprefix(vllm_e2e.report(ROWS)).split()[3:8] == ["itl", "p99", "x16", "ms", "bf16"]
    assert "itl p99 x16 10.25 ms adallm-auto" in " ".join(both.split())
    assert vllm_e2e.report(ROWS, markdown=True).startswith("| Qwen3-8B, 36 layers ")


class Llm:
    """Stands for vLLM's: a call takes a second for each prompt token and ten for each new one."""

    def __init__(self, clock):
        self.clock, self.given, self.missing, self.logprob = clock, [], 0, -1.0
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(get_vocab_size=lambda: 50))

    def collective_rpc(self, name):
        self.given.append(name)
        return [3.5]

    def generate(self, prompts, params, use_tqdm):
        self.given.append(prompts)
        self.clock[0] += sum(len(prompt["prompt_token_ids"]) for prompt in prompts) + 10 * len(prompts) * params.new
        step = {7: types.SimpleNamespace(logprob=self.logprob)}
        made = types.SimpleNamespace(token_ids=[7] * (params.new - self.missing), logprobs=[step])
        return [types.SimpleNamespace(outputs=[made]) for _ in prompts]


@pytest.fixture
def engine():
    clock = [0.0]
    made = object.__new__(_e2e_worker.Engine)
    made._llm, made._clock, made._vocabulary = Llm(clock), lambda: clock[0], 50
    made._params = lambda new, **options: types.SimpleNamespace(new=new)
    return made


def test_what_is_measured(engine):
    assert engine.values(Measure("decode_tok_s", 2, 5, 4, 2)) == [8 / 90, 8 / 90]
    assert engine.values(Measure("prefill_tok_s", 3, 20, 1, 1)) == [60 / 90]
    assert engine.values(Measure("long_tok_s", 1, 30, 4, 1)) == [4 / 40]
    calls = engine._llm.given
    # Never the same prompt twice.
    seen = [tuple(prompt["prompt_token_ids"]) for call in calls for prompt in call]
    assert len(set(seen)) == len(seen) == 2 * 2 + 3 + 2
    assert all(0 <= token < 50 for prompt in seen for token in prompt)
    engine._llm.given = []
    assert engine.values(Measure("peak_gib", 1, 3, 1, 1)) == [3.5]
    assert [call for call in engine._llm.given if isinstance(call, str)] == [
        "adallm_bench_reset_peak", "adallm_bench_peak_gib",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'ttft'; supported: decode_tok_s"):
        engine.values(Measure("ttft", 1, 3, 1, 1))


class Steps:
    """Stands for vLLM's engine: a step takes a second and gives each request a token, its first with the second."""

    def __init__(self, *, short=0):
        self.now, self.short, self.open, self.most = 0.0, short, {}, 0

    def add_request(self, key, prompt, params):
        self.open[key] = [-1, params - self.short]
        self.most = max(self.most, len(self.open))

    def step(self):
        self.now += 1.0
        outputs = []
        for key, state in list(self.open.items()):
            state[0] += 1
            made = types.SimpleNamespace(token_ids=[7] * max(state[0], 0))
            outputs.append(types.SimpleNamespace(request_id=key, outputs=[made], finished=state[0] >= state[1]))
            if outputs[-1].finished:
                del self.open[key]
        return outputs


def test_latency_under_load():
    load = _e2e_load.requests("seed", 20, 50, prompt=8, new=4)
    assert load == _e2e_load.requests("seed", 20, 50, prompt=8, new=4)
    assert load != _e2e_load.requests("other", 20, 50, prompt=8, new=4)
    assert {len(request.prompt) for request in load} <= set(range(2, 15))
    assert {request.new for request in load} == set(range(2, 7))
    engine = Steps()
    found = _e2e_load.run(engine, load, 3, params=lambda new: new, clock=lambda: engine.now)
    assert engine.most == 3
    # The first token comes with the second step.
    assert found == {"ttft": [2.0] * 20, "itl": [1.0] * sum(request.new - 1 for request in load)}
    with pytest.raises(RuntimeError, match="a request has 1 new tokens, not 2"):
        _e2e_load.run(Steps(short=1), [_e2e_load.Request([1], 2)], 1, params=lambda new: new, clock=float)
    assert _e2e_load.percentile([i / 1000 for i in range(101)], 90) == pytest.approx(90)
    assert _e2e_load.METRICS["itl_p99_ms"] == ("itl", 99)


def test_tokens_that_come_together():
    """Three steps: two tokens at once, then four."""
    answers = iter([2, 2, 6])
    clock = iter([0.0, 3.0, 4.0, 7.0])

    def step():
        count = next(answers)
        made = types.SimpleNamespace(token_ids=[1] * count)
        return [types.SimpleNamespace(request_id="load-0", outputs=[made], finished=count == 6)]

    engine = types.SimpleNamespace(add_request=lambda *request: None, step=step)
    found = _e2e_load.run(engine, [_e2e_load.Request([1], 6)], 1, params=int, clock=lambda: next(clock))
    assert found == {"ttft": [3.0], "itl": [1.0] * 4}


def test_percentiles_are_of_one_run(engine):
    steps = Steps()
    engine._llm.llm_engine, engine._clock, engine._loads = steps, lambda: steps.now, {}
    engine._params = lambda new: new
    assert engine.values(Measure("ttft_p50_ms", 2, 8, 4, 6)) == [2000.0]
    took = steps.now
    assert engine.values(Measure("itl_p99_ms", 2, 8, 4, 6)) == [1000.0]
    assert steps.now == took


def test_wrong_generations_are_found(engine):
    engine._check()
    engine._llm.logprob = float("nan")
    with pytest.raises(RuntimeError, match="the first token has the log-probabilities"):
        engine._check()
    engine._llm.missing = 1
    with pytest.raises(RuntimeError, match=r"2 of 2 prompts have \[3\] new tokens, not 4"):
        engine.values(Measure("decode_tok_s", 2, 5, 4, 1))


def test_the_worker_answers_line_by_line():
    facts = {"linear": ["a"], "head": ["b"], "attention": ["c"], "kv_cache": ["d"], "weights_gib": 1.5}
    made = types.SimpleNamespace(start_s=2.0, facts=facts, values=lambda what: [1 / what.batch])
    measure = vars(Measure("decode_tok_s", 4, 5, 4, 1))
    lines = [{"model": "m"}, measure, measure | {"batch": 0}, measure]
    answers = io.StringIO()
    _e2e_worker.serve(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), answers, lambda job: made)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"start_s": 2.0, "path": "a, head b, c, KV cache d", "weights_gib": 1.5},
        {"values": [0.25]},
        {"error": "ZeroDivisionError: division by zero"},
        {"values": [0.25]},
    ]

    def fails(job):
        raise RuntimeError("attention is FLASHINFER; it must be TRITON_ATTN")

    answers = io.StringIO()
    _e2e_worker.serve(io.StringIO('{"model": "m"}\n{}\n'), answers, fails)
    assert json.loads(answers.getvalue()) == {"error": "RuntimeError: attention is FLASHINFER; it must be TRITON_ATTN"}


def process(tmp_path, code):
    return Process({}, tmp_path / "log", (sys.executable, "-c", f"import sys, json, subprocess, time\n{code}"))


def test_processes(tmp_path):
    made = process(tmp_path, "for line in sys.stdin: print(json.dumps({'got': json.loads(line)['a'] + 1}), flush=True)")
    assert [made.ask({"a": a})["got"] for a in (1, 2)] == [2, 3]
    made.close()
    # What outlives it holds the pipe open, and is ended too.
    made = process(
        tmp_path, "print('ValueError: no kernel', file=sys.stderr)\nsubprocess.Popen(['sleep', '60']); sys.exit(3)"
    )
    with pytest.raises(WorkerError, match=r"^ValueError: no kernel \(the process ended with 3\)$"):
        made.ask({"a": 1})
    assert made.tail() == "ValueError: no kernel"
    made.close()
    made = process(tmp_path, "time.sleep(0.5); print(json.dumps({'error': 'RuntimeError: bad'}), flush=True)")
    with pytest.raises(WorkerError, match="no answer in 0 s"):
        made.ask({"a": 1}, limit_s=0)
    with pytest.raises(WorkerError, match=r"^RuntimeError: bad$"):
        made.ask({"a": 1})
    made.close()


def test_the_reason_of_an_engine_that_died():
    log = (
        "(EngineCore) ERROR [core.py] ValueError: No valid attention backend\nmore\n"
        "Exception: WorkerProc initialization failed due to an exception in a background process.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    second = "RuntimeError: Engine core initialization failed. See root cause above."
    assert _e2e_process.reason(second, log) == f"ValueError: No valid attention backend ({second})"
    assert _e2e_process.reason("ValueError: x\ny", log) == "ValueError: x"
    assert _e2e_process.reason(second, "nothing") == second


def test_dummy_weights():
    pytest.importorskip("vllm", reason="needs vLLM")
    from adallm.bench import _e2e_extension

    layer = torch.nn.Module()
    for name, value in {
        "weight": torch.zeros(4, 8, dtype=torch.uint8), "weight_scale": torch.zeros(4, 1).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.zeros(1), "input_scale": torch.zeros(1),
    }.items():  # fmt: skip
        layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    _e2e_extension.fill(layer)
    assert len(layer.weight.unique()) > 4
    assert (layer.weight_scale.float() == 1).all()
    assert layer.weight_scale_2.item() == _e2e_extension.GLOBAL_SCALE == 1 / 64
    dense = torch.nn.Linear(2, 2)
    before = dense.weight.clone()
    _e2e_extension.fill(dense)
    assert torch.equal(dense.weight, before)


def test_the_peak_is_without_the_cache(monkeypatch):
    pytest.importorskip("vllm", reason="needs vLLM")
    from adallm.bench._e2e_extension import Extension

    cache = torch.zeros(2, 1 << 20)
    layers = {"a": cache[0], "b": [cache[1]], "c": torch.zeros(1 << 20)}
    context = {name: types.SimpleNamespace(attn_backend=None, kv_cache=value) for name, value in layers.items()}
    worker = Extension()
    worker.vllm_config = types.SimpleNamespace(compilation_config=types.SimpleNamespace(static_forward_context=context))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 112 << 20)
    assert worker.adallm_bench_peak_gib() == 100 / 1024


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(("name", "said"), [("bf16", None), ("adallm-w4a8", None), ("adallm-w4a16", "linear")])
def test_the_worker_on_a_cpu(tmp_path, monkeypatch, name, said):
    pytest.importorskip("vllm", reason="needs vLLM")
    if torch.cuda.is_available():
        pytest.skip("needs vLLM's CPU build")
    for variable, value in {
        "ENABLE_V1_MULTIPROCESSING": "0", "CPU_OMP_THREADS_BIND": "nobind", "CPU_KVCACHE_SPACE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"VLLM_{variable}", value)
    impl = IMPLS[name]
    _, config = _e2e_model.config(evaluate.BUNDLED_MODEL, 2)
    _e2e_model.write(tmp_path / "m", config, quantized=impl.quantized)
    # A CPU has neither our attention nor, by default, an FP8 cache.
    options = _e2e_impls.options(impl) | {"max_model_len": 128, "enforce_eager": True, "kv_cache_dtype": "auto"}
    options |= {"distributed_executor_backend": "uni", "attention_backend": None}
    expected = {key: start for key, start in impl.expected.items() if key not in ("attention", "kv_cache")}
    if said:
        # Of another implementation.
        expected = expected | {"linear": "MarlinNvFp4"}
    worker = Process(_e2e_impls.environment(impl, os.environ, tmp_path / "caches"), tmp_path / "log")
    try:
        job = {"model": str(tmp_path / "m"), "options": options, "expected": expected}
        if said:
            with pytest.raises(WorkerError, match=r"^RuntimeError: linear is adallm W4A16; it must be MarlinNvFp4$"):
                worker.ask(job)
            return
        started = worker.ask(job)
        assert started["start_s"] > 0
        assert (LINEAR if name == "bf16" else "adallm W4A8") in started["path"]
        assert "head Unquantized" in started["path"]
        assert "CPU_ATTN" in started["path"]
        waits = [worker.ask(vars(Measure(f"{what}_p90_ms", 2, 16, 4, 6)))["values"] for what in ("ttft", "itl")]
        assert all(len(values) == 1 and values[0] > 0 for values in waits)
        for metric, prompt, new in (("decode_tok_s", 8, 4), ("prefill_tok_s", 16, 1), ("long_tok_s", 32, 16)):
            values = worker.ask(vars(Measure(metric, 2, prompt, new, 2)))["values"]
            assert len(values) == 2
            assert all(value > 0 for value in values)
    finally:
        worker.close()
