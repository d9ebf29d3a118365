"""Filters against a plain reference in Python floats, draws against their probabilities."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lascaux.config.schema import GenerateConfig
from lascaux.errors import LascauxError, RequestError
from lascaux.generate.request import Sampling
from lascaux.generate.sampling import (
    History,
    check_finite,
    check_sampling,
    draw,
    filtered_probabilities,
    likeliest,
    log_normaliser,
    sampling_of,
)

CHI_SQUARE_999 = {2: 10.83, 3: 13.82, 4: 16.27, 5: 18.47, 6: 20.52}
"""99.9 % quantile of chi-square for each number of outcomes."""
TOLERANCE = 1e-12  # fp64 sums in another order


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(logits: list[float], config: Sampling) -> list[float]:
    """Temperature, top-k, top-p, min-p over a plain list, one token at a time."""
    highest = max(logits)
    weights = {i: math.exp((x - highest) / config.temperature) for i, x in enumerate(logits)}
    order = sorted(weights, key=lambda i: (-weights[i], i))
    if config.top_k:
        order = order[: config.top_k]
    mass = math.fsum(weights[i] for i in order)
    if config.top_p < 1:
        kept, reached = [], 0.0
        for i in order:
            kept.append(i)
            reached += weights[i] / mass
            if reached >= config.top_p:
                break
        order = kept
    order = [i for i in order if weights[i] >= config.min_p * weights[order[0]]]
    mass = math.fsum(weights[i] for i in order)
    return [weights[i] / mass if i in order else 0.0 for i in range(len(logits))]


def probabilities(logits: list[float], **fields: float) -> list[float]:
    return filtered_probabilities(np.array(logits), Sampling(**fields)).tolist()  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 40),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 1000]),
    top_p=st.sampled_from([0.0, 0.05, 0.3, 0.61, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.21, 0.9]),
)
def test_filters_equal_the_reference(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    source = random.Random(seed)
    logits = [source.gauss(0, 2) for _ in range(size)]
    config = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = filtered_probabilities(np.array(logits), config).tolist()
    wanted = reference(logits, config)
    assert [p > 0 for p in got] == [p > 0 for p in wanted]
    assert got == pytest.approx(wanted, abs=TOLERANCE)


def test_typical_p_keeps_the_tokens_of_most_usual_information() -> None:
    p = [0.5, 0.2, 0.2, 0.05, 0.05]
    entropy = -sum(x * math.log(x) for x in p)
    order = sorted(range(5), key=lambda i: (abs(-math.log(p[i]) - entropy), i))
    assert order[:2] == [1, 2]
    got = probabilities([math.log(x) for x in p], typical_p=0.4)
    assert got == pytest.approx([0, 0.5, 0.5, 0, 0])
    assert probabilities([math.log(x) for x in p], typical_p=0.41)[0] > 0


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=30), count=st.integers(1, 40))
def test_the_likeliest_ids_come_in_order_and_ties_by_id(values: list[int], count: int) -> None:
    wanted = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert likeliest(np.array(values, dtype=np.float32), count).tolist() == wanted


def test_log_probabilities_sum_to_one() -> None:
    logits = normal(4, 5000) * 30
    assert np.exp(logits.astype(np.float64) - log_normaliser(logits)).sum() == pytest.approx(1)


def test_penalties_and_biases_change_the_logits_as_they_say() -> None:
    history = History([0, 1])
    history.drawn.update([1, 2, 2])
    logits = np.array([1.0, -1.0, 2.0, 3.0], dtype=np.float32)
    sampling = Sampling(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: -1.5}
    )
    got = history.penalise(logits, sampling).tolist()
    assert got == pytest.approx([0.5, -2.0 - 0.75, 1.0 - 1.0, 1.5])
    assert logits.tolist() == [1.0, -1.0, 2.0, 3.0]
    assert history.penalise(logits, Sampling()) is logits


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = [math.log(p) for p in (0.25, 0.5, 0.125, 0.125)]
    assert probabilities(logits, top_p=0.5) == pytest.approx([0, 1, 0, 0])
    assert probabilities(logits, top_p=0.51) == pytest.approx([1 / 3, 2 / 3, 0, 0])
    assert probabilities(logits, top_p=0.76) == pytest.approx([2 / 7, 4 / 7, 1 / 7, 0])


def test_the_likeliest_token_always_stays() -> None:
    for fields in ({"top_p": 0.0}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 0.999}):
        assert probabilities([0.0, 3.0, 1.0], **fields) == [0.0, 1.0, 0.0]
    assert probabilities([-4.0], top_p=0.3) == [1.0]


def test_ties_go_to_the_lower_id() -> None:
    assert probabilities([1.0] * 4, top_k=2) == [0.5, 0.5, 0.0, 0.0]
    assert probabilities([1.0] * 4, top_p=0.5) == [0.5, 0.5, 0.0, 0.0]
    assert probabilities([1.0] * 4, top_p=0.6) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert probabilities([1.0] * 4, min_p=0.9) == [0.25] * 4
    assert draw(np.array([0.0, 5.0, 5.0]), Sampling(temperature=0), 0) == 1


def test_min_p_is_a_share_of_the_likeliest_after_temperature() -> None:
    logits = [math.log(p) for p in (0.5, 0.26, 0.24)]
    assert probabilities(logits, min_p=0.5) == pytest.approx([0.5 / 0.76, 0.26 / 0.76, 0])
    assert probabilities(logits, min_p=0.5, temperature=4.0)[2] > 0


def test_temperature_towards_zero_is_the_likeliest() -> None:
    for logits in normal(2, 4, 50):
        for temperature in (1e-3, 1e-30, 5e-324):
            assert draw(logits, Sampling(temperature=temperature), 0) == logits.argmax()


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_draws_follow_the_probabilities(fields: dict[str, float]) -> None:
    logits = [2.0, 0.0, 1.0, -0.5, 1.5, 0.3]
    config = Sampling(seed=17, **fields)  # type: ignore[arg-type]
    expected = reference(logits, config)
    draws = 3000
    counts = [0] * len(logits)
    for index in range(draws):
        counts[draw(np.array(logits), config, index)] += 1
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    drawn = [(count, draws * p) for count, p in zip(counts, expected, strict=True) if p > 0]
    distance = sum((count - mean) ** 2 / mean for count, mean in drawn)
    assert distance < CHI_SQUARE_999[len(drawn)]


@pytest.mark.parametrize("varied", ["seed", "choice"])
def test_seeds_and_choices_of_one_position_are_independent_draws(varied: str) -> None:
    flat = np.zeros(4)
    tokens = [draw(flat, Sampling(**{varied: n}), 5) for n in range(2000)]  # type: ignore[arg-type]
    counts = [tokens.count(i) for i in range(4)]
    assert sum((count - 500) ** 2 / 500 for count in counts) < CHI_SQUARE_999[4]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = normal(3, 1000)

    def draws(seed: int) -> list[int]:
        return [draw(logits, Sampling(temperature=1.5, seed=seed), i) for i in range(20)]

    first = draws(1)
    np.random.seed(99)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    assert draws(1) == first
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]
    assert draws(2) != first
    assert draws(2**70) != first
    assert len(set(first)) > 1


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = np.array([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    drawn = {draw(logits, Sampling(), index) for index in range(200)}
    assert drawn == {1, 3}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(LascauxError, match="the model computes (nan|inf).*lascaux verify"):
        check_finite(np.array([0.0, bad]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_no_token_is_left_the_model_is_not_blamed(temperature: float) -> None:
    banned = np.array([-math.inf, -math.inf])
    with pytest.raises(LascauxError, match="leave no token that may be drawn"):
        draw(banned, Sampling(temperature=temperature), 0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", -1, "'max_tokens' must be 0 or above; got -1"),
        ("temperature", -0.1, "'temperature' must be 0 or above, and finite; got -0.1"),
        ("temperature", math.nan, "'temperature' must be 0 or above, and finite; got nan"),
        ("temperature", math.inf, "'temperature' must be 0 or above, and finite; got inf"),
        ("top_k", -1, "'top_k' must be 0 (all tokens) or above; got -1"),
        ("top_p", 1.01, "'top_p' must be between 0 and 1; got 1.01"),
        ("top_p", math.nan, "'top_p' must be between 0 and 1; got nan"),
        ("min_p", 1.0, "'min_p' must be at least 0 and below 1; got 1.0"),
        ("min_p", -1e-9, "'min_p' must be at least 0 and below 1; got -1e-09"),
        ("seed", -1, "'seed' must be 0 or above; got -1"),
        ("min_tokens", -1, "'min_tokens' must be 0 or above; got -1"),
        ("typical_p", 0.0, "'typical_p' must be above 0 and at most 1; got 0.0"),
        ("presence_penalty", math.inf, "'presence_penalty' must be finite; got inf"),
        ("frequency_penalty", math.nan, "'frequency_penalty' must be finite; got nan"),
        ("repetition_penalty", 0.0, "'repetition_penalty' must be from 0.01 to 100; got 0.0"),
        ("logit_bias", {1: math.nan}, "'logit_bias' must be numbers that are finite; got {1: nan}"),
        ("logit_bias", {9: 1.0}, "'logit_bias' has token id 9; the model has ids from 0 to 8"),
        (
            "stop_token_ids",
            (-1,),
            "'stop_token_ids' has token id -1; the model has ids from 0 to 8",
        ),
        ("stop", ("a", ""), "'stop' must be strings that are not empty; got ['a', '']"),
    ],
)
def test_a_setting_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        check_sampling(Sampling(**{field: value}), 9)  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_the_defaults_are_in_range() -> None:
    check_sampling(Sampling(), 9)
    check_sampling(sampling_of(GenerateConfig()), 9)
    check_sampling(Sampling(temperature=0, top_p=0, top_k=10**9, max_tokens=0), 9)
