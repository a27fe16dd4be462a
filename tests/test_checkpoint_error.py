"""``adallm inspect --error``: layers of a quantized directory against those that they were made from."""

import math

import pytest
from test_checkpoint import LAYOUTS, QWEN3, dense_tensors, mixed_directory, raw, write

from adallm import checkpoint
from adallm.checkpoint import CheckpointError
from adallm.cli import main


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", QWEN3, dense_tensors(QWEN3), shards=3)


@pytest.mark.parametrize("case", [*LAYOUTS, "mixed"])
def test_the_formula(source, tmp_path, case):
    if case == "mixed":
        path = mixed_directory(tmp_path / "dst")
    else:
        path = checkpoint.convert(source, tmp_path / "dst", layout=case, scale_rule="four_over_six").path
    found, dense, stored = checkpoint.errors(path, source), checkpoint.load_dense(path, None), raw(source)
    assert sorted(error.name for error in found) == sorted(name for name in stored if "_proj" in name)
    assert {error.format for error in found} == ({"nvfp4", "fp8"} if case == "mixed" else {"nvfp4"})
    signal = noise = 0.0
    for error in found:
        w, w_2 = stored[error.name].double(), dense[error.name].double()
        assert error.relative == pytest.approx(float((w - w_2).norm() / w.norm()))
        assert error.sqnr_db == pytest.approx(10 * math.log10(w.square().sum() / (w - w_2).square().sum()))
        signal, noise = signal + float(w.square().sum()), noise + float((w - w_2).square().sum())
    assert [error.relative for error in found] == sorted((error.relative for error in found), reverse=True)
    total = checkpoint.total(found)
    assert (total.signal, total.noise) == (pytest.approx(signal), pytest.approx(noise))


def test_layers_without_noise_or_signal():
    assert checkpoint.LayerError("a", "fp8", (1, 1), 2.0, 0.0).sqnr_db == math.inf
    assert checkpoint.LayerError("a", "fp8", (1, 1), 0.0, 0.0).relative == 0.0
    only_noise = checkpoint.LayerError("a", "fp8", (1, 1), 0.0, 1.0)
    assert (only_noise.relative, only_noise.sqnr_db) == (math.inf, -math.inf)


def test_the_command(source, tmp_path, capsys):
    path = checkpoint.convert(source, tmp_path / "dst").path
    assert main(["inspect", str(path), "--error", str(source)]) == 0
    header, worst, *_, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "format", "shape", "SQNR", "dB", "relative", "error"]
    error = checkpoint.errors(path, source)[0]
    shape = "x".join(map(str, error.shape))
    assert worst.split() == [error.name, "nvfp4", shape, f"{error.sqnr_db:.2f}", f"{error.relative:.5f}"]
    assert total.split()[0] == "total"


@pytest.mark.parametrize("case", ["missing", "shape", "nan", "dense", "quantized"])
def test_what_cannot_be_compared(source, tmp_path, case, capsys):
    path = checkpoint.convert(source, tmp_path / "dst").path
    config = QWEN3 | {"missing": {"num_hidden_layers": 1}, "shape": {"intermediate_size": 64}}.get(case, {})
    tensors = dense_tensors(config)
    if case == "nan":
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = math.nan
    reference = write(tmp_path / "reference", config, tensors)
    given, kind, message = {
        "missing": ((path, reference), CheckpointError, r"reference: tensor model\.layers\.1\..*: is missing"),
        "shape": ((path, reference), CheckpointError, r"is BF16 \[64, 64\]; it must be floating \[(64, 96|96, 64)\]"),
        "nan": ((path, reference), CheckpointError, "down_proj.weight: or its quantized counterpart is not finite"),
        "dense": ((source, reference), ValueError, "source is not quantized"),
        "quantized": ((path, path), ValueError, "dst is quantized; the reference must be"),
    }[case]
    with pytest.raises(kind, match=message):
        checkpoint.errors(*given)
    assert main(["inspect", str(given[0]), "--error", str(given[1])]) == 2
    assert capsys.readouterr().err.count("\n") == 1
