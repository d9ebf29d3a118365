"""The outcome of a study as a table."""

import math
from dataclasses import astuple

from lascaux.compare.outcome import Equivalent, ModelOutcome, Outcome
from lascaux.units import format_count, format_duration


def describe_outcome(outcome: Outcome, seeds: int, at_once: int) -> str:
    """One line for each model, then what the columns mean."""
    first = outcome.models[0]
    width = max(len(model.name) for model in outcome.models) + 2
    head = (
        f"{'':<{width}}{'parameters':>11}{'active':>9}{'FLOPs':>7}{'bits per byte':>17}"
        f"{'seconds':>9}   {'dense equivalent':<26}{'of its size':<13}{'of its work'}"
    )
    lines = [head.rstrip() if outcome.equivalents else head[: head.index("   dense")]]
    for model in outcome.models:
        lines.append(f"{model.name:<{width}}{_row(model, first, outcome)}".rstrip())
    return "\n".join([*lines, "", *_notes(outcome, seeds, at_once)])


def _row(model: ModelOutcome, first: ModelOutcome, outcome: Outcome) -> str:
    spread = float((max(model.final) - min(model.final)) / 2)
    row = (
        f"{format_count(model.parameters):>11}{format_count(model.active_parameters):>9}"
        f"{model.flops_per_token / first.flops_per_token:>6.2f}x"
        f"{f'{model.mean:.3f} ± {spread:.3f}':>17}"
        f"{model.final_seconds / first.final_seconds:>8.2f}x"
    )
    if model.name not in outcome.equivalents:
        return row
    equal = outcome.equivalents[model.name]
    size = equal.parameters.p50 / model.parameters
    work = equal.flops_per_token.p50 / model.flops_per_token
    return f"{row}   {describe_size(equal, outcome):<26}{f'{size:.2f}x':<13}{work:.2f}x"


def describe_size(equal: Equivalent, outcome: Outcome) -> str:
    """The equivalent's parameters with their interval; a sign where the ladder ends."""
    low, middle, high = (_beyond(size, outcome) for size in astuple(equal.parameters))
    return middle if math.isnan(equal.parameters.p5) else f"{middle} ({low} to {high})"


def _beyond(parameters: float, outcome: Outcome) -> str:
    """A size, with a sign if it is that of the smallest or the largest dense model."""
    smallest, largest = outcome.ladder[0].parameters, outcome.ladder[-1].parameters
    if math.isclose(parameters, smallest):
        return f"<{format_count(parameters)}"
    return f"{'>' if math.isclose(parameters, largest) else ''}{format_count(parameters)}"


def _notes(outcome: Outcome, seeds: int, at_once: int) -> list[str]:
    first = outcome.models[0]
    flops, tokens = first.flops_per_token, int(first.tokens[-1])
    notes = [
        f"{format_count(tokens)} tokens each, {seeds} {'seeds' if seeds > 1 else 'seed'}; bits per "
        "byte of the same held-out text, mean and half the range of the seeds",
        f"FLOPs: 6 N + 12 L d T for each token, beside {first.name}'s {format_count(flops)}; "
        f"seconds: beside {first.name}'s {format_duration(first.final_seconds)}, "
        f"{at_once} {'runs' if at_once > 1 else 'run'} at once",
    ]
    if outcome.equivalents:
        notes += [
            "dense equivalent: parameters of the dense model that reaches the same loss on the "
            "same tokens, with the range that holds",
            "nine draws of ten over the seeds; beside the mixture's own parameters and FLOPs. The "
            f"dense models are {', '.join(model.name for model in outcome.ladder)}",
        ]
    return notes
