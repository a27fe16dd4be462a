"""``README.md``: its commands, its paths and its numbers."""

import re
import statistics
from pathlib import Path

from adallm import engines, evaluate, results
from adallm.bench import _attention_summary, _e2e_impls, _linear_summary, attention, linear, rules, sm89, vllm_e2e
from adallm.vllm_plugin import compat

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
RESULTS = Path(__file__).resolve().parent.parent / "results"


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (RESULTS.parent / "Makefile").read_text()
    for command in ("eval", "test", "lint", "lab", "figures", "bench", "model", "clean"):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    assert "    make eval " in README
    assert "    make test " in README


def test_the_table_is_that_of_the_record():
    shown = README.partition("<!-- results/eval/cpu.md -->\n")[2].partition("<!-- end -->")[0].strip()
    record = results.read(RESULTS / "eval" / "cpu.json")
    assert shown == (RESULTS / "eval" / "cpu.md").read_text().strip()
    assert shown == evaluate.table(record["rows"], markdown=True)


def test_the_tables_of_kernels_are_those_of_the_records():
    rows = results.read(RESULTS / "linear" / "h100-80gb-hbm3.json")["rows"]
    steps = results.read(RESULTS / "attention" / "h100-80gb-hbm3.json")["rows"]
    end_to_end = results.read(RESULTS / "vllm_e2e" / "h100-80gb-hbm3.json")["rows"]
    for name, table in (
        ("linear times", _linear_summary.times_table(rows, "Qwen3-8B.gate_up", markdown=True)),
        ("linear groups", _linear_summary.groups_table(linear.summary(rows)["groups"], markdown=True)),
        ("attention times", _attention_summary.times_table(steps, "32/8/128", 16, markdown=True)),
        ("attention groups", _attention_summary.groups_table(attention.summary(steps)["groups"], markdown=True)),
        ("rules", rules.report(results.read(RESULTS / "rules" / "cpu.json")["rows"], markdown=True)),
        ("vllm", vllm_e2e.report([row for row in end_to_end if not row["metric"].endswith("_ms")], markdown=True)),
    ):
        assert README.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- end {name} -->")[0].strip() == table


def test_what_is_said_of_bandwidth_is_in_the_record():
    rows = results.read(RESULTS / "attention" / "h100-80gb-hbm3.json")["rows"]
    (read,) = [row["tb_s"] for row in rows if row["impl"] == "read"]
    shares = [row["tb_s"] / read for row in rows if row["impl"] == "adallm" and row["tokens_read"] >= 1 << 18]
    assert len(shares) > 20
    assert f"at {int(100 * min(shares))} to {round(100 * max(shares))}% of the bandwidth" in " ".join(README.split())


def test_what_is_said_of_the_projection_is_in_the_record():
    rows = results.read(RESULTS / "sm89" / "h100-80gb-hbm3.json")["rows"]
    said = " ".join(README.split())
    for part, of_what in zip(
        sm89.PARTS, ("linear layers, where its error is", "decode attention, where it is"), strict=True
    ):
        known = sm89.model_errors(rows, part.kinds)
        error = re.search(r"[0-9]+% in the median and [0-9]+% at most", sm89.summary(known, "it"))
        assert f"to {len(known)} of {of_what} {error[0]}" in said


def test_what_is_said_of_vllm_is_in_the_record():
    record = results.read(RESULTS / "vllm_e2e" / "h100-80gb-hbm3.json")
    of, said = engines.values(record), " ".join(README.split())
    over = {key: values["adallm-w4a8"] / values["adallm-w4a16"] for key, values in of.items()}
    assert f"read prompts {over['prefill_tok_s', 8]:.2f} times as fast" in said
    assert f"decoded one sequence {over['decode_tok_s', 1]:.2f} times as fast" in said
    best = max(of["prefill_tok_s", 8][impl] for impl in _e2e_impls.STOCK)
    assert f"read prompts {of['prefill_tok_s', 8]['adallm-auto'] / best:.2f} times as fast as the best of stock" in said
    assert "`adallm-auto-graphs`, which has no row yet" in said
    assert "adallm-auto-graphs" not in {row["impl"] for row in record["rows"]}
    timed = [row for row in record["rows"] if row["metric"].endswith("_tok_s")]
    assert {row["repeats"] for row in timed} == {5}
    parts = [row["spread"] / row["value"] for row in timed]
    assert f"is {statistics.median(parts):.1%} of it in the median and {max(parts):.0%} at most" in said
    assert {row["card"] for row in record["rows"]} == {"0", "1", "2", "3"}
    assert "H100s with vLLM 0.26, four at a time" in said
    assert f"for steps of up to {compat.GRAPH_SIZES[-1]:,} tokens" in said


def test_what_is_said_of_latencies_is_in_the_record():
    record = results.read(RESULTS / "vllm_e2e" / "h100-80gb-hbm3.json")
    of = {(case["metric"], case["batch"]): case for case in vllm_e2e.summary(record["rows"])}
    keys = [(metric, 16) for metric in ("itl_p50_ms", "itl_p99_ms", "ttft_p50_ms")] + [("itl_p99_ms", 64)]
    ours = [of[key]["value"] for key in keys]
    stock = [of[key]["value"] * of[key]["vs_stock"] for key in keys]
    said = " ".join(README.split())
    assert f"time between tokens was {ours[0]:.1f} ms (best of stock: {stock[0]:.1f} ms)" in said
    assert f"the 99th percentile {ours[1]:.0f} ms ({stock[1]:.0f} ms)" in said
    assert f"time to the first token {ours[2]:.0f} ms ({stock[2]:.0f} ms)" in said
    assert {of[key]["ours"] for key in keys[1:]} == {"adallm-auto-lm-head-graphs"}
    assert not any(of[key]["stock"].endswith(engines.GRAPHS) for key in keys)
    values = engines.values(record)
    without = [values[key]["adallm-auto-lm-head"] for key in keys]
    assert f"without, they were {without[1]:.0f} and {without[2]:.0f} ms" in said
    assert f"the 99th percentile between tokens was {ours[3]:.0f} ms, stock's {stock[3]:.0f} ms" in said
    median = values["itl_p50_ms", 64]
    least = min(median[impl] for impl in _e2e_impls.STOCK)
    graphs, plain = (median[f"adallm-auto-lm-head{behind}"] for behind in (engines.GRAPHS, ""))
    assert (
        f"the median {graphs:.1f} ms with `-graphs` and {plain:.1f} ms without (stock's best: {least:.1f} ms)" in said
    )


def test_what_is_said_of_quantizing_a_model_is_in_the_record():
    rows = results.read(RESULTS / "convert" / "h100-80gb-hbm3.json")["rows"]
    (row,) = [row for row in rows if row["rule"] == "mse"]
    assert f"a model of Qwen3-8B's size took {row['s']:.0f} s with `mse`" in " ".join(README.split())


def test_every_path_exists():
    paths = re.findall(r"`((?:results|adallm|notebooks)/[\w./-]*)`|\]\(((?:results|notebooks)/[\w./-]+)\)", README)
    assert len(paths) > 5
    for path in ("".join(pair) for pair in paths):
        assert (RESULTS.parent / path).exists(), path


def test_every_number_with_four_decimals_is_in_a_record():
    known = {
        f"{abs(value):.4f}"
        for path in RESULTS.glob("*/*.json")
        for row in results.read(path)["rows"]
        for value in row.values()
        if isinstance(value, float)
    }
    assert set(re.findall(r"\b\d+\.\d{4}\b", README)) - known == set()
