"""``engines``: the record that has what is asked for, and pairs of implementations that differ in the cache alone."""

import pytest

from adallm import engines, results

PROVENANCE = dict.fromkeys(results.PROVENANCE) | {"date": "2026-01-01"}


def row(impl, metric="decode_tok_s", value=1.0, *, batch=1, model="Qwen3-8B", layers=36):
    return {"model": model, "layers": layers, "impl": impl, "metric": metric, "batch": batch, "value": value}


def record(*rows, date="2026-01-01", gpu="NVIDIA H200"):
    return {"experiment": "vllm_e2e", "provenance": PROVENANCE | {"date": date, "gpu": gpu}, "rows": list(rows)}


def test_records_are_of_one_model_and_the_most_layers(tmp_path):
    assert engines.records(root=tmp_path) == []
    rows = [row("bf16", layers=4), row("bf16", value=2.0), row("bf16", model="other", layers=99)]
    results.write("vllm_e2e", rows, provenance=PROVENANCE, root=tmp_path, name="a")
    results.write("vllm_e2e", rows[2:], provenance=PROVENANCE, root=tmp_path, name="b")
    [found] = engines.records(root=tmp_path)
    assert [r["value"] for r in found["rows"]] == [2.0]
    [found] = engines.records(root=tmp_path, model="other")[:1]
    assert found["rows"][0]["layers"] == 99


def test_the_widest_has_the_most_implementations_with_the_metric():
    few = record(row("bf16", "itl_p99_ms"), row("bf16"), date="2026-03-01")
    many = record(row("bf16"), row("adallm-auto"), row("adallm-auto", batch=2))
    same = record(row("bf16"), row("adallm-w4a8"), date="2026-02-01")
    known = [few, many, same]
    assert engines.widest(known, metric="itl_p99_ms") is few
    assert engines.widest(known, metric="decode_tok_s") is same
    assert engines.widest(known, metric="decode_tok_s", impls=("adallm-auto", "x")) is many
    assert engines.widest(known, metric="decode_tok_s", impls=("x",)) is None
    assert engines.widest([], metric="decode_tok_s") is None
    other = record(row("bf16"), gpu="NVIDIA H100 80GB HBM3")
    assert engines.widest([*known, other], metric="decode_tok_s", first="H100") is other
    assert engines.widest([*known, other], metric="decode_tok_s", first="L4") is same
    assert engines.widest([*known, other], metric="itl_p99_ms", first="H100") is few
    assert engines.widest([*known, other], metric="decode_tok_s", impls=("adallm-auto",), first="H100") is many


@pytest.mark.parametrize(("gpu", "name"), [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), (None, "CPU")])
def test_card(gpu, name):
    assert engines.card(record(gpu=gpu)) == name


def test_cache_pairs_are_ratios_to_the_fastest_of_the_same_weights():
    rows = [row("stock-humming-triton", value=3.0), row("stock-humming-flashinfer", value=4.0), row("bf16", value=9.0)]
    assert engines.cache_pairs(record(*rows)) == []
    rows += [row("stock-humming-bf16kv", value=2.0), row("adallm-w4a8-bf16kv", value=5.0)]
    rows += [row(impl, "peak_gib", 7.0, batch=8) for impl in ("stock-humming-triton", "stock-humming-bf16kv")]
    [found] = engines.cache_pairs(record(*rows))
    wanted = {"metric": "decode_tok_s", "batch": 1, "bf16": 2.0, "fp8": 4.0, "ratio": 2.0}
    assert found == {"title": "Stock, Humming"} | wanted
    assert engines.values(record(*rows))["peak_gib", 8] == {"stock-humming-triton": 7.0, "stock-humming-bf16kv": 7.0}


def test_graph_pairs_are_of_one_implementation():
    rows = [row("adallm-auto", value=3.0), row("adallm-auto-graphs", value=4.0), row("stock-a-graphs", value=5.0)]
    rows += [row("adallm-auto-graphs", "itl_p99_ms", 1.0)]
    wanted = {"impl": "adallm-auto", "metric": "decode_tok_s", "batch": 1, "value": 3.0, "graphs": 4.0}
    assert engines.graph_pairs(record(*rows)) == [wanted]


def test_names_are_those_of_the_benchmark():
    impls = pytest.importorskip("adallm.bench._e2e_impls").IMPLS
    ours = [
        name
        for name, impl in impls.items()
        if impl.ours and impl.kv_cache == "fp8" and not name.endswith(engines.GRAPHS)
    ]
    assert list(engines.OURS) == ours
    assert set(engines.CACHES) == {name for name, impl in impls.items() if impl.kv_cache == "auto"}
    assert {other for _, others in engines.CACHES.values() for other in others} <= impls.keys()
    titles = pytest.importorskip("adallm.plots.engines", exc_type=ImportError).IMPLS
    assert set(titles) == set(impls)
