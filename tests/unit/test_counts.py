"""Whole numbers as people write them on the command line."""

import argparse

import pytest

from lascaux.arguments import read_count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000", 1000),
        ("1_000", 1000),
        ("1,000,000", 10**6),
        ("1e12", 10**12),
        ("300B", 300 * 10**9),
        ("1.5T", 1_500_000_000_000),
        ("20k", 20_000),
        ("-8", -8),
    ],
)
def test_what_people_write(text: str, count: int) -> None:
    assert read_count(text) == count


@pytest.mark.parametrize("text", ["", "x", "1x", "1.5", "nan", "inf", "1e400", "B", "1 2 3 x"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no whole number"):
        read_count(text)
