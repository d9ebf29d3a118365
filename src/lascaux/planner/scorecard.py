"""How well the planner predicts what it has not seen: every row held out, hits and misses counted.

Three ways of holding out: the whole stack (nothing else of that code was seen), the shape of a
model on a known stack and generation of hardware (no row of the same model is seen), and for memory
likewise. The constants of the step are fitted anew each time without what is predicted.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from lascaux.planner.calibration import UNKNOWN, Residual, Row, Spread, fit
from lascaux.planner.fitted import (
    CPU_START,
    GPU_START,
    fit_memory,
    fitted,
    memory_residuals,
    time_rows,
)
from lascaux.planner.memory import worst_ledger
from lascaux.planner.runs import PublishedRun, published_runs
from lascaux.planner.search import FITS
from lascaux.planner.work import step_seconds

HALF, NINE_TENTHS = 0.7406970841372598, 2.1318467863266495
"""quantiles of Student's t with four degrees of freedom, two-sided 50 % and 90 %"""
SMALLER_DEVICES = (0.99, 0.95, 0.9, 0.8)
"""a run that was measured would not have fitted a device with this share of what it took"""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row: what was measured beside what was predicted without it."""

    name: str
    stack: str
    measured: float
    predicted: float
    scale: float
    """of ln(measured / predicted): of a t with four degrees of freedom"""

    @property
    def error(self) -> float:
        """ln(measured / predicted)."""
        return math.log(self.measured / self.predicted)

    def inside(self, quantile: float) -> bool:
        """Whether the interval holds the measurement."""
        return abs(self.error) <= quantile * self.scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Of one way of holding out."""

    title: str
    goal_factor: float
    predictions: tuple[Prediction, ...]

    @property
    def median_factor(self) -> float:
        """Half of the rows are predicted better than by this factor."""
        return math.exp(median(abs(each.error) for each in self.predictions))

    @property
    def median_percent(self) -> float:
        """Median of |measured / predicted - 1|, per cent."""
        return 100 * median(abs(math.expm1(each.error)) for each in self.predictions)

    @property
    def width(self) -> float:
        """The factor of the 90 % interval, up or down, in the middle of the rows."""
        return math.exp(NINE_TENTHS * median(each.scale for each in self.predictions))

    def coverage(self, quantile: float) -> float:
        """Share of rows inside their intervals."""
        return sum(each.inside(quantile) for each in self.predictions) / len(self.predictions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Statements about fitting."""

    ran: int
    """runs whose layout is stated and that ran"""
    ran_said_likely: int
    """of which the planner says that they fit with 50 % or more"""
    too_large: int
    """configurations that are known to run out of memory"""
    too_large_said_fits: int
    """of which it says that they fit with 98 %"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorecard:
    """Everything `lascaux plan scorecard` shows."""

    scores: tuple[Score, ...]
    fit: Fit


def score() -> Scorecard:
    """Predict every row without it; takes some twenty seconds."""
    rows = time_rows()
    on_gpu = [row for row in rows if row.generation != "cpu"]
    on_cpu = [row for row in rows if row.generation == "cpu"]
    memory = memory_residuals()
    return Scorecard(
        scores=(
            Score(
                title="step time, stack not seen",
                goal_factor=1.45,
                predictions=tuple(predict_stacks(on_gpu)),
            ),
            Score(
                title="step time, stack and generation known, model not seen",
                goal_factor=1.25,
                predictions=tuple(predict_shapes(on_gpu)),
            ),
            Score(
                title="step time of Lascaux on a processor, model not seen",
                goal_factor=1.25,
                predictions=tuple(predict_shapes(on_cpu, cpu=True)),
            ),
            Score(
                title="memory, model not seen",
                goal_factor=1.12,
                predictions=tuple(predict_memory(memory)),
            ),
        ),
        fit=score_fit(memory),
    )


def predict_stacks(rows: Sequence[Row]) -> list[Prediction]:
    """Each stack by all the others."""
    found = []
    for stack in sorted({row.stack for row in rows}):
        learned = fit([row for row in rows if row.stack != stack], GPU_START)
        for row in rows:
            if row.stack == stack:
                spread = learned.predict(UNKNOWN, row.generation)
                found.append(_predict(row, step_seconds(row.job, learned.constants).total, spread))
    return found


def predict_shapes(rows: Sequence[Row], cpu: bool = False) -> list[Prediction]:
    """Each model of a stack and generation by the other rows, where the stack has other models."""
    found = []
    for key in sorted({(row.stack, row.generation, row.shape) for row in rows}):
        rest = [row for row in rows if (row.stack, row.generation, row.shape) != key]
        if not any((row.stack, row.generation) == key[:2] for row in rest):
            continue
        learned = fit(rest, CPU_START if cpu else GPU_START)
        spread = learned.predict(key[0], key[1])
        for row in rows:
            if (row.stack, row.generation, row.shape) == key:
                found.append(_predict(row, step_seconds(row.job, learned.constants).total, spread))
    return found


def _predict(row: Row, seconds: float, spread: Spread) -> Prediction:
    predicted = seconds * math.exp(spread.mean)
    return Prediction(row.name, row.stack, row.seconds, predicted, spread.sd)


def predict_memory(residuals: Sequence[Residual]) -> list[Prediction]:
    """Each model by the rows of all others; bytes."""
    found = []
    for key in sorted({(each.stack, each.shape) for each in residuals}):
        rest = [each for each in residuals if (each.stack, each.shape) != key]
        learned = fit_memory(rest)
        for each in residuals:
            if (each.stack, each.shape) == key:
                spread = learned.predict(each.stack, each.generation)
                ledger = _ledger_total(each.name)
                measured = ledger * math.exp(each.value)
                predicted = ledger * math.exp(spread.mean)
                found.append(Prediction(each.name, each.stack, measured, predicted, spread.sd))
    return found


def _ledger_total(name: str) -> float:
    job = next(run for run in published_runs() if run.name == name).job
    assert job is not None
    return worst_ledger(job)[1].total


def score_fit(residuals: Sequence[Residual]) -> Fit:
    """What is said of configurations that ran, and of those that are known not to fit.

    Beside the published failures stands every measured run on a device a little smaller than what
    it took, predicted without its own model.
    """
    too_large = [
        probability_of_fit(run) for run in published_runs() if run.published.get("fits") is False
    ]
    for prediction in predict_memory(residuals):
        for share in SMALLER_DEVICES:
            room = math.log(share * prediction.measured / prediction.predicted)
            too_large.append(t4_cdf(room / prediction.scale))
    timed = {row.name for row in time_rows() if row.generation != "cpu"}
    ran = [
        probability_of_fit(run)
        for run in published_runs()
        if run.name in timed and {"microbatch_seqs", "zero"} <= set(run.row)
    ]
    return Fit(
        ran=len(ran),
        ran_said_likely=sum(each >= 0.5 for each in ran),
        too_large=len(too_large),
        too_large_said_fits=sum(each >= FITS for each in too_large),
    )


def probability_of_fit(run: PublishedRun) -> float:
    """What a plan of this run says."""
    job = run.job
    assert job is not None
    spread = fitted().memory_ratio(run.stack, job.device)
    room = math.log(job.device.memory_bytes / worst_ledger(job)[1].total)
    return t4_cdf((room - spread.mean) / spread.sd)


def t4_cdf(t: float) -> float:
    """Distribution function of Student's t with four degrees of freedom."""
    return 0.5 + 3 / 8 * t / math.sqrt(1 + t * t / 4) * (1 - t * t / (12 * (1 + t * t / 4)))


def describe_scorecard(card: Scorecard) -> str:
    """A table of the ways of holding out, then the rows that miss."""
    head = f"{'held out':<58}{'rows':>5}{'error':>7}{'goal':>7}{'50 %':>7}{'90 %':>7}{'width':>9}"
    lines = [head]
    for each in card.scores:
        lines.append(
            f"{each.title:<58}{len(each.predictions):>5}{each.median_factor:>7.2f}"
            f"{each.goal_factor:>7.2f}{100 * each.coverage(HALF):>5.0f} %"
            f"{100 * each.coverage(NINE_TENTHS):>5.0f} %{'x/÷':>5}{each.width:.2f}"
        )
    fit_ = card.fit
    lines += [
        "",
        "error: half of the rows are predicted better than by this factor. 50 %, 90 %: rows inside",
        "these intervals (wanted: 40 to 60, 85 to 95). width: of the 90 % interval, a factor.",
        "",
        f"of {fit_.ran} runs that ran {fit_.ran_said_likely} are said to fit with 50 % or more; of "
        f"{fit_.too_large} that cannot fit {fit_.too_large_said_fits} are said to fit with 98 %",
        "",
        "outside their 90 % interval:",
    ]
    for each in card.scores:
        for miss in each.predictions:
            if not miss.inside(NINE_TENTHS):
                lines.append(
                    f"  {miss.name} ({each.title.split(',')[0]}): measured / predicted "
                    f"{math.exp(miss.error):.2f}"
                )
    return "\n".join(lines)


def scorecard_figures(card: Scorecard) -> dict[str, Any]:
    """For --json, every row with its prediction."""
    return {
        "scores": [
            {
                "held_out": each.title,
                "rows": len(each.predictions),
                "median_error_factor": each.median_factor,
                "median_error_percent": each.median_percent,
                "goal_factor": each.goal_factor,
                "coverage_50": each.coverage(HALF),
                "coverage_90": each.coverage(NINE_TENTHS),
                "width_factor_90": each.width,
                "predictions": [asdict(row) for row in each.predictions],
            }
            for each in card.scores
        ],
        "fit": asdict(card.fit),
    }
