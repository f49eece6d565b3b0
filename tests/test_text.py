"""What an exception says fits into a line."""

import pytest

from envs.text import shortened


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("short", "short"),
        ("two\n  lines ", "two lines"),
        ("0123456789abcdefghij", "0123456789abcdefghij"),
        ("0123456789abcdefghijk", "01234567 … cdefghijk"),
    ],
)
def test_the_start_and_the_end_stay(text, line):
    assert shortened(text, 20) == line


def test_megabytes_are_cut_before_they_are_split(rng):
    text = "begin " + " ".join(map(str, rng.integers(10, size=1_000_000))) + " the reason"
    line = shortened(text, 100)
    assert len(line) == 100 and line.startswith("begin ") and line.endswith(" the reason") and " … " in line
