"""Which sequence is sample number i: a pure function of the seed and i, with nothing to store.

A keyed Feistel network with cycle walking gives the order inside an epoch (Luby & Rackoff 1988;
Black & Rogaway 2002, method 3). Mixtures follow a periodic pattern of least discrepancy
(Tijdeman 1980, "The chairman assignment problem"). Reading tokens is left to `loader.py`.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from lascaux.errors import ConfigError

IntArray = NDArray[np.int64]

NUM_ROUNDS = 8
MAX_PERIOD = 10_000


def derive_key(*parts: int) -> int:
    """A 64-bit key from whole numbers, for example (seed, epoch, source)."""
    text = ",".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: IntArray, size: int, key: int) -> IntArray:
    """Where each index goes under the permutation of range(size) that the key selects.

    A bijection for every size from 1 to 2**62. Costs O(1) for each index.
    """
    assert size >= 1, size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(derive_key(key, number)) for number in range(NUM_ROUNDS)]
    place = np.asarray(index, dtype=np.int64).ravel().astype(np.uint64)
    assert place.size == 0 or int(place.max()) < size, "index outside the permutation"
    place = _feistel(place, half_bits, round_keys)
    # The network permutes a power of four; walking on until the value fits permutes range(size).
    outside = np.flatnonzero(place >= size)
    while outside.size:
        place[outside] = _feistel(place[outside], half_bits, round_keys)
        outside = outside[place[outside] >= size]
    return place.astype(np.int64).reshape(np.shape(index))


def _feistel(
    value: NDArray[np.uint64], half_bits: int, round_keys: Sequence[np.uint64]
) -> NDArray[np.uint64]:
    width = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = value >> width, value & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << width) | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014); products wrap at 2**64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class MixtureSchedule:
    """A periodic pattern of sources: after any number of samples each has its share to within one.

    `pattern[r]` is the source of sample r of a period, `rank[r]` how often that source came before
    it in the period, `counts[s]` how often source s comes in a whole period.
    """

    pattern: IntArray
    rank: IntArray
    counts: IntArray

    def locate(self, sample: IntArray) -> tuple[IntArray, IntArray]:
        """The source of each global sample, and its running number within that source."""
        period, place = np.divmod(sample, len(self.pattern))
        source = self.pattern[place]
        return source, period * self.counts[source] + self.rank[place]


def mixture_schedule(weights: Sequence[float]) -> MixtureSchedule:
    """The fixed order in which sources take turns, from weights that need not sum to one.

    Shares that are fractions with a common denominator up to 10,000 are met exactly, others to
    within 1/10,000.

    Raises: ConfigError for a weight that is not positive and finite, or that rounds to nothing.
    """
    counts = _period_counts(weights)
    period, num_sources = sum(counts), len(counts)
    if num_sources == 1:
        return MixtureSchedule(*(np.array([x], dtype=np.int64) for x in (0, 0, 1)))
    slack = 2 * num_sources - 2
    taken = [0] * num_sources
    pattern, rank = [], []
    for step in range(1, period + 1):
        due = [slack * (count * step - period * n) for count, n in zip(counts, taken, strict=True)]
        waiting = [
            ((period * (slack - 1) - due[s]) / counts[s], s)
            for s in range(num_sources)
            if due[s] >= period
        ]
        source = min(waiting)[1]
        pattern.append(source)
        rank.append(taken[source])
        taken[source] += 1
    assert taken == counts, "a period must contain every source its full number of times"
    as_array = [np.array(values, dtype=np.int64) for values in (pattern, rank, counts)]
    return MixtureSchedule(*as_array)


def _period_counts(weights: Sequence[float]) -> list[int]:
    """Turns of each source in the shortest period that meets the shares, at most 10,000 in all."""
    for number, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"'data.sources[{number}].weight' must be above 0 and finite; got {weight!r}"
            )
    exact = [Fraction(weight).limit_denominator(10**12) for weight in weights]
    total = sum(exact)
    if total == 0:
        raise ConfigError(f"'data.sources' weights are too small to compare; got {list(weights)}")
    shares = [weight / total for weight in exact]
    period = min(math.lcm(*(share.denominator for share in shares)), MAX_PERIOD)
    floors = [int(share * period) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: floors[s] - shares[s] * period)
    for source in by_remainder[: period - sum(floors)]:
        floors[source] += 1
    for number, count in enumerate(floors):
        if count == 0:
            raise ConfigError(
                f"'data.sources[{number}].weight' {weights[number]!r} is less than 1/{period} of "
                f"the sum of all weights; raise it or drop the source"
            )
    return floors


def check_weights(weights: Sequence[float | None]) -> tuple[float, ...] | None:
    """All weights, or None when none is set.

    Raises: ConfigError when some are set and some are not.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        missing = weights.index(None)
        raise ConfigError(
            f"'data.sources[{missing}].weight' is not set but other sources have a weight; "
            f"set it for all sources or for none"
        )
    return tuple(given)
