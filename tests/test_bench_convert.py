"""``bench/convert.py``: a whole model quantized by the clock."""

import json

import pytest
from transformers import AutoModelForCausalLM

from adallm import checkpoint, results
from adallm.bench import _e2e_model, convert

SMALL = {
    **_e2e_model.QWEN3_8B,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 4096,
}


def test_the_model_is_one(tmp_path):
    path = convert.write(tmp_path / "model", SMALL, 2, "cpu")
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    linear = [n for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n]
    assert {name.split(".", 3)[3].removesuffix(".weight") for name in linear} == {
        name for name, shape in convert.shapes(SMALL).items() if len(shape) == 2
    }


def test_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_e2e_model, "QWEN3_8B", SMALL)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = ["--rules", "max", "mse", "gptq", "--layers", "1", "--folder", str(tmp_path), "--out", str(tmp_path / "r")]
    assert convert.main(given) == 0
    rows = results.read(tmp_path / "r" / "convert" / "cpu-max-mse-gptq-first-1.json")["rows"]
    assert [row["rule"] for row in rows] == ["max", "mse", "gptq"]
    most, least, gptq = (row["rel_sq_err"] for row in rows)
    assert least < 0.78 * most
    assert least < gptq
    for row in rows:
        assert row["weights"] == (128 * 64 * 2 + 128 * 128 * 2 + 3 * 128 * 192)
        assert row["mweights_s"] == pytest.approx(row["weights"] / row["s"] / 1e6, rel=0.05)
    assert convert.report(rows[-1:]) in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_an_error_that_is_none_of_the_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "BOUNDS", (0.001, 0.002))
    with pytest.raises(ValueError, match=r"max: relative squared error 0\.0\d+; it must be from 0.001 to 0.002"):
        list(convert.measure("small", SMALL, ["max"], "cpu", tmp_path))
    assert json.loads((tmp_path / "one" / "config.json").read_text())["num_hidden_layers"] == 1
    assert checkpoint.inspect(tmp_path / "one")
