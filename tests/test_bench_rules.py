"""``bench/rules.py``: perplexity under every rule, compared window by window."""

import pytest

from adallm import evaluate, results
from adallm.bench import rules
from adallm.checkpoint.quantize import RULES

WORSE = {"max": 5.0, "four_over_six": 4.0, "mse": 4.5, "imatrix": 3.0, "mse_fp8": 4.2, "gptq": 1.0}


def measured(directory, options, progress):
    assert directory == evaluate.BUNDLED_MODEL
    more = 0.0 if options["format"] == "bf16" else WORSE[options["scale_rule"]]
    windows = [[100, 200.0 + more], [100, 220.0 + 2 * more], [50, 90.0 + more]]
    nats = sum(nats for _, nats in windows)
    return {"format": options["format"], "windows": windows, "bytes": 1000, "bits_per_byte": nats / 1000, "stderr": 0.1}


@pytest.mark.parametrize(("limit", "name"), [([], "cpu"), (["--limit", "2"], "cpu-first-2")])
def test_the_record(tmp_path, monkeypatch, capsys, limit, name):
    monkeypatch.setattr(evaluate, "cached", measured)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert rules.main([*limit, "--out", str(tmp_path)]) == 0
    rows = results.read(tmp_path / "rules" / f"{name}.json")["rows"]
    assert [(row["format"], row["rule"]) for row in rows[1:]] == [(f, r) for f in rules.QUANTIZED for r in RULES]
    assert {row["rule"] for row in rows if row["from_text"]} == {"imatrix", "gptq"}
    for row in rows[1:]:
        more = WORSE[row["rule"]]
        assert row["delta"] == pytest.approx(4 * more / 1000)
        assert row["above_gptq"] == pytest.approx(4 * (more - 1) / 1000)
        differences = [factor * more for factor in (1, 2, 1)]
        assert row["delta_stderr"] == pytest.approx(evaluate.ratio_stderr(differences, [100, 100, 50], 1000))
    assert rules.report(rows) in capsys.readouterr().out
