"""What the planner learns from measured runs: constants of the step, habits of each stack, spreads.

ln(measured / predicted seconds) of a run is the sum of an effect of its stack on its kind of
hardware, an effect of the model's shape and what is left. The spreads of the three are estimated
from the rows and give the width of every interval; effects of stacks with few rows are drawn
towards the mean of all stacks (a random-effects model; Gelman and Hill 2007, chapter 12).
`scorecard.py` repeats the fit without the stack that it predicts.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean, median

from lascaux.planner.job import Job
from lascaux.planner.work import Constants, step_seconds

PRIOR_LN_SD = 0.35
"""how far a constant may go from what physics suggests before the fit has to pay for it"""
ROUNDS = 4
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Row:
    """A measured step: its stack, the generation of its hardware, the shape of its model."""

    name: str
    stack: str
    generation: str
    shape: tuple[int, ...]
    job: Job
    seconds: float


@dataclass(frozen=True, slots=True)
class Residual:
    """ln(measured / predicted) of a row."""

    name: str
    stack: str
    generation: str
    shape: tuple[int, ...]
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Middle and scale of ln(measured / predicted) for a run that was not seen.

    Its distribution is Student's t with four degrees of freedom: some runs miss by far.
    """

    mean: float
    sd: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The fitted parts of the model of seconds."""

    constants: Constants
    mean: float
    stack_sd: float
    shape_sd: float
    row_sd: float
    effects: dict[tuple[str, str], tuple[float, int]]
    """(stack, generation) -> mean of the means of its shapes, number of shapes"""

    def predict(self, stack: str, generation: str) -> Spread:
        """For another shape on this stack; on a stack or generation without rows by all of them."""
        inside = self.shape_sd**2 + self.row_sd**2
        known = self.effects.get((stack, generation))
        if known is None:
            elsewhere = [e for (name, _), e in self.effects.items() if name == stack]
            if not elsewhere or stack == UNKNOWN:
                return Spread(mean=self.mean, sd=math.sqrt(self.stack_sd**2 + inside))
            other = fmean(mean for mean, _ in elsewhere)
            mean = (self.mean + other) / 2
            return Spread(mean=mean, sd=math.sqrt(0.75 * self.stack_sd**2 + inside))
        mean, number = known
        noise = inside / number
        weight = self.stack_sd**2 / (self.stack_sd**2 + noise)
        return Spread(
            mean=weight * mean + (1 - weight) * self.mean,
            sd=math.sqrt(inside + weight * noise),
        )


def fit(rows: Sequence[Row], start: Constants) -> Calibration:
    """Constants, effects and spreads from measured steps."""
    constants = fit_constants(rows, start)
    return fit_effects(residuals_of(rows, constants), constants)


def fit_effects(residuals: Sequence[Residual], constants: Constants) -> Calibration:
    """Effects and spreads.

    Scales are mean absolute deviations, which is the scale of a t with four degrees of freedom.
    """
    kind_means: dict[tuple[str, str], tuple[float, int]] = {}
    of_rows: list[float] = []
    of_shapes: list[float] = []
    row_freedom = shape_freedom = 0
    for kind, shapes in _by_kind(residuals).items():
        means = [fmean(values) for values in shapes.values()]
        kind_means[kind] = fmean(means), len(means)
        for values in shapes.values():
            of_rows += [abs(value - median(values)) for value in values]
            row_freedom += len(values) - 1
        of_shapes += [abs(mean - median(means)) for mean in means]
        shape_freedom += len(means) - 1
    centre = [mean for mean, _ in kind_means.values()]
    number = len(centre)
    spread = sum(abs(each - median(centre)) for each in centre) / max(1, number - 1)
    return Calibration(
        constants=constants,
        mean=median(centre),
        stack_sd=spread * math.sqrt(1 + 1 / number),  # so few have an uncertain middle
        shape_sd=sum(of_shapes) / max(1, shape_freedom),
        row_sd=sum(of_rows) / max(1, row_freedom),
        effects=kind_means,
    )


def residuals_of(rows: Sequence[Row], constants: Constants) -> list[Residual]:
    """ln(measured / predicted seconds) of every row."""
    return [
        Residual(
            row.name,
            row.stack,
            row.generation,
            row.shape,
            math.log(row.seconds / step_seconds(row.job, constants).total),
        )
        for row in rows
    ]


def _by_kind(
    residuals: Sequence[Residual],
) -> dict[tuple[str, str], dict[tuple[int, ...], list[float]]]:
    """Values by stack and generation, and within those by shape."""
    found: dict[tuple[str, str], dict[tuple[int, ...], list[float]]] = {}
    for each in residuals:
        kind = found.setdefault((each.stack, each.generation), defaultdict(list))
        kind[each.shape].append(each.value)
    return found


def fit_constants(rows: Sequence[Row], start: Constants) -> Constants:
    """Constants that leave the least spread inside stacks, near what physics suggests.

    The level of a stack is its own, so only differences between its runs count; coordinate by
    coordinate, with steps that shrink.
    """
    best, least = start, _spread_inside(rows, start, start)
    for round_number in range(ROUNDS):
        step = 0.5 ** (round_number + 1)
        for field in fields(Constants):
            for factor in (math.exp(step), math.exp(-step)):
                value = getattr(best, field.name) * factor
                if field.name.endswith("_share") and value > 1:
                    continue
                changed = replace(best, **{field.name: value})
                spread = _spread_inside(rows, changed, start)
                if spread < least:
                    best, least = changed, spread
    return best


def _spread_inside(rows: Sequence[Row], constants: Constants, start: Constants) -> float:
    """Mean absolute residual inside stacks and a penalty for the way from the start."""
    total, number = 0.0, 0
    for shapes in _by_kind(residuals_of(rows, constants)).values():
        values = [value for each in shapes.values() for value in each]
        centre = sorted(values)[len(values) // 2]
        weight = 1 / math.sqrt(len(values))  # a long table of one source is not everything
        total += weight * sum(abs(value - centre) for value in values)
        number += 1
    away = sum(
        math.log(getattr(constants, f.name) / getattr(start, f.name)) ** 2
        for f in fields(Constants)
    )
    return total / number + 0.02 * away / PRIOR_LN_SD**2
