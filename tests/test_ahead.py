"""Kernels that are compiled beside vLLM: which, into which cache, and that nothing of it outlives the engine."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch
from torch._inductor import config

from adallm.kernels import choice
from adallm.vllm_plugin import ahead, compat, fuse

LINEAR = tuple(ahead.Linear(n, k, "auto", False) for n, k in ((6144, 4096), (4096, 4096), (4096, 12288)))
ATTENTION = ahead.Attention(32, 8, 128, 16, True, 1, 528, False, False, False)
JOB = ahead.Job((9, 0), "sm_90", 132, "none", "bfloat16", 8192, 1024, LINEAR, (ATTENTION,))


NAMES = """
import sys
from adallm.vllm_plugin import ahead
for line in sys.stdin:
    print(*(launcher.__module__.rpartition(".")[2] for launcher, _ in ahead.launches(ahead.read(line))))
"""


def names(*jobs):
    """Of what is compiled for each; in a process of its own, whose kernels are not the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = "".join(json.dumps(dataclasses.asdict(job)) + "\n" for job in jobs)
    command = [sys.executable, "-c", NAMES]
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def test_what_is_compiled():
    few = dataclasses.replace(JOB, tokens=8, sequences=8, attention=())
    eight = tuple(dataclasses.replace(size, activations="fp8", bias=True) for size in LINEAR)
    gated = tuple(dataclasses.replace(size, gated=size.k == 12288) for size in LINEAR)
    normed = tuple(dataclasses.replace(size, normed=size.k == 4096) for size in LINEAR)
    found, twice, fewer, in_fp8, of_mlp, few_of_mlp, of_norm, few_of_norm = names(
        JOB,
        dataclasses.replace(JOB, linear=LINEAR * 2),
        few,
        dataclasses.replace(JOB, linear=eight, dtype="float16"),
        dataclasses.replace(JOB, linear=gated),
        dataclasses.replace(few, linear=gated),
        dataclasses.replace(JOB, linear=normed),
        dataclasses.replace(few, linear=normed),
    )
    assert found.count("decode") == 5  # one sequence, up to 16, 64, 256 and 1024
    assert {name: found.count(name) for name in ("write_kv", "gather_kv", "expand", "quantize")} == {
        "write_kv": 1, "gather_kv": 1, "expand": 1, "quantize": 2,
    }  # fmt: skip
    assert {"matmul", "hopper"} <= set(found)
    # Another layer of the same size needs nothing more.
    assert twice == found
    assert set(fewer) == {"matmul"}
    assert {"hopper", "quantize"} <= set(in_fp8)
    # Behind a gated MLP, in 16 bits and in FP8.
    assert sorted(of_mlp) == sorted([*found, "silu", "quantize"])
    assert sorted(few_of_mlp) == sorted([*fewer, "silu"])
    # Behind an RMSNorm, likewise.
    assert sorted(of_norm) == sorted([*found, "norm", "quantize"])
    assert sorted(few_of_norm) == sorted([*fewer, "norm"])


def test_a_job_survives_its_way_to_the_process():
    assert ahead.read(json.dumps(dataclasses.asdict(JOB))) == JOB


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Begins a job with a cache of its own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    started = []

    def run(job):
        started.append(ahead.run(job))
        return started[-1], tmp_path

    yield run
    for one in started:
        one.stdin.close()
        one.wait(30)


@pytest.mark.slow
def test_it_fills_the_cache(process):
    few = dataclasses.replace(JOB, tokens=1, sequences=1, linear=LINEAR[1:2])
    child, cache = process(few)
    assert child.wait(300) == 0
    compiled = {path.stem for path in cache.rglob("*.cubin")}
    assert compiled == {"nvfp4_matmul", "paged_decode_kernel", "write_kv_kernel", "gather_kv_kernel"}


@pytest.mark.slow
def test_it_ends_with_the_engine(process):
    child, _ = process(JOB)
    time.sleep(1)
    child.stdin.close()  # as the system does when the engine dies
    assert child.wait(60) != 0
    lines = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout.split("\n")
    alive = [line for line in lines if line.split()[:1] == [str(child.pid)] and line.split()[1][0] != "Z"]
    assert alive == []


@pytest.mark.parametrize(("fused", "norms"), [(True, True), (True, False), (False, False)])
def test_which_sizes_are_behind_a_gated_mlp_or_a_norm(fused, norms):
    sizes = [(96, 64), (64, 64), (256, 64), (64, 128)]  # qkv, o, gate_up, down
    linear = [types.SimpleNamespace(out_features=n, in_features=k, activations="auto", bias=None) for n, k in sizes]
    with config.patch(post_grad_fusion_options={}):
        fuse.use(fused, norms=norms)
        found = list(ahead._linear(linear, 64))
    assert [(x.n, x.k) for x in found if x.gated] == ([(64, 128)] if fused else [])
    assert [(x.n, x.k) for x in found if x.normed] == ([(96, 64), (64, 64), (256, 64)] if norms else [])


def test_of_an_engine(monkeypatch):
    jobs = []
    monkeypatch.setattr(ahead, "run", jobs.append)
    backend = type("Backend", (), {"__module__": "adallm.vllm_plugin.attention"})
    impl = types.SimpleNamespace(
        num_heads=6, num_kv_heads=2, head_size=64, kv_cache_dtype="fp8", sliding_window=(-1, -1), logits_soft_cap=0,
        sinks=None,
    )  # fmt: skip
    layers = [types.SimpleNamespace(attn_backend=backend, impl=impl)] * 2 + [types.SimpleNamespace()]
    config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(rank=0),
        scheduler_config=types.SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=16),
        model_config=types.SimpleNamespace(dtype=torch.bfloat16, max_model_len=100, get_hidden_size=lambda: 64),
        cache_config=types.SimpleNamespace(block_size=16),
        compilation_config=types.SimpleNamespace(static_forward_context=dict(enumerate(layers))),
    )
    linear = [types.SimpleNamespace(out_features=n, in_features=384, activations="auto", bias=None) for n in (64, 64)]
    monkeypatch.setattr(compat, "capability", lambda: None)
    ahead.start(config, linear)  # a CPU
    monkeypatch.setattr(compat, "capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(choice, "gpu", lambda device: choice.GPU("sm_90", 132, "h100"))
    ahead.start(None, linear)
    ahead.start(config, linear)
    config.parallel_config.rank = 1
    ahead.start(config, linear)
    (job,) = jobs
    assert job.linear == (ahead.Linear(64, 384, "auto", False),)
    assert job.attention == (ahead.Attention(6, 2, 64, 16, True, 1, 7, False, False, False),)
    assert (job.dtype, job.tokens, job.sequences, job.slug) == ("bfloat16", 2048, 16, "h100")


LAUNCH = """
import sys, torch
from adallm.attention import gather_kv, paged_decode, write_kv
from adallm.kernels import choice
from adallm.kernels.decode_choice import WRITES_UP_TO
from adallm.linear import NVFP4Linear
from adallm.nvfp4 import quantize
for n, k in ((6144, 4096), (4096, 4096), (4096, 12288)):
    t = quantize(torch.randn(n, k, device="cuda"))
    layer = NVFP4Linear(t, activations="auto")
    for m in (1, 2, 8, 9, 16, 17, 32, 64, 100, 128, 200, 256, 300, 383, 384, 1000):
        layer(torch.randn(m, k, device="cuda").bfloat16())
    if k == 12288:
        for m in (1, 17, 8192):
            given = layer.words, layer.scales, layer.row_scale, layer.shift, None, layer.arrivals, layer._how, n
            gate_up = torch.randn(m, 2 * k, device="cuda").bfloat16()
            torch.ops.adallm.nvfp4_linear_gated(gate_up, *given, torch.bfloat16)
cache = torch.zeros(64, 16, 8, 256, device="cuda").to(torch.float8_e4m3fn)
k_cache, v_cache = cache.split(128, dim=-1)
new = torch.randn(16, 8, 128, device="cuda").bfloat16()
write_kv(new, new, k_cache, v_cache, torch.arange(16, device="cuda"))
starts, table = torch.tensor([0, 16], device="cuda").int(), torch.zeros(1, 528, dtype=torch.int32, device="cuda")
gather_kv(k_cache, v_cache, table, starts, tokens=16, longest=16, dtype=torch.bfloat16)
for batch in (1, 2, 16, 17, 64, 65, 256, 257, 1024):
    table = torch.zeros(batch, 528, dtype=torch.int32, device="cuda")
    q = torch.randn(batch, 32, 128, device="cuda").bfloat16()
    lengths = torch.full((batch,), 20, dtype=torch.int32, device="cuda")
    added = {}
    if batch <= WRITES_UP_TO:
        k = torch.randn(batch, 8, 128, device="cuda").bfloat16()
        added = {"k": k, "v": k, "slot_mapping": torch.full((batch,), -1, device="cuda")}
    paged_decode(q, k_cache, v_cache, table, lengths, scale=0.1, **added)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.slow
def test_a_launch_finds_what_was_compiled_ahead(process):
    major, minor = torch.cuda.get_device_capability()
    gpu = choice.gpu(0)
    here = dataclasses.replace(JOB, capability=(major, minor), family=gpu.family, sms=gpu.sms, slug=gpu.slug)
    here = dataclasses.replace(here, linear=(*LINEAR[:2], dataclasses.replace(LINEAR[2], gated=True)))
    child, cache = process(here)
    assert child.wait(300) == 0
    before = {path.parent.name: path.stem for path in cache.rglob("*.cubin")}
    subprocess.run([sys.executable, "-c", LAUNCH], check=True)
    after = {path.parent.name: path.stem for path in cache.rglob("*.cubin")}
    assert sorted(after[name] for name in after.keys() - before.keys()) == []
