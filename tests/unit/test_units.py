"""Numbers as people read them."""

import math

import pytest

from lascaux.units import (
    format_bytes,
    format_count,
    format_duration,
    format_flops_per_second,
    format_percent,
    format_rate,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (24_536_678, "23.4 MiB"),
        (1024**2 - 1, "1.00 MiB"),
        (78 * 1024**3, "78.0 GiB"),
        (1000 * 1024**3, "1,000 GiB"),
        (1.5 * 1024**4, "1.50 TiB"),
    ],
)
def test_bytes_are_binary(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (999_999, "1.00 M"),
        (1_230_000, "1.23 M"),
        (6_053_381_344, "6.05 B"),
        (1.4e12, "1.40 T"),
        (0.5, "0.50"),
        (math.inf, "inf T"),
        (math.nan, "nan"),
    ],
)
def test_counts_are_decimal(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.34, "340 ms"),
        (0.9996, "1.0 s"),
        (4.24, "4.2 s"),
        (9.96, "10 s"),
        (51, "51 s"),
        (59.6, "1 min 00 s"),
        (171, "2 min 51 s"),
        (3599.7, "1 h 00 min"),
        (3 * 3600 + 4 * 60, "3 h 04 min"),
        (47 * 3600, "47 h 00 min"),
        (76 * 3600, "3 d 04 h"),
        (12 * 86400, "12 d"),
        (math.inf, "unknown"),
    ],
)
def test_durations_have_the_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("per_second", "text"),
    [
        (0, "0 tokens/s"),
        (0.125, "0.12 tokens/s"),
        (8.424, "8.42 tokens/s"),
        (84.24, "84.2 tokens/s"),
        (999.96, "1,000 tokens/s"),
        (23_456.4, "23,456 tokens/s"),
        (1_234_567, "1.23 M tokens/s"),
    ],
)
def test_rates(per_second: float, text: str) -> None:
    assert format_rate(per_second, "tokens") == text


def test_percent_and_flops() -> None:
    assert format_percent(0.4321) == "43.2 %"
    assert format_percent(1) == "100.0 %"
    assert format_flops_per_second(153.2e9) == "153 GFLOP/s"
    assert format_flops_per_second(1.234e12) == "1.23 TFLOP/s"
    assert format_flops_per_second(999.9e9) == "1.00 TFLOP/s"
