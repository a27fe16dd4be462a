"""``evaluate.py``: lm-eval on our formats, against plain arithmetic on the same windows."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adallm import checkpoint, evaluate, hf_model, lm, plots, results
from adallm.cli import main
from adallm.hf_model import FORMATS
from adallm.tasks import stdlib_ppl
from adallm.tiny import corpus

MODEL = evaluate.BUNDLED_MODEL


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADALLM_CACHE", str(tmp_path / "cache"))


def _only_document(monkeypatch, path, characters):
    """Make the first characters of one module the whole text of the task."""
    text = next(d for d in stdlib_ppl.documents() if d.path == path).text[:characters]
    monkeypatch.setattr(corpus, "load", lambda: {"heldout": [corpus.Document(path, text)]})
    return text


def test_the_text_is_held_out_and_long_enough():
    tok = AutoTokenizer.from_pretrained(MODEL)
    documents = stdlib_ppl.documents()
    assert sum(len(tok.encode(d.text)) for d in documents) >= 50_000
    assert all(corpus.split_of(d.path) == "heldout" for d in documents)
    assert not any("test" in d.path.split("/") for d in documents)


def test_bits_per_byte_equal_a_plain_sum_of_log_probabilities(monkeypatch):
    """A document of two and a half windows: every token once, each window with one token of context."""
    text = _only_document(monkeypatch, "secrets.py", 1500)
    monkeypatch.setattr(lm, "MAX_LENGTH", 160)
    measured = evaluate.perplexity(MODEL, format="bf16")
    tok = AutoTokenizer.from_pretrained(MODEL)
    tokens = [0, *tok.encode(text)]
    model = hf_model.load(MODEL, FORMATS["bf16"])
    windows = []
    for first in range(0, len(tokens) - 1, 160):
        # A last, shorter window is filled up with context from the left.
        target = tokens[first + 1 : first + 161]
        start = first if len(target) == 160 else len(tokens) - 161
        ids = torch.tensor([tokens[start : len(tokens) - 1 if len(target) < 160 else first + 160]])
        with torch.no_grad():
            logp = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        windows.append(-sum(float(logp[i - len(target), t]) for i, t in enumerate(target)))
    assert len(tokens) - 1 == measured["tokens"] == sum(w[0] for w in measured["windows"])
    assert measured["bytes"] == len(text.encode())
    assert [w[1] for w in measured["windows"]] == pytest.approx(windows, rel=1e-4)
    assert measured["bits_per_byte"] == pytest.approx(sum(windows) / math.log(2) / len(text.encode()), rel=1e-4)
    assert measured["perplexity"] == pytest.approx(math.exp(sum(windows) / (len(tokens) - 1)), rel=1e-3)


def test_the_standard_error_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 2000, 60)
    nats = tokens * 1.5 + rng.normal(0, 40, 60)
    analytic = evaluate.ratio_stderr(list(nats), [int(t) for t in tokens], 200_000)
    draws = rng.integers(0, 60, (4000, 60))
    ratios = nats[draws].sum(1) / tokens[draws].sum(1)
    assert analytic == pytest.approx(ratios.std() * tokens.sum() / math.log(2) / 200_000, rel=0.1)
    assert evaluate.ratio_stderr([3.0], [2], 8) == 0.0
    assert evaluate.ratio_stderr([2.0, 4.0], [1, 2], 8) == 0.0


def test_both_layouts_measure_the_same_as_the_model_quantized_here(tmp_path):
    """In FP32 throughout: layers in BF16 make 0.4% out of the last bit of a scale, whose reciprocal one layout has."""
    source = tmp_path / "fp32"
    shutil.copytree(MODEL, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).save_pretrained(source)
    here = evaluate.perplexity(source, format="nvfp4", limit=1)
    checkpoint.convert(source, tmp_path / "modelopt", layout="modelopt")
    checkpoint.convert(tmp_path / "modelopt", tmp_path / "ct", layout="compressed-tensors")
    stored = {name: evaluate.perplexity(tmp_path / name, limit=1) for name in ("modelopt", "ct")}
    assert {measured["format"] for measured in stored.values()} == {"nvfp4"}
    assert stored["modelopt"]["windows"] == here["windows"]
    assert stored["ct"]["bits_per_byte"] == pytest.approx(here["bits_per_byte"], rel=1e-5)


def test_the_command_writes_record_table_and_figure_and_reuses_what_is_unchanged(tmp_path, capsys, monkeypatch):
    command = ["eval", "--limit", "1", "--formats", "bf16,nvfp4,mxfp4", "--results", str(tmp_path / "results")]
    assert main(command) == 0
    first = capsys.readouterr().out
    (path,) = (tmp_path / "results" / "eval").glob("*.json")
    record = results.read(path)
    assert [row["format"] for row in record["rows"]] == ["bf16", "nvfp4", "mxfp4"]
    assert record["limit"] == 1
    assert record["corpus"]["sha256"]
    base, *others = record["rows"]
    assert base["delta"] == base["delta_stderr"] == 0
    for row in others:
        assert row["delta"] == pytest.approx(row["bits_per_byte"] - base["bits_per_byte"])
        assert row["title"] in first
    assert evaluate.table(record["rows"], markdown=True) in path.with_suffix(".md").read_text()
    assert len(list((tmp_path / "results" / "figures").glob("eval-*.svg"))) == 1

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluate, "perplexity", never)
    assert main(command) == 0
    assert capsys.readouterr().out.count("unchanged") == 3
    assert [{**row, "seconds": 0} for row in results.read(path)["rows"]] == [
        {**row, "seconds": 0} for row in record["rows"]
    ]


def test_a_changed_model_is_measured_again(tmp_path):
    checkpoint.convert(MODEL, tmp_path / "m")
    options = {"task": "stdlib_ppl", "limit": 1, "format": "nvfp4", "scale_rule": "max", "backend": "hf"}
    before = evaluate._key(tmp_path / "m", options)
    assert evaluate._key(tmp_path / "m", options) == before
    assert evaluate._key(tmp_path / "m", {**options, "limit": 2}) != before
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-5}))
    assert evaluate._key(tmp_path / "m", options) != before


def test_the_figure_of_a_part_without_that_task_is_an_error():
    with pytest.raises(ValueError, match="no perplexity rows of task 'x'"):
        plots.perplexity({"rows": [{"task": "y"}]}, task="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "fp5"], "format 'fp5'; supported: bf16, fp8, nvfp4"),
        (["--formats", "nvfp4", "--scale-rule", "best"], "scale_rule 'best'; supported"),
        (["--tasks", "no_such_task"], "task 'no_such_task' is not known to lm-eval"),
        (["--limit", "0"], "limit 0; it must be a positive number"),
        (["--model", "no/such-model"], "model 'no/such-model' is neither a directory here nor in the local"),
        (["--backend", "vllm", "--formats", "mxfp4"], "format 'mxfp4' with vLLM on this machine; supported: bf16"),
    ],
)
def test_bad_options_say_what_is_supported(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["eval", "--results", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.json"))


def test_a_task_whose_data_cannot_be_had_says_so(monkeypatch):
    class Manager:
        all_tasks = ("wikitext",)

        def __init__(self, **_):
            pass

        def load(self, _):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(evaluate, "TaskManager", Manager)
    with pytest.raises(ValueError, match=r"task 'wikitext'.*no route to host.*TASKS=stdlib_ppl needs no download"):
        evaluate.perplexity(MODEL, task="wikitext")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("form", ["bf16", "nvfp4", "nvfp4-w4a8", "nvfp4-fp8kv"])
def test_vllm_measures_what_transformers_measures(monkeypatch, form):
    pytest.importorskip("vllm", reason="needs vLLM")
    if form not in lm.vllm_formats():
        pytest.skip("needs AVX-512 for vLLM's FP8 KV cache on a CPU")
    _only_document(monkeypatch, "secrets.py", 600)
    here = evaluate.perplexity(MODEL, format=form)
    there = evaluate.perplexity(MODEL, format=form, backend="vllm")
    assert here["tokens"] == there["tokens"] > 100
    # On a CPU an FP8 cache is read by vLLM's own attention, which differs by 0.9% here.
    tolerance = 2e-2 if form == "nvfp4-fp8kv" else 5e-3
    assert there["bits_per_byte"] == pytest.approx(here["bits_per_byte"], rel=tolerance)
    if form != "bf16":
        # Not that of the model that it was quantized from.
        assert there["bits_per_byte"] != evaluate.perplexity(MODEL, format="bf16")["bits_per_byte"]
