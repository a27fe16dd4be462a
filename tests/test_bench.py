"""The list of benchmarks, and the check that the quantizer's benchmark makes before it measures."""

import dataclasses
import functools
import weakref

import pytest
import torch

from adallm import bench, nvfp4, quantizers, results
from adallm.bench import _timing, quantize


def test_list_of_benchmarks(capsys):
    assert bench.main([]) == 0
    listed = capsys.readouterr().out
    assert "quantize" in bench.benchmarks()
    assert all(name in listed and line in listed and line for name, line in bench.benchmarks().items())


def test_unknown_benchmark(capsys):
    assert bench.main(["nothing"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no benchmark 'nothing'" in err
    assert "quantize" in err


def test_run_by_name_writes_a_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quantize, "SHAPES", {"small": (32, 64)})
    monkeypatch.setattr(results, "default_root", lambda: tmp_path)
    assert bench.main(["quantize", "--device", "cpu", "--repeats", "2"]) == 0
    record = results.read(tmp_path / "quantize_speed" / "cpu.json")
    rows = record["rows"]
    assert [(row["layout"], row["op"], row["rule"]) for row in rows] == [
        *((layout, op, "max") for layout in nvfp4.LAYOUTS for op in ("quantize", "dequantize")),
        *(("modelopt", "quantize", rule) for rule in quantizers.RULES[1:]),
    ]
    assert all(row["mweights_s"] > 0 and 0.05 < row["rel_err"] < 0.15 for row in rows)
    assert "small" in capsys.readouterr().out


@pytest.mark.parametrize("rule", quantizers.SEARCHED)
def test_a_scale_that_is_not_the_best_is_found(rule):
    w, importance = quantize.weights(4, 64, "cpu"), torch.ones(64) if rule == "imatrix" else None
    t = nvfp4.quantize(w, scale_rule=rule, importance=importance)
    assert 0.05 < quantize.check_rule(w, t, rule, importance) < 0.15
    worse = nvfp4.quantize(w, scale_rule="max", global_scale=t.global_scale)
    with pytest.raises(ValueError, match=rf"{rule}: block \d+ has the squared error .* with another scale it has"):
        quantize.check_rule(w, worse, rule, importance)


@pytest.fixture(params=nvfp4.LAYOUTS)
def quantized(request):
    w = quantize.weights(48, 64, "cpu")
    w[5, 16:32] = 0
    w[6, :16] = w.abs().max() * 2.0**-16
    return w, nvfp4.quantize(w, layout=request.param)


def test_check_accepts_the_reference(quantized, monkeypatch):
    w, t = quantized
    monkeypatch.setattr(quantize, "SAMPLED_BLOCKS", t.scale.numel())
    assert 0.05 < quantize.check(w, t, nvfp4.dequantize(t)) < 0.15


def test_check_finds_a_wrong_value(quantized):
    w, t = quantized
    values = nvfp4.dequantize(t)
    values[7, 9] += values.abs().max()
    with pytest.raises(ValueError, match=r"weight \[7, 9\] is .* further apart"):
        quantize.check(w, t, values)


@pytest.mark.parametrize("name", ["packed", "scale"])
def test_check_finds_a_wrong_byte(quantized, monkeypatch, name):
    w, t = quantized
    monkeypatch.setattr(quantize, "SAMPLED_BLOCKS", t.scale.numel())
    part = getattr(t, name).view(torch.uint8).clone()
    part[11, 2] ^= 1
    broken = dataclasses.replace(t, **{name: part.view(getattr(t, name).dtype)})
    with pytest.raises(ValueError, match=r"of row 11 is .* but computed slowly"):
        quantize.check(w, broken, nvfp4.dequantize(t))


@pytest.mark.gpu
def test_a_timed_graph_keeps_what_it_reads():
    x = torch.ones(1 << 20, device="cuda")
    alive = weakref.ref(x)
    one = _timing.replays([functools.partial(torch.neg, x)], at_least_us=1.0)
    del x
    torch.cuda.empty_cache()
    assert alive() is not None
    assert one() > 0
