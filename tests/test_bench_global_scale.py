"""The error of NVFP4 by its global scale: what is measured, and where it stays that of the max rule."""

import pytest
import torch

from adallm import bench, nvfp4, results
from adallm.bench import global_scale
from adallm.formats import NVFP4_RANGE


def test_it_is_listed():
    assert "global_scale" in bench.benchmarks()


def test_rows_are_errors_of_the_reference():
    matrices = [torch.randn(8, 64) for _ in range(3)]
    rows = {row["log2_factor"]: row for row in global_scale.measure_source("s", matrices, (-2, 0, 3, 30))}
    assert list(rows) == [-2, 0, 3, 30]
    for e, factor in ((0, 1.0), (-2, 0.25)):
        noise = signal = 0.0
        for w in matrices:
            g = float(w.abs().max()) / NVFP4_RANGE * factor
            noise += float((w - nvfp4.dequantize(nvfp4.quantize(w, global_scale=g))).double().square().sum())
            signal += float(w.double().square().sum())
        assert rows[e]["rel_sq_err"] == pytest.approx(noise / signal, rel=1e-5)
    # The max rule's own; powers of two above it change no mantissa; nothing is left far above.
    assert (rows[0]["vs_max"], rows[0]["blocks"], rows[0]["matrices"]) == (1.0, 1.0, 3)
    assert rows[3]["vs_max"] == pytest.approx(1, abs=1e-6)
    assert (rows[30]["rel_sq_err"], rows[30]["blocks"]) == (1.0, 0.0)
    assert rows[-2]["vs_max"] > 2
    assert rows[-2]["blocks"] < 1


def test_plateau():
    errors = {-2: 1.0, -1: 1.5, 0: 1.0, 1: 0.995, 2: 1.009, 3: 1.02, 4: 1.0}
    rows = [{"source": "s", "log2_factor": e, "vs_max": value} for e, value in errors.items()]
    assert global_scale.plateau(rows, "s") == (0, 2)
    assert global_scale.plateau(rows, "s", within=0.5) == (-2, 4)


def test_the_record_is_written(tmp_path, monkeypatch, capsys):
    row = {"source": "s", "log2_factor": 0, "matrices": 1, "rel_sq_err": 0.01, "vs_max": 1.0, "blocks": 1.0}
    monkeypatch.setattr(global_scale, "measure", lambda: [row, row | {"log2_factor": 1, "vs_max": 1.25}])
    assert global_scale.main(["--out", str(tmp_path)]) == 0
    assert "1.2500" in capsys.readouterr().out
    assert results.read(tmp_path / "global_scale" / "cpu.json")["rows"][0] == row
