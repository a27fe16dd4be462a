"""The figures of engines, latencies and the projection: what is drawn is what the record and the rows say."""

import copy

import pytest

from adallm import engines, plots, projection, published, results


@pytest.fixture
def record():
    return copy.deepcopy(results.read(results.default_root() / "vllm_e2e" / "h200.json"))


@pytest.fixture
def latencies():
    found = results.read(results.default_root() / "vllm_e2e" / "h100-80gb-hbm3.json")
    return copy.deepcopy(results.select(found, impl=("bf16", "stock-humming-triton", "adallm-auto-lm-head")))


def with_implementation(record, name, like, factor):
    """A record with one more implementation, ``factor`` times the values of another."""
    more = [{**r, "impl": name, "value": factor * r["value"]} for r in record["rows"] if r["impl"] == like]
    return {**record, "rows": [*record["rows"], *more]}


def names(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_lines_and_bars_are_tokens_a_second(record):
    results.find(record, impl="adallm-w4a8", metric="decode_tok_s", batch=4)["value"] = 1234.5
    results.find(record, impl="adallm-w4a16", metric="prefill_tok_s", batch=8)["value"] = 54321.0
    left, right = plots.tokens_per_second(record).axes
    lines = {line.get_label(): line for line in left.lines}
    assert (4, 1234.5) in {tuple(point) for point in lines["AdaLLM W4A8"].get_xydata()}
    wide = [r for r in record["rows"] if (r["metric"], r["batch"]) == ("decode_tok_s", 64)]
    stock = max(r["value"] for r in wide if r["impl"].startswith("stock") and not r["impl"].endswith("bf16kv"))
    assert tuple(lines["the best of stock NVFP4"].get_xydata()[-1]) == (64, stock)
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    bars = dict(zip(names(right), [bar.get_width() for bar in right.patches], strict=True))
    assert bars["AdaLLM W4A16"] == 54321.0
    assert len(bars) == len({row["impl"] for row in record["rows"]})


def test_a_bf16_cache_is_no_part_of_stock_with_an_fp8_cache(record):
    before = plots.throughput(record).axes[0]
    more = with_implementation(record, "stock-humming-bf16kv", "stock-humming-triton", 9)
    after = plots.throughput(more).axes[0]
    heights = [[bar.get_height() for bar in axes.patches] for axes in (before, after)]
    assert heights[0] == heights[1]
    left, right = plots.tokens_per_second(more).axes
    assert "Stock: Humming, BF16 cache" in names(right)
    bar = right.patches[names(right).index("Stock: Humming, BF16 cache")]
    assert bar.get_facecolor()[:3] == (1, 1, 1)
    assert len(left.lines) == len(plots.tokens_per_second(record).axes[0].lines)


def test_more_graphs_are_the_same_engine_where_they_are_faster(record):
    before = {line.get_label(): line for line in plots.tokens_per_second(record).axes[0].lines}
    more = with_implementation(record, "adallm-auto-lm-head-graphs", "adallm-auto-lm-head", 2)
    results.find(more, impl="adallm-auto-lm-head-graphs", metric="decode_tok_s", batch=1)["value"] = 1.0
    left, right = plots.tokens_per_second(more).axes
    after = {line.get_label(): line for line in left.lines}
    assert after.keys() == before.keys()
    name = "AdaLLM auto, NVFP4 lm_head"
    factors = after[name].get_ydata() / before[name].get_ydata()
    assert factors.tolist() == [1.0, *[2.0] * (len(factors) - 1)]
    assert f"{name}, more graphs" in names(right)


def test_implementations_that_are_not_known_are_drawn_by_their_name(record):
    more = with_implementation(record, "another", "bf16", 2)
    assert names(plots.engine_memory(more).axes[0])[-1] == "another"
    assert names(plots.tokens_per_second(more).axes[1])[-1] == "another"


def test_memory_is_weights_and_what_is_beside_them(record):
    results.find(record, impl="bf16", metric="peak_gib")["value"] = 20.0
    (axes,) = plots.engine_memory(record).axes
    weights, beside = ([bar.get_width() for bar in bars] for bars in axes.containers)
    held = results.find(record, impl="bf16", metric="weights_gib")["value"]
    assert weights[0] == held
    assert beside[0] == 20.0 - held
    assert "20.00" in [text.get_text() for text in axes.texts]
    record["rows"] = [r for r in record["rows"] if (r["impl"], r["metric"]) != ("bf16", "peak_gib")]
    (axes,) = plots.engine_memory(record).axes
    assert axes.containers[1][0].get_width() == 0


def test_latencies_are_points_of_the_record(latencies):
    row = results.find(latencies, impl="bf16", metric="itl_p99_ms", batch=64)
    row["value"] = 77.5
    panels = plots.latencies(latencies).axes
    titles = [axes.get_title("left") for axes in panels]
    assert titles == [
        f"{wait}, {load} requests at any time"
        for wait in ("Time to first token", "Time between tokens")
        for load in (16, 64)
    ]
    points = [line.get_xydata() for line in panels[3].lines if line.get_label() == "99th percentile"]
    assert [77.5, 0.0] in [list(point) for (point,) in points]
    assert names(panels[0]) == ["BF16", "Stock: Humming, Triton", "AdaLLM auto, NVFP4 lm_head"]
    latencies["rows"].remove(row)
    points = [line for line in plots.latencies(latencies).axes[3].lines if line.get_label() == "99th percentile"]
    assert len(points) == 2
    with pytest.raises(ValueError, match="no latency; a metric begins with ttft or itl"):
        plots.latencies(results.select(latencies, metric=("decode_tok_s",)))


def test_an_fp8_cache_is_drawn_over_a_bf16_cache(record):
    more = with_implementation(record, "adallm-w4a8-bf16kv", "adallm-w4a8", 0.8)
    more = with_implementation(more, "stock-humming-bf16kv", "stock-humming-flashinfer", 2)
    pairs = engines.cache_pairs(more)
    (axes,) = plots.fp8_cache(pairs, more).axes
    bars = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert bars["AdaLLM W4A8"] == pytest.approx([1.25] * 8)
    assert [label.get_text() for label in axes.get_xticklabels()][-2:] == ["long\nx1", "prefill\nx8"]
    assert sorted(bars["Stock, Humming"]) == sorted(row["ratio"] for row in pairs if row["title"] == "Stock, Humming")
    ticks = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
    [prefill] = [bar for bar in axes.containers[0] if round(bar.get_x()) == ticks.index("prefill x8")]
    [stock] = [row["ratio"] for row in pairs if (row["title"], row["metric"]) == ("Stock, Humming", "prefill_tok_s")]
    assert prefill.get_height() == stock
    with pytest.raises(ValueError, match="no implementation with a BF16 cache"):
        plots.fp8_cache([], record)


def test_what_is_projected_is_hollow_and_what_is_published_is_not(record):
    rows = projection.decode(record, "RTX 4090", impls=("adallm-w4a16",))
    rows[0]["low"], rows[0]["high"] = 50.0, 60.0
    theirs = [row for row in published.throughput() if row["metric"] == "decode_tok_s"]
    figure = plots.decode_projection(rows, theirs, record)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    low = lines["AdaLLM W4A16, projected"]
    assert low.get_markerfacecolor() == "none"
    assert low.get_ydata()[0] == 50.0
    assert any(
        line.get_markerfacecolor() == "none" and line.get_ydata()[0] == 60.0 for line in axes.lines if line != low
    )
    seed = lines[f"published: {published.ADALLM}"]
    assert list(seed.get_ydata()) == [37.8, 72.2, 149, 297, 469]
    assert seed.get_markerfacecolor() != "none"
    assert figure.get_supxlabel().startswith("hollow: projected for RTX 4090, from what was measured on NVIDIA H200")
    with pytest.raises(ValueError, match="projected for no card"):
        plots.decode_projection([], theirs, record)
    with pytest.raises(ValueError, match="L4, RTX 4090; one card is drawn"):
        plots.decode_projection([*rows, {**rows[0], "gpu": "L4"}], theirs, record)
