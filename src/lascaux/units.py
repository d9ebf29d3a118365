"""Numbers as people read them: bytes, counts, times, rates, each with its unit.

Everywhere else quantities are plain numbers in base units (bytes, tokens, seconds, FLOP/s); this is
the last step before print. Three digits that count, unless a function says otherwise.
"""

import math

KIB = 1024
MINUTE, HOUR, DAY = 60, 3600, 86400


def format_bytes(num_bytes: float) -> str:
    """Binary units: '512 B', '1.50 KiB', '23.4 MiB', '78.0 GiB'."""
    return _scaled(num_bytes, KIB, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_count(count: float) -> str:
    """Decimal units: '512', '12.3 k', '1.23 M', '6.05 B', '1.40 T'."""
    return _scaled(count, 1000, ("", "k", "M", "B", "T")).rstrip()


def format_flops_per_second(flops_per_second: float) -> str:
    """A rate of floating-point operations: '153 GFLOP/s', '1.23 TFLOP/s'."""
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    return _scaled(flops_per_second, 1000, tuple(f"{prefix}FLOP/s" for prefix in prefixes))


def format_rate(per_second: float, what: str) -> str:
    """Something per second: '8.42 tokens/s', '23,456 tokens/s', '1.23 M tokens/s'."""
    if abs(per_second) >= 1e6:
        return f"{format_count(per_second)} {what}/s"
    if abs(per_second) >= 1000:
        return f"{per_second:,.0f} {what}/s"
    return f"{_three_digits(per_second)} {what}/s"


def format_percent(fraction: float) -> str:
    """A fraction of 1 in percent with one decimal: '43.2 %'."""
    return f"{100 * fraction:.1f} %"


def format_duration(seconds: float) -> str:
    """The two largest units that count.

    '340 ms', '4.2 s', '51 s', '2 min 51 s', '3 h 04 min', '3 d 04 h', '12 d'; 'unknown' for what is
    not finite.
    """
    if not math.isfinite(seconds):
        return "unknown"
    if round(seconds, 3) < 1:
        return f"{1000 * seconds:.0f} ms"
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02} s"
    minutes = round(seconds / MINUTE)
    if minutes < 2 * DAY // MINUTE:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / HOUR)
    if hours < 10 * DAY // HOUR:
        return f"{hours // 24} d {hours % 24:02} h"
    return f"{round(seconds / DAY)} d"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """The value in the largest unit of which there is at least one after rounding."""
    power = 0
    while power < len(units) - 1 and abs(value) + 0.5 >= base:  # shown whole from 100 on
        value /= base
        power += 1
    if power == 0 and float(value).is_integer():
        return f"{value:.0f} {units[0]}"
    return f"{_three_digits(value)} {units[power]}"


def _three_digits(value: float) -> str:
    """At least three digits, the whole part in full: '1.23', '12.3', '123', '1,023'."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    magnitude = math.floor(math.log10(float(f"{abs(value):.3g}")))
    return f"{value:,.{min(max(2 - magnitude, 0), 2)}f}"
