"""``plots/kv_cache.py``: what is drawn is what the rows and the record say."""

import copy

import pytest

from adallm import memory, plots, results


@pytest.fixture
def record():
    return copy.deepcopy(results.read(results.default_root() / "kv_cache" / "cpu.json"))


def cells(axes):
    return [text.get_text() for text in axes.texts]


def test_bytes_are_those_of_the_rows():
    rows, by_context = memory.per_token(), memory.by_context((1024, 8192, 131072))
    left, right = plots.kv_bytes(rows, by_context).axes
    bars = {bars.get_label(): [bar.get_width() for bar in bars] for bars in left.containers}
    assert bars["FP8"] == [row["bytes"] / 1024 for row in rows if row["cache"] == "fp8"]
    assert bars["NVFP4"][0] == 40.5
    lines = {line.get_label(): line for line in right.lines}
    assert list(lines["Qwen3-8B"].get_xdata()) == [1024, 8192]
    of = {row["tokens"]: row["bytes"] for row in by_context if (row["model"], row["cache"]) == ("Gemma3-27B", "bf16")}
    assert list(lines["Gemma3-27B"].get_ydata()) == [nbytes / 2**30 for nbytes in of.values()]
    by_context[0]["bytes"] = 2**33
    _, changed = plots.kv_bytes(rows, by_context).axes
    assert changed.lines[0].get_ydata()[0] == 8


def test_a_map_has_the_context_and_the_batch_of_each_fit():
    rows = list(memory.fits(["RTX 4090", "L4"], tokens=4096))
    first, second = plots.kv_fits(rows).axes
    assert [axes.get_title("left") for axes in (first, second)] == ["RTX 4090", "L4"]
    assert len(cells(first)) == 5 * 4
    row = next(r for r in rows if (r["model"], r["weights"], r["cache"]) == ("Qwen3-8B", "nvfp4", "fp8"))
    assert cells(first)[2] == f"40 K*\nx {row['batch']}"
    assert cells(second)[4:8] == ["weights\ndo not fit"] * 4
    row |= {"context": 512, "bound": "memory", "batch": 7}
    assert cells(plots.kv_fits(rows).axes[0])[2] == "512\nx 7"


def test_magnitudes_are_those_of_the_record(record):
    results.find(record, part="magnitude", cache="fp8-one", log2_std=3)["rel_err"] = 0.5
    (axes,) = plots.kv_magnitudes(record).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert (8.0, 0.5) in {tuple(point) for point in lines["FP8, scale 1"].get_xydata()}
    assert {"BF16", "FP8, calibrated", "FP8, per token and head", "NVFP4 (4.5 bits)"} <= lines.keys()


def test_layers_and_losses_are_those_of_the_record(record):
    results.find(record, part="layer", cache="fp8-token", layer=4)["rel_err"] = 0.25
    loss = results.find(record, part="perplexity", cache="fp8-calibrated")
    loss |= {"delta": 0.125, "delta_stderr": 0.01}
    left, right = plots.kv_model(record).axes
    points = {c.get_label(): c[0].get_ydata() for c in left.containers}
    assert points["FP8, per token and head"][4] == 0.25
    widths = [bar.get_width() for bar in right.patches]
    others = [r["delta"] for r in record["rows"] if r["part"] == "perplexity" and r["cache"] != "bf16"]
    assert widths == others
    assert widths[1] == 0.125
    error = next(c for c in right.collections if 0.1 < c.get_segments()[0][0][0] < 0.2)
    assert error.get_segments()[0][:, 0] == pytest.approx([0.105, 0.145])
