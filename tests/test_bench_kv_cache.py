"""``bench/kv_cache.py``: what a cache does to keys and values is what its format says, and the record says it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from adallm import evaluate, fp8, nvfp4, results
from adallm.bench import _kv_error, _kv_observe, kv_cache
from adallm.bench._cases import WrongResultError
from adallm.calibrate import Calibration, LayerScales

LENGTHS = (64, 33, 128)


def heads(magnitude=1.0):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(len(LENGTHS), 8, 4, 64, generator=g) / magnitude
    k, v = (torch.randn(128, 2, 64, generator=g) * magnitude for _ in range(2))
    return [x.to(torch.bfloat16) for x in (q, k, v)]


def rounded(x, cache, scale):
    if cache == "bf16":
        return x.float()
    if cache == "fp8-token":
        return fp8.qdq(x.float())
    if cache == "nvfp4":
        return nvfp4.dequantize(nvfp4.quantize(x, global_scale=scale / 6), torch.bfloat16).float()
    scale = scale if cache == "fp8-calibrated" else 1.0
    return fp8.to_e4m3(x.float() / scale).float() * scale


@pytest.mark.parametrize("cache", kv_cache.CACHES)
@pytest.mark.parametrize("magnitude", [2.0**-9, 1.0, 300.0])
def test_attention_by_a_cache_is_that_over_rounded_keys_and_values(cache, magnitude):
    q, k, v = heads(magnitude)
    k_scale, v_scale = 1.25 * magnitude / 100, magnitude / 100
    out = _kv_error.cached(q, k, v, LENGTHS, cache, k_scale, v_scale)
    expected = _kv_error.exact(q, rounded(k, cache, k_scale), rounded(v, cache, v_scale), LENGTHS)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5 * magnitude)


def test_exact_attention_is_causal():
    q, k, v = (x.float() for x in heads())
    out = _kv_error.exact(q, k, v, LENGTHS)
    grouped = {"is_causal": False, "enable_gqa": True}
    for b, length in enumerate(LENGTHS):
        seen = torch.ones(8, length, dtype=torch.bool).tril(length - 8)
        given = (x.transpose(0, 1)[None] for x in (q[b], k[:length], v[:length]))
        expected = torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=seen, **grouped)
        assert torch.allclose(out[b], expected[0].transpose(0, 1), atol=1e-5)


def test_errors_are_pooled_and_their_spread_is_that_of_the_parts():
    assert _kv_error.pooled([(1.0, 100.0), (3.0, 300.0)]) == pytest.approx(0.1)
    assert _kv_error.spread([(1.0, 100.0), (3.0, 300.0)]) == pytest.approx(0, abs=1e-12)
    assert _kv_error.spread([(1.0, 100.0)]) == 0
    # Of equal parts with errors that differ little the jackknife is the standard error of the mean.
    errors = [0.1, 0.101, 0.102, 0.103]
    expected = torch.tensor(errors, dtype=torch.float64).std().item() / 2
    assert _kv_error.spread([(e * e, 1.0) for e in errors]) == pytest.approx(expected, rel=1e-2)
    assert _kv_error.shares(torch.tensor([0.0, 0.01, 1.0, -500.0]), 1.0) == (0.5, 0.25)
    assert _kv_error.shares(torch.tensor([0.0, 0.01, 1.0, -500.0]), 2.0**10) == (0.75, 0.0)


def test_scale_1_fails_at_both_ends_and_scales_that_follow_do_not():
    rows = kv_cache.measure_magnitudes((-12, 0, 12), draws=2)
    of = {(row["log2_std"], row["cache"]): row["rel_err"] for row in rows}
    assert len(rows) == len(of) == 3 * len(kv_cache.CACHES)
    assert min(of[-12, "fp8-one"], of[12, "fp8-one"]) > 0.9
    assert of[0, "fp8-one"] < 0.05
    for cache in ("bf16", "fp8-calibrated", "fp8-token", "nvfp4"):
        assert of[-12, cache] == pytest.approx(of[0, cache], rel=1e-3) == of[12, cache]
    assert of[0, "bf16"] < of[0, "fp8-token"] < of[0, "nvfp4"]


def test_a_cache_in_bf16_must_be_near_exact():
    parts = [dict.fromkeys(kv_cache.CACHES, (0.01, 1.0))]
    with pytest.raises(WrongResultError, match=r"rel_err is 0.1, above 0.00781"):
        kv_cache._errors({"part": "magnitude"}, parts)


def test_what_is_observed_is_what_enters_the_cache():
    ids = torch.arange(5, 133)
    ((*_, last),) = [_kv_observe.keys_and_values(evaluate.BUNDLED_MODEL, [ids])[0]]
    model = AutoModelForCausalLM.from_pretrained(evaluate.BUNDLED_MODEL, dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[None], past_key_values=cache, use_cache=True)
    q, k, v = last
    assert (q.shape, k.shape, v.shape) == ((128, 6, 64), (128, 2, 64), (128, 2, 64))
    assert torch.allclose(k.transpose(0, 1), cache.layers[-1].keys[0], atol=1e-5)
    assert torch.allclose(v.transpose(0, 1), cache.layers[-1].values[0], atol=1e-5)


def scales(k_scale=0.02, v_scale=0.03):
    return [LayerScales(f"layers.{i}", 1.0, 1.0, k_scale, v_scale, 0.0, 0.0) for i in range(7)]


def test_rows_of_layers():
    ids = torch.arange(5, 133)
    rows = kv_cache.measure_layers(scales(), [ids, ids + 200])
    assert [(r["layer"], r["cache"]) for r in rows] == [(i, cache) for i in range(7) for cache in kv_cache.CACHES]
    one, calibrated = (
        results.find({"rows": rows, "experiment": ""}, layer=3, cache=f"fp8-{c}") for c in ("one", "calibrated")
    )
    assert (one["k_scale"], calibrated["k_scale"], calibrated["v_scale"]) == (1.0, 0.02, 0.03)
    assert one["k_subnormal"] > calibrated["k_subnormal"] > 0 == one["k_saturated"]
    cut = kv_cache.measure_layers(scales(0.002, 0.002), [ids])
    row = results.find({"rows": cut, "experiment": ""}, layer=3, cache="fp8-calibrated")
    assert row["k_saturated"] > 0
    assert row["rel_err"] > 2 * calibrated["rel_err"]


NATS = {"nvfp4": 0.0, "nvfp4-fp8kv": 5.0, "nvfp4-fp8kv-token": 2.0, "calibrated": 3.0}


def measured(more):
    windows = [[100, 200.0 + more], [100, 220.0 + 2 * more], [50, 90.0 + more]]
    nats = sum(nats for _, nats in windows)
    return {"windows": windows, "tokens": 250, "bytes": 1000, "bits_per_byte": nats / 1000, "stderr": 0.1}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """One window, no model for perplexity."""

    def cached(directory, options, progress):
        assert directory == evaluate.BUNDLED_MODEL
        return measured(NATS[options["format"]])

    def perplexity(directory, **options):
        assert (directory.name, options["format"]) == ("calibrated", "nvfp4-fp8kv")
        return measured(NATS["calibrated"])

    def calibrate(source, dst):
        assert (source / "hf_quant_config.json").is_file()
        return Calibration(dst, 4096, 2, tuple(scales()))

    monkeypatch.setattr(evaluate, "cached", cached)
    monkeypatch.setattr(evaluate, "perplexity", perplexity)
    monkeypatch.setattr(kv_cache.calibrate, "calibrate", calibrate)
    monkeypatch.setattr(kv_cache, "held_out", lambda count: [torch.arange(5, 133)] * count)
    monkeypatch.setattr(kv_cache, "measure_magnitudes", lambda: [{"part": "magnitude"}])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "name"),
    [([], "cpu"), (["--limit", "2", "--windows", "1"], "cpu-part"), (["--windows", "2"], "cpu-part")],
)
def test_the_record(quick, capsys, options, name):
    assert kv_cache.main([*options, "--out", str(quick)]) == 0
    record = results.read(quick / "kv_cache" / f"{name}.json")
    rows = [row for row in record["rows"] if row["part"] == "perplexity"]
    assert [row["cache"] for row in rows] == ["bf16", "fp8-one", "fp8-calibrated", "fp8-token"]
    for row, more in zip(rows, (0.0, 5.0, 3.0, 2.0), strict=True):
        assert row["delta"] == pytest.approx(4 * more / 1000)
        assert row["above_one"] == pytest.approx(4 * (more - 5) / 1000)
        expected = evaluate.ratio_stderr([f * more for f in (1, 2, 1)], [100, 100, 50], 1000)
        assert row["delta_stderr"] == pytest.approx(expected)
    windows = {row["windows"] for row in record["rows"] if row["part"] == "layer"}
    assert windows == {int(dict(zip(options[::2], options[1::2], strict=True)).get("--windows", kv_cache.WINDOWS))}
    assert kv_cache.report(record["rows"]) in capsys.readouterr().out


def test_the_record_in_the_tree_is_what_the_library_computes():
    record = results.read(results.default_root() / "kv_cache" / "cpu.json")
    for row in kv_cache.measure_magnitudes((-9, 3, 8)):
        stored = results.find(record, part="magnitude", cache=row["cache"], log2_std=row["log2_std"])
        assert stored["rel_err"] == pytest.approx(row["rel_err"], rel=1e-3)
    losses = {row["cache"]: row for row in record["rows"] if row["part"] == "perplexity"}
    for cache, row in losses.items():
        assert row["delta"] == pytest.approx(row["bits_per_byte"] - losses["bf16"]["bits_per_byte"])
        assert row["title"] == kv_cache.CACHES[cache]
