"""Draws of what is not known, and the intervals that come of them.

Every uncertain input is a factor with a name. Factors are drawn once for a whole plan, so that what
hangs on the same factor moves together: in a draw where the run is slow it also fails more often,
takes more energy and costs more. Draws are Latin hypercube samples (McKay et al. 1979) of a given
seed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]
NUM_DRAWS = 4096
QUANTILES = (5, 25, 50, 75, 95)
Z90 = 1.6448536269514722
"""half the width of a normal's 90 % interval, in standard deviations"""


@dataclass(frozen=True, slots=True)
class Interval:
    """Quantiles of a quantity: p5 to p95 holds it nine times of ten, p25 to p75 half the times."""

    p5: float
    p25: float
    p50: float
    p75: float
    p95: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    def scaled(self, factor: float) -> "Interval":
        """The interval of a multiple."""
        return Interval(*(factor * value for value in asdict(self).values()))


def interval_of(samples: Samples) -> Interval:
    """The quantiles of draws."""
    return Interval(*(float(q) for q in np.percentile(samples, QUANTILES)))


class Draws:
    """Independent factors by name; asking again for a name gives the same draws."""

    def __init__(self, seed: int, num_draws: int = NUM_DRAWS) -> None:
        self.seed, self.num_draws = seed, num_draws
        self._normals: dict[str, Samples] = {}
        middles = (np.arange(num_draws) + 0.5) / num_draws
        self._quantiles = np.array([NormalDist().inv_cdf(float(p)) for p in middles])

    @property
    def factors(self) -> Mapping[str, Samples]:
        """Name -> standard normal draws, of every factor asked for so far."""
        return self._normals

    def normal(self, name: str) -> Samples:
        """Standard normal draws of a factor."""
        if name not in self._normals:
            generator = np.random.default_rng([self.seed, crc32(name.encode())])
            self._normals[name] = generator.permutation(self._quantiles)
        return self._normals[name]

    def student4(self, name: str) -> Samples:
        """Draws of Student's t with four degrees of freedom, of a factor.

        By its closed quantile function (Shaw 2006, section 2.2).
        """
        p = np.clip(normal_cdf(self.normal(name)), 1e-12, 1 - 1e-12)
        alpha = 4 * p * (1 - p)
        q = np.cos(np.arccos(np.sqrt(alpha)) / 3) / np.sqrt(alpha)
        return np.sign(p - 0.5) * 2 * np.sqrt(np.maximum(q - 1, 0))

    def lognormal(self, name: str, median: float, ln_sd: float) -> Samples:
        """Draws of a positive quantity with this median and spread of its logarithm."""
        return median * np.exp(ln_sd * self.normal(name))

    def lognormal90(self, name: str, low: float, high: float) -> Samples:
        """Draws of a positive quantity whose 90 % interval is low to high."""
        ln_sd = math.log(high / low) / (2 * Z90)
        return self.lognormal(name, math.sqrt(low * high), ln_sd)


def normal_cdf(z: Samples) -> Samples:
    """Distribution function of the standard normal."""
    return np.array([NormalDist().cdf(float(each)) for each in z])


def shares_of_spread(samples: Samples, factors: Mapping[str, Samples]) -> dict[str, float]:
    """Which share of the variance of a quantity's logarithm each factor explains, largest first.

    By the squared correlation with the factor, normalised to 1; factors are independent, so what is
    left out is only their interplay.
    """
    logs = np.log(np.maximum(samples, 1e-300))
    if logs.std() < 1e-9:
        return {}
    squares = {name: float(np.corrcoef(logs, drawn)[0, 1] ** 2) for name, drawn in factors.items()}
    total = sum(squares.values())
    found = {name: square / total for name, square in squares.items() if square / total >= 0.01}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))
