"""``results.py``: what a record must hold."""

import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from adallm import results


def test_a_record_comes_back_as_it_was_written(tmp_path):
    provenance = results.provenance(seed=7)
    path = results.write("speed", [{"us": 1.5, "impl": "x"}], provenance=provenance, root=tmp_path, note="n")
    assert path == tmp_path / "speed" / "cpu.json" or provenance["gpu"]
    record = results.read(path)
    assert record["rows"] == [{"us": 1.5, "impl": "x"}]
    assert record["note"] == "n"
    assert record["provenance"] == provenance
    assert provenance["seed"] == 7
    assert results.read_all("speed", root=tmp_path) == {path.stem: record}
    assert results.read_all("none", root=tmp_path) == {}
    rows = [{"i": i, "s": 'a "b"'} for i in range(3)]
    text = results.write("rows", rows, provenance=provenance, root=tmp_path).read_text()
    # A line for each row.
    assert [json.loads(line.rstrip(",")) for line in text.splitlines()[-5:-2]] == rows
    assert json.loads(text)["rows"] == rows


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        (None, "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_slug(name, slug):
    assert results.slug(name) == slug


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"a": [1]}], "row 0 field 'a' is list"),
        ([{"a": 1}, {"b": {}}], "row 1 field 'b' is dict"),
        ([{"a": math.nan}], "not JSON compliant"),
        ([{"a": math.inf}], "not JSON compliant"),
    ],
)
def test_bad_rows_leave_the_old_record(tmp_path, rows, message):
    provenance = results.provenance()
    path = results.write("e", [{"a": 1}], provenance=provenance, root=tmp_path)
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        results.write("e", rows, provenance=provenance, root=tmp_path)
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_provenance_must_be_whole(tmp_path):
    with pytest.raises(ValueError, match=r"lacks .*'commit'"):
        results.write("e", [{"a": 1}], provenance={"command": "x"}, root=tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"experiment": "x", "rows": []}', "{"])
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        results.read(path)


def test_the_command_names_no_absolute_path(tmp_path):
    script = tmp_path / "measure.py"
    script.write_text("from adallm import results; print(results.provenance()['command'])")
    done = subprocess.run([sys.executable, str(script), "/a/b/out"], capture_output=True, text=True, check=True)
    assert "/" not in done.stdout
    assert "measure.py out" in done.stdout


def test_a_copy_without_git_takes_the_commit_from_the_environment(monkeypatch):
    monkeypatch.setattr(results, "_run", lambda *_: None)
    monkeypatch.setenv("ADALLM_COMMIT", "abc-dirty")
    provenance = results.provenance()
    assert (provenance["commit"], provenance["dirty"]) == ("abc", True)


def test_results_go_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ADALLM_RESULTS", str(tmp_path / "here"))
    assert results.default_root() == tmp_path / "here"
    monkeypatch.delenv("ADALLM_RESULTS")
    assert results.default_root().name == "results"


def test_find_gives_the_only_row_with_these_fields():
    record = {"experiment": "e", "rows": [{"a": 1, "b": 2}, {"a": 1, "b": 3}]}
    assert results.find(record, b=3) == {"a": 1, "b": 3}
    for fields, count in (({"a": 1}, 2), ({"a": 2}, 0), ({"c": 0}, 0)):
        with pytest.raises(ValueError, match=f"^{count} rows of record 'e'"):
            results.find(record, **fields)


def test_environment_names_versions_and_hardware_and_nothing_else():
    lines = results.environment().splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["AdaLLM", "torch"]
    assert platform.python_version() in lines[0]
    assert "CPU cores" in lines[2]
    assert "GPU: " in lines[2]
    assert not any(word in results.environment() for word in (platform.node(), str(Path.home())) if len(word) > 3)


def test_every_committed_record_can_be_read():
    records = sorted(results.default_root().glob("*/*.json"))
    assert records
    for path in records:
        record = results.read(path)
        assert record["experiment"] == path.parent.name
        assert set(results.PROVENANCE) <= record["provenance"].keys()
        assert record["provenance"]["commit"]
        assert json.dumps(record, allow_nan=False)
