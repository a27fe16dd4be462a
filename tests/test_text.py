"""``text.py``: aligned tables."""

import pytest

from adallm import text


def test_terminal_and_markdown():
    rows = [("a", "1.5"), ("bbb", "10")]
    assert text.table(("x", "number"), rows, align="lr").splitlines() == [
        "x    number",
        "a       1.5",
        "bbb      10",
    ]
    assert text.table(("x", "number"), rows, align="lr", markdown=True).splitlines() == [
        "| x   | number |",
        "| --- | -----: |",
        "| a   |    1.5 |",
        "| bbb |     10 |",
    ]


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="2 columns"):
        text.table(("x", "y"), [("a",)], align="ll")


def test_a_minimum_is_not_rounded_up():
    assert [text.rounded_down(x) for x in (0.9973, 1.0, 1.2599, 0.25)] == ["0.99", "1.00", "1.25", "0.25"]
