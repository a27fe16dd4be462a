"""``bench/accuracy.py``: the sweep against the formats, errors against plain sums, the record against the library."""

import math

import pytest
import torch

from adallm import baselines, checkpoint, fp8, nvfp4, results
from adallm.bench import accuracy
from adallm.formats import BITS_PER_WEIGHT


@pytest.mark.parametrize("name", accuracy.DISTRIBUTIONS)
def test_the_sweep_holds_nvfp4_and_mxfp4_to_the_bit(name):
    w = accuracy.distribution(name, 99)
    w[3, 16:64] = 0
    w[4, :32] *= 2.0**-20
    assert torch.equal(accuracy.e2m1_qdq(w, block=16, scale_format="e4m3"), nvfp4.dequantize(nvfp4.quantize(w)))
    assert torch.equal(accuracy.e2m1_qdq(w, block=32, scale_format="e8m0"), baselines.mxfp4(w))


def test_an_exact_scale_keeps_the_largest_weight_of_each_block():
    w = torch.randn(4, 64)
    w[0, :16] = 0
    q = accuracy.e2m1_qdq(w, block=16, scale_format="fp32")
    largest = w.unflatten(-1, (-1, 16)).abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(
        q.unflatten(-1, (-1, 16)).gather(-1, largest), w.unflatten(-1, (-1, 16)).gather(-1, largest)
    )
    assert torch.equal(q[0, :16], torch.zeros(16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": 24, "scale_format": "e4m3"}, "64 columns"),
        ({"block": 16, "scale_format": "e5m2"}, "fp32, e4m3, e8m0"),
    ],
)
def test_what_the_sweep_does_not_support_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        accuracy.e2m1_qdq(torch.ones(2, 64), **arguments)


def test_distributions_are_what_their_names_say():
    drawn = {name: accuracy.distribution(name, 0) for name in accuracy.DISTRIBUTIONS}
    assert all(x.shape == accuracy.SHAPE and x.dtype == torch.float32 for x in drawn.values())
    # Probabilities of |x| > 2: normal, Laplace of scale 1, Student's t with 4 degrees of freedom.
    for name, expected in (
        ("gaussian", math.erfc(2 / math.sqrt(2))),
        ("laplace", math.exp(-2)),
        ("student-t4", 0.1161),
    ):
        assert float((drawn[name].abs() > 2).float().mean()) == pytest.approx(expected, abs=0.003)
        assert float(drawn[name].mean()) == pytest.approx(0, abs=0.02)
    outliers = drawn["outliers"].std(0) > 5
    assert outliers.nonzero().flatten().tolist() == list(range(64, 1024, 128))
    assert torch.equal(accuracy.distribution("laplace", 3), accuracy.distribution("laplace", 3))
    assert not torch.equal(accuracy.distribution("laplace", 3), accuracy.distribution("laplace", 4))
    with pytest.raises(ValueError, match="'uniform'; supported: gaussian"):
        accuracy.distribution("uniform", 0)


def test_errors_are_plain_sums_over_all_matrices():
    matrices = [torch.randn(8, 128), 5 * torch.randn(8, 128)]
    rows = accuracy.measure_source("two", matrices)
    assert [row["format"] for row in rows] == ["nvfp4", "mxfp4", "int4-g128", "fp8"]
    noise = sum(float((w - nvfp4.dequantize(nvfp4.quantize(w))).square().sum()) for w in matrices)
    error = noise / sum(float(w.square().sum()) for w in matrices)
    assert rows[0]["rel_sq_err"] == pytest.approx(error, rel=1e-5)
    assert rows[0]["sqnr_db"] == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert rows[0]["vs_max"] == 1
    assert rows[1]["vs_max"] == pytest.approx(rows[1]["rel_sq_err"] / rows[0]["rel_sq_err"], rel=1e-5)
    assert all(row["stderr"] > 0 and row["matrices"] == 2 for row in rows)
    assert [row["bits_per_weight"] for row in rows] == [BITS_PER_WEIGHT[row["format"]] for row in rows]


def test_the_standard_error_covers_other_seeds():
    rows = [
        accuracy.measure_source("x", [accuracy.distribution("student-t4", s) for s in seeds])
        for seeds in (range(8), range(8, 16))
    ]
    for first, second in zip(*rows, strict=True):
        away = abs(first["rel_sq_err"] - second["rel_sq_err"])
        assert away < 4 * math.hypot(first["stderr"], second["stderr"])


def test_no_error_has_neither_decibels_nor_a_ratio():
    rows = accuracy.measure_source("exact", [torch.full((1, 128), 6.0)])
    assert rows[0]["rel_sq_err"] == 0
    assert rows[0]["sqnr_db"] is None
    assert all(row["vs_max"] is None for row in rows)


def test_layers_are_those_that_quantize_quantizes(tmp_path):
    checkpoint.convert(accuracy.MODEL, tmp_path / "nvfp4")
    stored = checkpoint.load(tmp_path / "nvfp4")
    packed = {name for name, t in stored.items() if isinstance(t, nvfp4.NVFP4Tensor)}
    assert {f"model.{name}.weight" for name in accuracy.layers()} == packed


def test_the_check_finds_a_difference(monkeypatch):
    accuracy.check(torch.randn(4, 64))
    monkeypatch.setattr(accuracy, "nvfp4_qdq", lambda w: baselines.mxfp4(w))
    with pytest.raises(ValueError, match="blocks of 16 with e4m3 scales differ"):
        accuracy.check(torch.randn(4, 64))


def test_the_committed_record_is_what_the_library_computes():
    record = results.read(results.default_root() / "quantizers" / "cpu.json")
    matrices = [accuracy.distribution("student-t4", seed) for seed in range(accuracy.SEEDS)]
    name, weight = next(iter(accuracy.layers().items()))
    live = accuracy.measure_source("student-t4", matrices, accuracy.FORMATS + accuracy.RULES + accuracy.SWEEP)
    for row in [*live, *accuracy.measure_source(f"tiny.{name}", [weight], accuracy.FORMATS + accuracy.RULES)]:
        fields = {key: row[key] for key in ("source", "format", "rule", "block", "scale_format")}
        assert results.find(record, **fields)["rel_sq_err"] == pytest.approx(row["rel_sq_err"], rel=1e-4)


def test_the_rules_reach_what_they_are_for():
    """Squared error relative to the max rule, and of FP8 products to the same codes exactly."""
    record = results.read(results.default_root() / "quantizers" / "cpu.json")

    def error(source, form, rule):
        return results.find(record, source=source, format=form, rule=rule)["vs_max"]

    for source, most in (("gaussian", 0.73), ("laplace", 0.792), ("student-t4", 0.813)):
        assert error(source, "nvfp4", "mse") <= most
    assert error("gaussian", "nvfp4", "four_over_six") <= 0.84
    for source in (*accuracy.DISTRIBUTIONS, "tiny"):
        assert error(source, "nvfp4", "mse") < error(source, "nvfp4", "four_over_six") < 1
        exact, multiplied, best = (
            error(source, form, rule)
            for form, rule in (("nvfp4", "mse"), ("nvfp4-w4a8", "mse"), ("nvfp4-w4a8", "mse_fp8"))
        )
        assert best < multiplied
        assert multiplied - best >= 0.5 * (multiplied - exact)


def test_products_are_those_of_e4m3():
    w = torch.randn(4, 64)
    for rule in ("max", "mse_fp8"):
        t = nvfp4.quantize(w, scale_rule=rule)
        exact = nvfp4.dequantize(t) / t.global_scale
        rounded = fp8.to_e4m3(exact / 8).float() * 8 * t.global_scale
        assert torch.equal(accuracy.products_qdq(w, rule=rule), rounded)


def test_main_writes_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADALLM_RESULTS", str(tmp_path))
    monkeypatch.setattr(accuracy, "SEEDS", 2)
    monkeypatch.setattr(accuracy, "SHAPE", (16, 128))
    some = dict(list(accuracy.layers().items())[:2])
    monkeypatch.setattr(accuracy, "layers", lambda: some)
    inputs = {name: torch.diag(torch.arange(1, w.shape[1] + 1).double()) for name, w in some.items()}
    halved = {rule: {name: w.float() / 2 for name, w in some.items()} for rule in ("imatrix", "gptq")}
    monkeypatch.setattr(accuracy, "moments", lambda: inputs)
    monkeypatch.setattr(accuracy, "from_text", lambda: halved)
    threads = torch.get_num_threads()
    assert accuracy.main([]) == 0
    assert torch.get_num_threads() == threads
    record = results.read(tmp_path / "quantizers" / "cpu.json")
    assert len(record["rows"]) == 4 * (4 + 8 + 12) + (4 + 8 + 2 + 12) + 2 * (4 + 8 + 2)
    pooled = results.find(record, source="tiny", format="nvfp4", rule="mse")
    parts = [results.find(record, source=f"tiny.{name}", format="nvfp4", rule="mse") for name in some]
    energy = [float(w.double().square().sum()) for w in some.values()]
    expected = sum(e * row["rel_sq_err"] for e, row in zip(energy, parts, strict=True)) / sum(energy)
    assert pooled["rel_sq_err"] == pytest.approx(expected, rel=1e-4)
    assert (pooled["n"], pooled["stderr"]) == (None, None)
    half = results.find(record, source="tiny", format="nvfp4", rule="gptq")
    assert (half["rel_sq_err"], half["rel_out_err"]) == (0.25, 0.25)
    for name, w in some.items():
        row = results.find(record, source=f"tiny.{name}", format="nvfp4", rule="max")
        d, each = (w.float() - accuracy.nvfp4_qdq(w)).double().square().sum(0), w.double().square().sum(0)
        weights = torch.arange(1, w.shape[1] + 1)
        assert row["rel_out_err"] == pytest.approx(float((d * weights).sum() / (each * weights).sum()), rel=1e-5)
    assert results.find(record, source="laplace", format="nvfp4", rule="max")["rel_out_err"] is None
    assert "SQNR, dB" in capsys.readouterr().out
