"""The model of time on an Ada card, at its limits, and the benchmark that projects with it."""

import dataclasses
import json

import pytest
import torch

from adallm import results
from adallm.bench import _sm89_decode
from adallm.bench import sm89 as bench
from adallm.bench._cases import WrongResultError
from adallm.hardware import GPUS
from adallm.kernels import choice, decode_choice
from adallm.kernels.matmul import Config
from adallm.paged import Shape
from adallm.sm89 import counts, driver, model
from adallm.sm89.cases import HEADS, KINDS, LAYERS, STEPS, TOKENS, DecodeCase, cases, decode_cases
from adallm.sm89.counts import Counts
from adallm.sm89.model import ALONE, Constants, DecodeStep, Product


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


def made_up_decode(**other) -> Counts:
    """Counts of decode attention with an E4M3 cache, in steps of 64 tokens."""
    given = {"kernel": "paged_decode_kernel", "kind": "fp8 16x128", "config": DECODE, "mma": "HMMA.16816.F32"}
    return made_up(**given | other)


DECODE = decode_choice.Config(n=64, warps=4, stages=5, programs=2, parts=16)


def decode_step(batch, context, heads=(32, 8, 128)) -> DecodeStep:
    return DecodeStep(Shape(batch, 1, *heads, batch * context // 16, 16), context)


def test_a_small_product_is_bound_by_memory():
    for name in ("RTX 4090", "L40S", "L4", "H100"):
        gpu = GPUS[name]
        projected = model.project(made_up(), gpu, Product(1, 65536, 8192), ALONE)
        weight_us = 65536 * 8192 * 4.5 / 8 / (0.9 * gpu.dram_gb_s * 1e3)
        assert projected.bound == "memory"
        assert projected.us == pytest.approx(weight_us, rel=0.01)


def test_one_block_moves_only_what_it_has_in_flight():
    projected = model.project(made_up(), GPUS["RTX 4090"], Product(1, 64, 8192), ALONE)
    in_flight = 2 * 4 * 64 * (64 * 4.5 / 8 + 16 * 2)
    assert projected.memory_us == pytest.approx(0.7 * 64 * 8192 * 4.5 / 8 / in_flight, rel=0.06)


def test_a_large_product_is_bound_by_the_tensor_cores():
    p = Product(8192, 64 * 128, 8192)
    for mma, rate in (("HMMA.16816.F32.BF16", 165), ("QMMA.16832.F32.E4M3.E4M3", 330)):
        projected = model.project(made_up(mma=mma), GPUS["RTX 4090"], p, ALONE)
        assert projected.bound == "tensor"
        assert projected.us == pytest.approx(2 * p.m * p.n * p.k / rate / 1e6)
    # mma.sync reaches 60% on Hopper; 132 SMs for 65536 blocks leave a last wave of little work.
    hopper = model.project(made_up(), GPUS["H100"], p, ALONE)
    assert hopper.tensor_us == pytest.approx(2 * p.m * p.n * p.k / (0.6 * 989) / 1e6, rel=0.01)


def test_issue_time_counts_the_busier_of_issue_slots_and_pipes():
    gpu, p = GPUS["RTX 4090"], Product(16, 64 * 128, 256 * 10)

    def us(**other):
        return model.project(made_up(**other), gpu, p, ALONE).issue_us

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
    one, two, last = (model.project(made_up(), gpu, Product(16, 64 * n, 4096), ALONE) for n in (128, 129, 256))
    assert two.issue_us == last.issue_us == 2 * one.issue_us
    assert two.tensor_us == last.tensor_us == 2 * one.tensor_us
    split = model.project(made_up(), gpu, Product(16, 64 * 64, 4096, splits=2), ALONE)
    assert split.tensor_us == pytest.approx(one.tensor_us / 2)
    with pytest.raises(ValueError, match="multiplies no weight"):
        model.project(made_up(config=None), gpu, Product(1, 64, 64))


def test_fit_finds_the_constants_that_made_the_times():
    true = Constants(issue=0.44, latency_us=3.25)
    products = [Product(m, n, 4096) for m in (1, 16, 64) for n in (64, 4096, 24576)]
    slow = made_up(loop=2000)
    at = [[model.project(slow, GPUS["H100"], p, constants) for p in products] for constants in (ALONE, true)]
    assert model.fit([(alone, projected.us) for alone, projected in zip(*at, strict=True)]) == true


def test_long_sequences_are_bound_by_memory():
    for name in ("RTX 4090", "L40S", "H100"):
        gpu = GPUS[name]
        for kind, itemsize in (("fp8 16x128", 1), ("bf16 16x128", 2)):
            projected = model.project_decode(made_up_decode(kind=kind), gpu, decode_step(64, 4096), ALONE)
            assert projected.bound == "memory"
            assert projected.us == pytest.approx(2 * 64 * 4096 * 8 * 128 * itemsize / (0.9 * gpu.dram_gb_s * 1e3))


def test_a_decode_step_takes_the_clocks_of_the_busiest_sm():
    gpu = GPUS["RTX 4090"]

    def us(batch, context, heads=(32, 8, 128), constants=ALONE, **other):
        return model.project_decode(
            made_up_decode(**other), gpu, decode_step(batch, context, heads), constants
        ).issue_us

    # 32 blocks for each of 8 KV heads, two on each SM: 2048 steps in 32 parts of 64.
    one = 320 / 2520
    assert us(1, 131072) == pytest.approx(2 * 64 * one)
    assert us(1, 131072, alu=200) == pytest.approx(2 * 64 * one * 400 / 320)
    assert us(1, 131072, loop=640, steps=2) == us(1, 131072)
    assert us(1, 131072, warps=8) == 2 * us(1, 131072)
    assert us(1, 131072, constants=Constants(0.5, 9.0)) == 2 * us(1, 131072)
    # One step more, and one part has 65.
    assert us(1, 131072 + 16) == pytest.approx(2 * 65 * one)
    # 32 steps are made in 16 parts, on as many SMs for each KV head.
    assert us(1, 2048) == pytest.approx(2 * one)
    # One KV head of 3 steps is on 3 SMs.
    assert us(1, 192, heads=(4, 1, 128)) == pytest.approx(one)


def test_projections_of_the_other_kernel_are_refused():
    with pytest.raises(ValueError, match="reads no cache"):
        model.project_decode(made_up(), GPUS["L4"], decode_step(1, 64))
    with pytest.raises(ValueError, match="multiplies no weight"):
        model.project(made_up_decode(), GPUS["L4"], Product(1, 64, 64))


def test_decode_on_slow_tensor_cores_is_bound_by_them():
    slow = dataclasses.replace(GPUS["RTX 4090"], fp16_tflops=1.0)
    projected = model.project_decode(made_up_decode(), slow, decode_step(1, 131072), ALONE)
    assert projected.bound == "tensor"
    assert projected.us == pytest.approx(128 * 4 * 32 * 4096 * 128 / 1e6)


def test_fit_takes_the_lowest_efficiency_where_none_shows():
    # Memory takes 89 us of the longer one, and issue 20.4 us of all slots.
    at = [
        [model.project_decode(made_up_decode(), GPUS["H100"], decode_step(1, n), c) for n in (8192, 131072)]
        for c in (ALONE, Constants(0.9, 11.5))
    ]
    found = model.fit([(alone, projected.us) for alone, projected in zip(*at, strict=True)])
    assert (found.issue, found.latency_us) == (0.24, 11.5)


@pytest.fixture
def few(monkeypatch):
    """Counts of every configuration without compiling any."""
    found = tuple(made_up(kind=kind, config=config) for kind, config in choice.configurations("sm_89"))
    found += (made_up(kernel="nvfp4_expand", config=None, mma="", instr_per_weight=9.0),)
    for kind in ("fp8 16x128", "fp8 16x256", "bf16 16x128"):
        found += (made_up_decode(kind=kind), made_up_decode(kind=f"{kind} one sequence"))
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
    assert decode_cases(broken) == []


def test_decode_cases_are_every_step(few):
    found = decode_cases(few)
    assert [case.key for case in found] == [
        (f"decode {'/'.join(map(str, heads))} {batch}x{context}", "decode", batch)
        for heads in HEADS
        for batch, context in STEPS
    ]
    for case in found:
        kind = {"32/8/128": "fp8 16x128", "16/2/256": "fp8 16x256"}[case.heads]
        assert case.counts.kind == kind + " one sequence" * (case.step.shape.batch == 1)
    assert found[0].sizes == {"heads": "32/8/128", "block": 16, "context": 8192}
    assert found[0].label == "n64 warps4 stages5 programs2 parts16 whole1 registers255"


def test_bench_without_a_gpu(few, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "RTX 4090, projected" in out
    for what in ("linear layers", "decode attention"):
        assert f"For {what} the model is not yet checked on a GPU" in out
    record = results.read(tmp_path / "sm89" / "cpu.json")
    assert (record["fitted"], record["fitted_on"]) == (False, None)
    counted = [row for row in record["rows"] if "regs" in row]
    assert [(row["kernel"], row["kind"], row["config"]) for row in counted] == [
        (c.kernel, c.kind, c.label) for c in few
    ]
    projected = [row for row in record["rows"] if "regs" not in row]
    assert len(projected) == 2 * len([*cases(few), *decode_cases(few)])
    assert {row["gpu"] for row in projected} == {"RTX 4090", "L40S"}
    assert all(row["projected_us"] > 0 and "measured_us" not in row for row in projected)


def test_bench_on_a_gpu_and_then_without(few, monkeypatch, tmp_path, capsys):
    true = {"linear": Constants(issue=0.5, latency_us=2.0), "decode": Constants(issue=0.3, latency_us=14.0)}

    def measure(found, *, repeats):
        figures = {"measured_us_spread": 0.1, "native_us": 9.0, "rel_err": 1e-3}
        h100 = GPUS["H100"]
        return {
            case.key: figures | {"measured_us": 1.1 * case.project(h100, true.get(case.key[1], true["linear"])).us}
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
    assert len(rows) == len([*cases(few), *decode_cases(few)])
    assert (record["fitted"], record["fitted_on"]) == (True, "H100")
    assert record["decode_latency_us"] > 10 > record["latency_us"]
    assert len(bench.model_errors(rows)) == len(cases(few))
    assert all(
        row["model_error"] == pytest.approx(row["projected_us"] / row["measured_us"] - 1, abs=1e-3) for row in rows
    )

    monkeypatch.setattr(results, "provenance", lambda **kwargs: provenance | {"gpu": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for what, of in (("linear layers", cases(few)), ("decode attention", decode_cases(few))):
        assert f"For {what} the model's two constants are fitted to {len(of)} times on NVIDIA H100 80GB HBM3" in out
    assert "unchecked" not in out
    after = results.read(tmp_path / "sm89" / "cpu.json")
    constants = [prefix + name for prefix in ("", "decode_") for name in ("issue_efficiency", "latency_us")]
    assert [after[name] for name in constants] == [record[name] for name in constants]

    # A record from before decode attention was timed.
    path = tmp_path / "sm89" / "h100-80gb-hbm3.json"
    old = {name: value for name, value in record.items() if not name.startswith("decode_")}
    path.write_text(json.dumps(old | {"rows": [row for row in record["rows"] if row["kind"] != "decode"]}))
    assert bench.main(["--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "For decode attention the model is not yet checked" in out
    assert "unchecked" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets, which needs a machine without a GPU")
def test_decode_is_checked_before_it_is_timed(monkeypatch):
    monkeypatch.setattr(choice, "gpu", lambda index: choice.GPU("sm_90", 3, ""))
    monkeypatch.setattr(driver, "run", lambda launcher, *args, **kwargs: launcher(*args, **kwargs))
    wide, narrow = (DecodeCase(decode_step(2, 96, (4, 2, d)), made_up_decode()) for d in (128, 64))
    found = list(_sm89_decode.checked([wide, narrow], device="cpu", copies=lambda nbytes: 2))
    assert [case for case, _ in found] == [wide, narrow]
    for _, both in found:
        assert list(both) == ["sm_89", "native"]
        assert all(0 < error < 5e-3 and len(calls) == 2 for error, calls in both.values())
    monkeypatch.setattr(driver, "run", lambda *args, **kwargs: None)
    with pytest.raises(WrongResultError, match="rel_err is nan"):
        next(_sm89_decode.checked([narrow], device="cpu", copies=lambda nbytes: 2))


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
