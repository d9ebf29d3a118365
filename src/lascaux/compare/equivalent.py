"""How large a dense model would have to be for the loss of a mixture, with an interval.

Dense models of several sizes, all trained on the same tokens, give loss against size; between two
neighbours the loss falls in a straight line over the logarithm of the size. The interval is that of
the seeds: every mean is drawn anew many times, with one spread for all models, and the question is
answered for each draw. It does not cover other text, other recipes or other sizes of everything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
LEVELS = (5, 50, 95)


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the range that holds nine draws of ten."""

    p5: float
    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class Scale:
    """Places between dense models, from 0 for the smallest to their number - 1 for the largest.

    A place beyond either end is unknown: the ends stand for "at most" and "at least".
    """

    values: tuple[float, ...]

    def at(self, place: float) -> float:
        """The size at a place, along the logarithm."""
        numbers = np.arange(len(self.values))
        return math.exp(float(np.interp(place, numbers, np.log(self.values))))


def pooled_spread(losses: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation between seeds, one for all models, and its degrees of freedom."""
    squares = sum(float(np.var(each)) * len(each) for each in losses)
    freedom = sum(len(each) - 1 for each in losses)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def equivalent_places(
    dense: Sequence[Sequence[float]], mixture: Sequence[float], spread: float, freedom: int
) -> Interval:
    """Where among the dense models, ordered by size, the loss of a mixture stands.

    `spread` and `freedom` are those of `pooled_spread`; without freedom, which one seed leaves, the
    ends are unknown.
    """
    means = np.array([float(np.mean(each)) for each in dense])
    middle = float(_places(means[None], np.array([np.mean(mixture)]))[0])
    if not freedom:
        return Interval(math.nan, middle, math.nan)
    draw = np.random.default_rng(0)
    sigmas = spread * np.sqrt(freedom / draw.chisquare(freedom, DRAWS))
    errors = sigmas[:, None] / np.sqrt([len(each) for each in dense])
    ladders = means + errors * draw.standard_normal((DRAWS, len(dense)))
    own = float(np.mean(mixture)) + sigmas / math.sqrt(len(mixture)) * draw.standard_normal(DRAWS)
    low, _, high = np.percentile(_places(ladders, own), LEVELS)
    return Interval(float(low), middle, float(high))


def _places(ladders: NDArray[np.floating], losses: NDArray[np.floating]) -> NDArray[np.float64]:
    """The first place at which each ladder (draws x models) comes down to its loss."""
    last = ladders.shape[1] - 1
    places = np.full(len(ladders), float(last))
    for i in reversed(range(last)):
        above, below = ladders[:, i], ladders[:, i + 1]
        crosses = (above > losses) & (below <= losses)
        with np.errstate(divide="ignore", invalid="ignore"):
            part = (above - losses) / (above - below)
        places = np.where(crosses, i + part, places)
    return np.where(ladders[:, 0] <= losses, 0.0, places)
