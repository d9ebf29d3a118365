"""What `lascaux bench` found, as a person reads it."""

from lascaux.bench.generation import GenerationSpeed
from lascaux.bench.peaks import Peaks
from lascaux.bench.training import TrainingSpeed
from lascaux.units import (
    format_bytes,
    format_count,
    format_duration,
    format_flops_per_second,
    format_percent,
    format_rate,
)


def describe_training(speed: TrainingSpeed) -> str:
    """The step, its fraction of the peak and its parts."""
    lines = [
        *describe_peaks(speed.peaks),
        f"model      {format_count(speed.parameters)} parameters, {speed.batch_tokens:,} tokens a "
        f"step, {speed.precision}",
        f"step       {format_duration(speed.median_step_seconds)} "
        f"({describe_range(speed.step_seconds)}; "
        f"the first {format_duration(speed.first_step_seconds)})",
        f"speed      {format_rate(speed.tokens_per_second, 'tokens')}, "
        f"MFU {format_percent(speed.mfu)} of the {speed.precision} peak measured beside each step "
        "(6N + 12LdT FLOPs per token)",
        f"memory     {format_bytes(speed.peak_memory_bytes)} at most",
    ]
    for name, seconds in speed.part_seconds.items():
        share = format_percent(seconds / speed.median_step_seconds)
        lines.append(f"  {name:<9}{format_duration(seconds):>8}  {share:>7}")
    return "\n".join(lines)


def describe_generation(speed: GenerationSpeed) -> str:
    """Prompt and new tokens, and the fraction of the bandwidth."""
    rates = speed.decode_tokens_per_second
    many, one = speed.median_streams_tokens_per_second, speed.median_decode_tokens_per_second
    how = "compiled for this processor" if speed.compiled else "by torch"
    lines = [
        *describe_peaks(speed.peaks),
        f"reading    {format_bytes(speed.peaks.read_bytes_per_second)}/s (sum)",
        f"model      {format_count(speed.parameters)} parameters, {speed.precision}, {how}",
        f"prompt     {speed.prompt_tokens:,} tokens at "
        f"{format_rate(speed.prompt_tokens_per_second, 'tokens')}",
        f"decode     {format_rate(one, 'tokens')} ({min(rates):,.1f} to {max(rates):,.1f} in "
        f"{len(rates)} rounds)",
        f"           {format_bytes(speed.bytes_per_token)} read for each: "
        f"{format_percent(speed.fraction_of_bandwidth)} of what a sum reads",
        f"{speed.streams} at once  {format_rate(many, 'tokens')} together, {many / one:.1f} times",
    ]
    return "\n".join(lines)


def describe_peaks(peaks: Peaks) -> list[str]:
    """The machine's own limits, as measured between the rounds."""
    products = " · ".join(
        f"{precision} {format_flops_per_second(flops)}"
        for precision, flops in peaks.matmul_flops_per_second.items()
    )
    bandwidth = format_bytes(peaks.bandwidth_bytes_per_second)
    return [
        f"products   {products} (best square matrix product)",
        f"bandwidth  {bandwidth}/s (copy, read and written)",
    ]


def describe_range(seconds: list[float]) -> str:
    """Spread of the counted rounds."""
    low, high = format_duration(min(seconds)), format_duration(max(seconds))
    return f"{low} to {high} in {len(seconds)} rounds"
