"""``projection``: bytes and operations of a step, its floor, and what is made of them for another card."""

import dataclasses

import pytest

from adallm import engines, hardware, projection, published, results
from adallm.hardware import GPUS
from adallm.projection import Step

PATHS = {
    "bf16": "UnquantizedLinearMethod, head UnquantizedEmbeddingMethod, FLASH_ATTN, KV cache auto",
    "w4a16": "adallm W4A16, head UnquantizedLinearMethod, CUSTOM, KV cache fp8",
    "w4a8": "adallm W4A8, head UnquantizedLinearMethod, CUSTOM, KV cache fp8",
    "lm-head": "adallm W4A16, head adallm W4A16, CUSTOM, KV cache fp8",
    "bf16kv": "adallm W4A16, head UnquantizedLinearMethod, FLASH_ATTN, KV cache auto",
}
ROW = {"model": "Qwen3-8B", "layers": 36, "metric": "decode_tok_s", "prompt": 32, "new": 128}
LINEAR = 36 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 12288)
HEAD = 151936 * 4096


def row(name, batch=1, value=300.0):
    return {**ROW, "impl": name, "path": PATHS[name], "batch": batch, "value": value}


def record(*rows, gpu="NVIDIA H100 80GB HBM3"):
    return {"provenance": {"gpu": gpu}, "rows": list(rows)}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("bf16", 2 * LINEAR + 2 * HEAD),
        ("w4a16", LINEAR * 9 / 16 + 2 * HEAD),
        ("lm-head", (LINEAR + HEAD) * 9 / 16),
    ],
)
def test_a_step_reads_weights_and_cache(name, weights):
    steps = [projection.step(row(name, batch)) for batch in (1, 5)]
    # 96 tokens are in the cache on average, of 36 layers and 8 heads of 128, keys and values.
    kept = 2 * 36 * 96 * 8 * 128 * (2 if name == "bf16" else 1)
    assert steps[0].nbytes == pytest.approx(weights + kept, rel=1e-3)
    assert steps[1].nbytes - steps[0].nbytes == 4 * kept
    assert steps[0].operations == pytest.approx(2 * (LINEAR + HEAD), rel=1e-3)
    assert steps[1].operations == 5 * steps[0].operations


def test_the_cache_and_the_tensor_cores_are_those_of_the_path():
    eight, sixteen = (projection.step(row(name)).nbytes for name in ("w4a16", "bf16kv"))
    assert sixteen - eight == 2 * 36 * 96 * 8 * 128
    assert [projection.step(row(name)).fp8 for name in ("w4a16", "w4a8")] == [False, True]
    with pytest.raises(ValueError, match=r"no known lm_head; supported: adallm W4A16"):
        projection.step({**row("w4a16"), "path": "adallm W4A16, head other"})
    with pytest.raises(ValueError, match=r"model 'other'; supported: Qwen3-8B"):
        projection.step({**row("w4a16"), "model": "other"})


def test_a_floor_is_the_longer_of_memory_and_tensor_cores():
    gpu = dataclasses.replace(GPUS["L4"], dram_gb_s=100.0, fp16_tflops=10.0, fp8_tflops=20.0)
    assert Step(2e9, 1e11, fp8=False).floor(gpu) == (0.02, "memory")
    assert Step(2e9, 4e11, fp8=False).floor(gpu) == (0.04, "tensor")
    assert Step(2e9, 3e11, fp8=True).floor(gpu) == (0.02, "memory")


def test_a_projection_keeps_the_share_or_the_rest():
    one = row("w4a16", batch=2, value=500.0)
    [found] = projection.decode(record(one, row("bf16")), "RTX 4090", impls=("w4a16",))
    nbytes = projection.step(one).nbytes
    here, there = nbytes / 3352e9, nbytes / 1008e9
    assert found["share"] == pytest.approx(here / (2 / 500))
    assert found["low"] == pytest.approx(500 * 1008 / 3352)
    assert found["high"] == pytest.approx(2 / (there + 2 / 500 - here))
    assert found["roof"] == pytest.approx(2 / there)
    assert found["low"] < found["high"] < found["roof"]
    assert (found["measured_on"], found["measured"], found["gpu"], found["bound"]) == (
        "H100",
        500,
        "RTX 4090",
        "memory",
    )
    # To the card itself both give what was measured.
    [same] = projection.decode(record(one), "H100", impls=("w4a16",))
    assert same["low"] == pytest.approx(500)
    assert same["high"] == pytest.approx(500)
    # To one with more bandwidth the ends change places.
    [faster] = projection.decode(record(one), "H200", impls=("w4a16",))
    assert 500 < faster["low"] < faster["high"] == pytest.approx(500 * 4800 / 3352)


def test_a_changed_record_changes_the_projection():
    known = engines.records()
    source = projection.nearest(known, "RTX 4090", impls=engines.OURS)
    first = projection.decode(source, "RTX 4090", impls=engines.OURS)
    results.find(source, impl=first[0]["impl"], metric="decode_tok_s", batch=1)["value"] /= 2
    changed = projection.decode(source, "RTX 4090", impls=engines.OURS)
    assert changed[0]["low"] == pytest.approx(first[0]["low"] / 2)
    assert changed[1:] == first[1:]


def test_rows_are_in_the_order_asked_for():
    rows = [row("w4a8", 4), row("w4a16", 4), row("w4a16", 1)]
    found = projection.decode(record(*rows), "L4", impls=("w4a16", "w4a8"))
    assert [(r["impl"], r["batch"]) for r in found] == [("w4a16", 1), ("w4a16", 4), ("w4a8", 4)]


@pytest.mark.parametrize(("here", "there", "said"), [("NVIDIA A100", "L4", "NVIDIA A100"), (None, "L4", "None")])
def test_a_card_without_a_data_sheet(here, there, said):
    with pytest.raises(ValueError, match=f"no data sheet of '?{said}'?; supported: RTX 4090"):
        projection.decode(record(row("w4a16"), gpu=here), there, impls=("w4a16",))


def test_a_projection_for_a_card_without_a_data_sheet():
    with pytest.raises(ValueError, match="no data sheet of 'RTX 3090'"):
        projection.decode(record(row("w4a16")), "RTX 3090", impls=("w4a16",))


def test_the_nearest_card_has_rows_and_a_data_sheet():
    near, far = record(row("w4a16")), record(row("w4a16"), gpu="NVIDIA H200")
    other = record(row("bf16"), gpu="NVIDIA L40S")
    unknown = record(row("w4a16"), gpu="NVIDIA A100-SXM4-80GB")
    assert projection.nearest([far, near, other, unknown], "RTX 4090", impls=("w4a16",)) is near
    assert projection.nearest([far, other, unknown], "L4", impls=("w4a16",)) is far
    assert projection.nearest([other, unknown], "L4", impls=("w4a16",)) is None


def test_check_compares_what_both_measured():
    source = record(row("w4a16", value=300.0), row("w4a16", 2, 590.0), row("w4a8"))
    inside = projection.decode(source, "H200", impls=("w4a16",))[0]
    target = record(row("w4a16", value=inside["low"]), row("w4a16", 2, 1.0), row("bf16"), gpu="NVIDIA H200")
    found = list(projection.check(source, target))
    assert [(r["batch"], r["truth"], r["inside"]) for r in found] == [(1, inside["low"], True), (2, 1.0, False)]


def test_check_compares_no_two_commits_of_our_kernels():
    source, target = record(row("w4a16"), row("bf16")), record(row("w4a16"), row("bf16"), gpu="NVIDIA H200")
    for one, other, found in (("a", "a", {"w4a16", "bf16"}), ("a", "b", {"bf16"})):
        source["provenance"]["commit"], target["provenance"]["commit"] = one, other
        assert {r["impl"] for r in projection.check(source, target)} == found


def test_published_figures_of_a_card():
    rows = published.throughput()
    assert {row["batch"]: row["value"] for row in rows if row["metric"] == "decode_tok_s"} == {
        1: 37.8,
        2: 72.2,
        4: 149.0,
        8: 297.0,
        16: 469.0,
    }
    assert [row["value"] for row in rows if row["metric"] == "peak_gb"] == [7.55]
    assert {(row["gpu"], row["source"]) for row in rows} == {("RTX 4090", published.ADALLM)}
    assert all(row["gpu"] in hardware.GPUS for row in rows)
