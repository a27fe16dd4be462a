"""The model of time on an Ada card, at its limits, and the benchmark that projects with it."""

import dataclasses

import pytest
import torch

from adallm import results
from adallm.bench import sm89 as bench
from adallm.hardware import GPUS
from adallm.kernels import choice
from adallm.kernels.matmul import Config
from adallm.sm89 import counts, model
from adallm.sm89.cases import KINDS, LAYERS, TOKENS, cases
from adallm.sm89.counts import Counts
from adallm.sm89.model import Constants, Product

EXACT = Constants(issue=1.0, latency_us=0.0)


def made_up(**other) -> Counts:
    """Counts of a configuration whose blocks have 64 rows, 16 tokens and steps of 64 columns for each of 4 warps."""
    given = {
        "kernel": "nvfp4_matmul",
        "kind": "bf16",
        "config": Config(64, 16, 64, 4, 1, 4, 3),
        "warps": 4,
        "regs": 128,
    }
    given |= {
        "spills": 0,
        "shared": 30000,
        "blocks_per_sm": 2,
        "mma": "HMMA.16816.F32.BF16",
        "loop": 320,
        "outside": 640,
    }
    given |= {"steps": 1, "alu": 120, "fma": 100, "tensor": 32, "memory": 30, "other": 38, "instr_per_weight": 2.5}
    return Counts(**given | {"problem": ""} | other)


def test_a_small_product_is_bound_by_memory():
    for name in ("RTX 4090", "L40S", "L4", "H100"):
        gpu = GPUS[name]
        projected = model.project(made_up(), gpu, Product(1, 65536, 8192), EXACT)
        weight_us = 65536 * 8192 * 4.5 / 8 / (0.9 * gpu.dram_gb_s * 1e3)
        assert projected.bound == "memory"
        assert projected.us == pytest.approx(weight_us, rel=0.01)


def test_one_block_moves_only_what_it_has_in_flight():
    projected = model.project(made_up(), GPUS["RTX 4090"], Product(1, 64, 8192), EXACT)
    in_flight = 2 * 4 * 64 * (64 * 4.5 / 8 + 16 * 2)
    assert projected.memory_us == pytest.approx(0.7 * 64 * 8192 * 4.5 / 8 / in_flight, rel=0.06)


def test_a_large_product_is_bound_by_the_tensor_cores():
    p = Product(8192, 64 * 128, 8192)
    for mma, rate in (("HMMA.16816.F32.BF16", 165), ("QMMA.16832.F32.E4M3.E4M3", 330)):
        projected = model.project(made_up(mma=mma), GPUS["RTX 4090"], p, EXACT)
        assert projected.bound == "tensor"
        assert projected.us == pytest.approx(2 * p.m * p.n * p.k / rate / 1e6)
    # mma.sync reaches 60% on Hopper; 132 SMs for 65536 blocks leave a last wave of little work.
    hopper = model.project(made_up(), GPUS["H100"], p, EXACT)
    assert hopper.tensor_us == pytest.approx(2 * p.m * p.n * p.k / (0.6 * 989) / 1e6, rel=0.01)


def test_issue_time_counts_the_busier_of_issue_slots_and_pipes():
    gpu, p = GPUS["RTX 4090"], Product(16, 64 * 128, 256 * 10)

    def us(**other):
        return model.project(made_up(**other), gpu, p, EXACT).issue_us

    # A block for each SM, its four warps one for each scheduler: ten steps and what surrounds them.
    assert us() == pytest.approx((10 * 320 + 640) / 2520)
    assert us(alu=200) == pytest.approx((10 * 400 + 640) / 2520)
    assert us(fma=170) == pytest.approx((10 * 340 + 640) / 2520)
    assert us(loop=640, steps=2) == us()
    halved = model.project(made_up(), gpu, p, Constants(issue=0.5, latency_us=3.0))
    assert halved.issue_us == pytest.approx(2 * us())
    assert halved.us == 3 + max(halved.issue_us, halved.memory_us, halved.tensor_us)


def test_one_block_more_than_sms_costs_a_wave():
    gpu = GPUS["RTX 4090"]
    one, two, last = (model.project(made_up(), gpu, Product(16, 64 * n, 4096), EXACT) for n in (128, 129, 256))
    assert two.issue_us == last.issue_us == 2 * one.issue_us
    assert two.tensor_us == last.tensor_us == 2 * one.tensor_us
    split = model.project(made_up(), gpu, Product(16, 64 * 64, 4096, splits=2), EXACT)
    assert split.tensor_us == pytest.approx(one.tensor_us / 2)
    with pytest.raises(ValueError, match="multiplies nothing"):
        model.project(made_up(config=None), gpu, Product(1, 64, 64))


def test_fit_finds_the_constants_that_made_the_times():
    true = Constants(issue=0.44, latency_us=3.25)
    products = [Product(m, n, 4096) for m in (1, 16, 64) for n in (64, 4096, 24576)]
    slow = made_up(loop=2000)
    times = [(slow, GPUS["H100"], p, model.project(slow, GPUS["H100"], p, true).us) for p in products]
    assert model.fit(times) == true


@pytest.fixture
def few(monkeypatch):
    """Counts of every configuration without compiling any."""
    found = tuple(made_up(kind=kind, config=config) for kind, config in choice.configurations("sm_89"))
    found += (made_up(kernel="nvfp4_expand", config=None, mma="", instr_per_weight=9.0),)
    monkeypatch.setattr(counts, "measured", lambda gpu="sm_89": found)
    return found


def test_cases_are_what_the_table_chooses(few):
    found = {case.key: case for case in cases(few)}
    card = choice.GPU("sm_89", 128, "")
    for shape, (n, k) in LAYERS.items():
        for kind in KINDS:
            for m in TOKENS:
                config = choice.choose(m, n, k, kind, card)
                case = found.pop((shape, kind, m), None)
                assert (case and case.config) == config
                assert case is None or (case.counts.kind, case.counts.config.splits > 1) == (kind, config.splits > 1)
    assert not found
    broken = [dataclasses.replace(c, problem="spills") for c in few]
    assert cases(broken) == []


def test_bench_without_a_gpu(few, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "RTX 4090, projected" in out
    assert "not yet checked on a GPU" in out
    record = results.read(tmp_path / "sm89" / "cpu.json")
    assert (record["fitted"], record["fitted_on"]) == (False, None)
    counted = [row for row in record["rows"] if "regs" in row]
    assert [(row["kernel"], row["kind"], row["config"]) for row in counted] == [
        (c.kernel, c.kind, c.label) for c in few
    ]
    projected = [row for row in record["rows"] if "regs" not in row]
    assert len(projected) == 2 * len(cases(few))
    assert {row["gpu"] for row in projected} == {"RTX 4090", "L40S"}
    assert all(row["projected_us"] > 0 and "measured_us" not in row for row in projected)


def test_bench_on_a_gpu_and_then_without(few, monkeypatch, tmp_path, capsys):
    true = Constants(issue=0.5, latency_us=2.0)

    def measure(found, *, repeats):
        figures = {"measured_us_spread": 0.1, "native_us": 9.0, "rel_err": 1e-3}
        h100 = GPUS["H100"]
        return {
            case.key: figures | {"measured_us": 1.1 * model.project(case.counts, h100, case.product, true).us}
            for case in found
        }

    monkeypatch.setattr(bench, "measure", measure)
    provenance = results.provenance(seed=0) | {"gpu": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(results, "provenance", lambda **kwargs: provenance)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert bench.main(["--out", str(tmp_path)]) == 0
    assert "H100, measured" in capsys.readouterr().out
    record = results.read(tmp_path / "sm89" / "h100-80gb-hbm3.json")
    rows = [row for row in record["rows"] if row.get("gpu") == "H100"]
    assert len(rows) == len(cases(few))
    assert all(
        row["model_error"] == pytest.approx(row["projected_us"] / row["measured_us"] - 1, abs=1e-3) for row in rows
    )

    monkeypatch.setattr(results, "provenance", lambda **kwargs: provenance | {"gpu": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"fitted to {len(rows)} times on NVIDIA H100 80GB HBM3" in out
    assert "unchecked" not in out
    after = results.read(tmp_path / "sm89" / "cpu.json")
    assert (after["issue_efficiency"], after["latency_us"]) == (record["issue_efficiency"], record["latency_us"])


def test_label_names_every_field_of_the_configuration():
    c = made_up()
    assert c.label == "n64 m16 k64 slices4 splits1 warps4 stages3"
    # On Ada no product overlaps.
    assert set(dataclasses.asdict(c.config)) - {"overlap", "programs"} == {
        "n",
        "m",
        "k",
        "slices",
        "splits",
        "warps",
        "stages",
    }
