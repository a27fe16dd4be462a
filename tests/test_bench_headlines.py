"""``bench/_headlines.py`` and ``adallm results``: a line for each record."""

import copy
import re

import pytest

from adallm import results
from adallm.bench import _headlines
from adallm.cli import main

RECORDS = _headlines.records([])


def test_every_record_is_there_once():
    files = {path.relative_to(results.default_root()) for path in results.default_root().glob("*/*.json")}
    assert len(RECORDS) == len(files) > 10
    assert {record["experiment"] for record in RECORDS} == {path.parts[0] for path in files}


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['experiment']}-{results.slug(r['provenance']['gpu'])}")
def test_every_record_has_a_headline_of_its_rows(record):
    said = _headlines.headline(record)
    assert re.search(r"\d", said)
    changed = copy.deepcopy(record)
    for row in changed["rows"]:
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = value * 2 + 1
            elif name == "spills" and value is not None:
                row[name] = value + 8
    changed["rows"] = changed["rows"] * (2 if record["experiment"] == "tune" else 1)
    assert _headlines.headline(changed) != said


def test_a_record_without_the_rows():
    record = {"experiment": "rules", "provenance": {}, "rows": []}
    assert _headlines.headline(record) == "-"
    assert _headlines.headline({**record, "experiment": "another"}) == "-"


def test_command(tmp_path, capsys):
    provenance = dict.fromkeys(results.PROVENANCE) | {"gpu": "NVIDIA L4", "date": "2026-01-02T03:04:05+00:00"}
    provenance |= {"commit": "0123456789abcdef", "dirty": True}
    rows = [{"model": "M", "s": 5.4, "rule": "mse", "device": "cuda"}]
    results.write("convert", rows, provenance=provenance, root=tmp_path)
    assert main(["results", "convert", "--root", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["convert", "L4", "2026-01-02", "012345678+", "1", *["M", "in", "5", "s", "(mse,", "cuda)"]]
    assert main(["results", "linear", "--root", str(tmp_path)]) == 2
    assert "no record of 'linear' in" in (error := capsys.readouterr().err)
    assert error.rstrip().endswith("there are: convert")
    assert main(["results"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(RECORDS)
