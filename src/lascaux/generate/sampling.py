"""From logits to the next token: penalties, temperature, filters, then a draw.

Penalties and biases change logits. Then top-k, top-p, min-p and typical-p, in this order: each sees
the distribution the one before it left, renormalised. Among equally likely tokens the lower id
counts as likelier. A draw depends on the seed, the number of the answer and how many tokens came
before, on nothing else: no global state, no generator's history. All in fp64 on the CPU, so that a
seed means the same on every device.
Sources: top-k, Fan et al. 2018; top-p, Holtzman et al. 2020; min-p, Nguyen et al. 2024; typical-p,
Meister et al. 2023; repetition penalty, Keskar et al. 2019.
Shape: V ids that may be drawn; rows of a padded vocabulary are cut off before.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lascaux.config.serve_schema import GenerateConfig
from lascaux.errors import LascauxError, RequestError
from lascaux.generate.request import Sampling

Row = NDArray[np.floating]
FIRST_CANDIDATES = 64
"""likeliest tokens that top-p sorts first; four times as many while they do not reach it"""


def sampling_of(settings: GenerateConfig) -> Sampling:
    """How the settings of a run draw."""
    return Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
        stop=settings.stop,
    )


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Hold every field against its range.

    Raises: RequestError with the field, the value and the range that is allowed.
    """
    s, finite = sampling, math.isfinite
    rules = [
        ("max_tokens", s.max_tokens is None or s.max_tokens >= 0, "0 or above"),
        ("min_tokens", s.min_tokens >= 0, "0 or above"),
        ("temperature", 0 <= s.temperature < math.inf, "0 or above, and finite"),
        ("top_k", s.top_k >= 0, "0 (all tokens) or above"),
        ("top_p", 0 <= s.top_p <= 1, "between 0 and 1"),
        ("min_p", 0 <= s.min_p < 1, "at least 0 and below 1"),
        ("typical_p", 0 < s.typical_p <= 1, "above 0 and at most 1"),
        ("presence_penalty", finite(s.presence_penalty), "finite"),
        ("frequency_penalty", finite(s.frequency_penalty), "finite"),
        ("repetition_penalty", 0.01 <= s.repetition_penalty <= 100, "from 0.01 to 100"),
        ("logit_bias", all(map(finite, s.logit_bias.values())), "numbers that are finite"),
        ("seed", s.seed >= 0, "0 or above"),
        ("stop", all(s.stop), "strings that are not empty"),
    ]
    for field, fits, wanted in rules:
        if not fits:
            value = getattr(s, field)
            shown = list(value) if isinstance(value, tuple) else value
            raise RequestError(f"'{field}' must be {wanted}; got {shown}")
    for field, ids in (("logit_bias", s.logit_bias), ("stop_token_ids", s.stop_token_ids)):
        for token in ids:
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"'{field}' has token id {token}; the model has ids from 0 to {vocab_size - 1}"
                )


def uniform(seed: int, choice: int, index: int) -> float:
    """A number from 0 up to 1 for token number `index`, counted from 0, of an answer."""
    digest = hashlib.sha256(f"lascaux token {seed} {choice} {index}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


class History:
    """What penalties go by: the ids of the prompt, and how often each was drawn."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt = frozenset(prompt)
        self.drawn: Counter[int] = Counter()

    def penalise(self, logits: Row, sampling: Sampling) -> Row:
        """The logits to draw from; the given ones stay as they are."""
        s = sampling
        if s.repetition_penalty == 1 and not (
            s.logit_bias or ((s.presence_penalty or s.frequency_penalty) and self.drawn)
        ):
            return logits
        logits = logits.astype(np.float64)
        with np.errstate(over="ignore"):
            self._penalise(logits, s)
        return logits

    def _penalise(self, logits: NDArray[np.float64], s: Sampling) -> None:
        if s.repetition_penalty != 1:
            seen = np.fromiter(self.prompt | self.drawn.keys(), dtype=np.int64)
            seen = seen[seen < len(logits)]
            values = logits[seen]
            logits[seen] = np.where(
                values > 0, values / s.repetition_penalty, values * s.repetition_penalty
            )
        if self.drawn:
            ids = np.fromiter(self.drawn.keys(), dtype=np.int64)
            counts = np.fromiter(self.drawn.values(), dtype=np.float64)
            logits[ids] -= s.presence_penalty + s.frequency_penalty * counts
        for token, bias in s.logit_bias.items():
            logits[token] += bias


def check_finite(values: NDArray[np.floating]) -> None:
    """Raise LascauxError for what a model should never compute: NaN, or beyond all numbers."""
    largest = float(values.max())
    if not math.isfinite(largest):
        raise LascauxError(
            f"the model computes {largest}: its weights are damaged or overflow in this precision; "
            "check them with `lascaux verify`, or use --generate.weights=fp32"
        )


def draw(logits: Row, sampling: Sampling, index: int) -> int:
    """One id; temperature 0 takes the likeliest. `logits` V; `index`: tokens drawn before.

    Raises: LascauxError where no token is left.
    """
    if not math.isfinite(float(logits.max())):
        raise LascauxError(
            "penalties, biases and bans leave no token that may be drawn; ask for less of them"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    cumulative = filtered_probabilities(logits, sampling).cumsum()
    total = cumulative[-1]
    target = min(uniform(sampling.seed, sampling.choice, index) * total, np.nextafter(total, 0))
    return int(np.searchsorted(cumulative, target, side="right"))


def filtered_probabilities(logits: Row, sampling: Sampling) -> NDArray[np.float64]:
    """What `draw` draws from at a temperature above 0: probabilities V, 0 if left out."""
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        p = np.exp((wide - wide.max()) / sampling.temperature)
    p /= p.sum()
    if sampling.top_k > 0 and sampling.top_k < len(p):
        p = _only(p, likeliest(p, sampling.top_k))
    if sampling.top_p < 1:
        p = _only(p, _nucleus(p, sampling.top_p))
    if sampling.min_p > 0:
        p = _only(p, np.flatnonzero(p >= sampling.min_p * p.max()))
    if sampling.typical_p < 1:
        p = _only(p, _typical(p, sampling.typical_p))
    return p


def likeliest(values: Row, count: int) -> NDArray[np.int64]:
    """The ids of the `count` largest values, largest first, then by id."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    smallest = np.partition(values, len(values) - count)[len(values) - count]
    ids = np.flatnonzero(values >= smallest)
    return ids[np.argsort(-values[ids], kind="stable")][:count]


def log_normaliser(logits: Row) -> float:
    """ln Σ exp(logits): taken from a logit it leaves the log-probability, nats."""
    wide = logits.astype(np.float64)
    largest = wide.max()
    return float(largest + np.log(np.exp(wide - largest).sum()))


def _nucleus(p: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """The fewest likeliest ids that together have this mass, one at least."""
    count = FIRST_CANDIDATES
    while True:
        ids = likeliest(p, min(count, len(p)))
        reached = p[ids].cumsum()
        if reached[-1] >= mass or len(ids) == len(p):
            return ids[: int(np.searchsorted(reached, mass)) + 1]
        count *= 4


def _typical(p: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """The fewest ids of most usual information, the entropy, that together have this mass."""
    ids = np.flatnonzero(p > 0)
    information = -np.log(p[ids])
    distance = np.abs(information - (p[ids] * information).sum())
    ids = ids[np.argsort(distance, kind="stable")]
    return ids[: int(np.searchsorted(p[ids].cumsum(), mass)) + 1]


def _only(p: NDArray[np.float64], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Zero elsewhere, renormalised."""
    kept = np.zeros_like(p)
    kept[ids] = p[ids]
    return kept / kept.sum()
