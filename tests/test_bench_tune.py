"""``bench/tune.py``: what it tries, what it keeps, and what it says without a GPU."""

import dataclasses
import json

import pytest
import torch

from adallm import results
from adallm.bench import tune
from adallm.kernels import choice
from adallm.kernels.choice import GPU
from adallm.kernels.matmul import Config
from adallm.sm89.check import Operands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADA, HOPPER = GPU("sm_89", 128, "none"), GPU("sm_90", 132, "none")


def test_candidates_suit_the_tokens_and_the_gpu():
    few = tune.candidates("bf16", ADA, 1, 4096, 4096)
    assert None not in few
    assert few
    assert all(config.m <= 8 for config in few)
    many = tune.candidates("fp8", HOPPER, 4096, 4096, 12288)
    assert None in many
    assert {config.programs for config in many if config} == {0, 132, 264, 396}
    assert {config.splits for config in tune.candidates("fp8", HOPPER, 8, 4096, 12288)} > {1}
    hopper = {config for row in choice.TABLES["sm_90"]["bf16"] for config in row.configs}
    ada = {config for row in choice.TABLES["sm_89"]["bf16"] for config in row.configs}
    tried = {dataclasses.replace(c, splits=1) for c in tune.candidates("bf16", ADA, 4096, 4096, 4096) if c}
    assert tried == {dataclasses.replace(c, splits=1) for c in ada if c.m >= 32}
    assert not tried & {dataclasses.replace(c, splits=1) for c in hopper - ada}


def test_all_are_checked_and_timed(monkeypatch):
    operands = Operands.random("bf16", 3, 48, 80, copies=lambda nbytes: 2, device=DEVICE)
    slow, quick = Config(32, 8, 64, 2, 1, 2, 2), Config(16, 8, 64, 2, 1, 2, 2)
    times = iter([9.0, 2.0])

    def time(calls, *, repeats):
        assert len(calls) == 2
        for run in calls:
            run()
        return next(times), 0.0

    found = tune.timed(operands, [slow, quick], repeats=3, time=time)
    assert [of_one[:2] for of_one in found] == [(slow, 9.0), (quick, 2.0)]
    assert all(0 < error < 2e-3 for *_, error in found)
    row = tune._row("bf16", 3, 48, 80, *found[1])
    assert (row["m"], row["us"]) == (3, 2.0)
    assert row["config"].startswith("n16 m")
    assert tune._row("bf16", 3, 48, 80, None, 1.0, 0.0)["config"] is None
    monkeypatch.setattr(Operands, "relative_error", lambda self, out: 0.5)
    with pytest.raises(ValueError, match=r"relative error 0\.5 with M=3 N=48"):
        tune.timed(operands, [slow], repeats=3, time=time)


def test_one_that_does_not_fit_is_passed_over(monkeypatch):
    operands = Operands.random("bf16", 3, 48, 80, copies=lambda nbytes: 1, device=DEVICE)

    def raises(message):
        def run():
            raise RuntimeError(message)

        return lambda *args: run

    monkeypatch.setattr(tune, "call", raises("out of resource: shared memory"))
    with pytest.raises(ValueError, match="no configuration fits this GPU for M=3 N=48"):
        tune.timed(operands, [Config(16, 8, 64, 2, 1, 2, 2)], repeats=3, time=None)
    monkeypatch.setattr(tune, "call", raises("illegal address"))
    with pytest.raises(RuntimeError, match="illegal address"):
        tune.timed(operands, [Config(16, 8, 64, 2, 1, 2, 2)], repeats=3, time=None)


def test_shapes_of_a_model(tmp_path):
    config = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 12288}))
    assert tune.shapes_of(tmp_path) == [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)]
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {**config, "intermediate_size": 12288}}))
    assert tune.shapes_of(tmp_path)[0] == (6144, 4096)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"hidden_size": 1}'])
def test_a_config_without_sizes_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: no sizes of a language model"):
        tune.shapes_of(tmp_path)


@pytest.mark.parametrize("shape", ["48", "48x", "40x64", "0x16", "axb"])
def test_bad_shapes(shape, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--shapes", shape])
    assert "is not NxK with multiples of 16" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert "there is none here" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_table_of_this_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.reload()
    options = ["--m", "1", "300", "--kinds", "bf16", "--repeats", "3", "--record", str(tmp_path / "results")]
    assert tune.main(["--shapes", "256x512", *options]) == 0
    (record,) = results.read_all("tune", root=tmp_path / "results").values()
    assert {row["m"] for row in record["rows"]} == {1, 300}
    rows = choice.tuned(choice.gpu(0).slug)["bf16", 256, 512]
    assert [row.m for row in rows] == [1, 300]
    assert tune.main(["--forget"]) == 0
    choice.reload()
    assert choice.tuned(choice.gpu(0).slug) == {}
