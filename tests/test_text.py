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
