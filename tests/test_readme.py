"""``README.md``: its commands, its paths and its numbers."""

import re
from pathlib import Path

from adallm import evaluate, results

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
