"""Filters against a plain reference in Python floats, draws against their probabilities."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lascaux.config.schema import GenerateConfig
from lascaux.errors import LascauxError, RequestError
from lascaux.generate.sampling import (
    check_settings,
    filtered_probabilities,
    sample,
    token_generator,
)

CHI_SQUARE_999 = {2: 10.83, 3: 13.82, 4: 16.27, 5: 18.47, 6: 20.52}
"""99.9 % quantile of chi-square for each number of outcomes."""
TOLERANCE = 1e-12  # fp64 sums in another order


def reference(logits: list[float], config: GenerateConfig) -> list[float]:
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
    config = GenerateConfig(**({"temperature": 1.0} | fields))  # type: ignore[arg-type]
    return filtered_probabilities(torch.tensor([logits], dtype=torch.float64), config)[0].tolist()


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
    config = GenerateConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = filtered_probabilities(torch.tensor([logits], dtype=torch.float64), config)[0].tolist()
    wanted = reference(logits, config)
    assert [p > 0 for p in got] == [p > 0 for p in wanted]
    assert got == pytest.approx(wanted, abs=TOLERANCE)


def test_rows_of_a_batch_are_filtered_each_on_its_own() -> None:
    logits = torch.randn(5, 17, generator=torch.Generator().manual_seed(1))
    config = GenerateConfig(temperature=0.9, top_k=9, top_p=0.7, min_p=0.05)
    together = filtered_probabilities(logits, config)
    for row, alone in zip(together, logits, strict=True):
        assert torch.equal(row, filtered_probabilities(alone[None], config)[0])


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
    argmax = sample(
        torch.tensor([[0.0, 5.0, 5.0]]), GenerateConfig(temperature=0), torch.Generator()
    )
    assert argmax.tolist() == [1]


def test_min_p_is_a_share_of_the_likeliest_after_temperature() -> None:
    logits = [math.log(p) for p in (0.5, 0.26, 0.24)]
    assert probabilities(logits, min_p=0.5) == pytest.approx([0.5 / 0.76, 0.26 / 0.76, 0])
    assert probabilities(logits, min_p=0.5, temperature=4.0)[2] > 0


def test_temperature_towards_zero_is_the_likeliest() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    for temperature in (1e-3, 1e-30, 5e-324):
        config = GenerateConfig(temperature=temperature)
        assert torch.equal(sample(logits, config, token_generator(0, 0)), logits.argmax(-1))


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_draws_follow_the_probabilities(fields: dict[str, float]) -> None:
    logits = [2.0, 0.0, 1.0, -0.5, 1.5, 0.3]
    config = GenerateConfig(temperature=1.0, **fields)  # type: ignore[arg-type]
    expected = reference(logits, config)
    draws = 3000
    counts = [0] * len(logits)
    for index in range(draws):
        token = sample(torch.tensor([logits]), config, token_generator(17, index))
        counts[int(token)] += 1
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    drawn = [(count, draws * p) for count, p in zip(counts, expected, strict=True) if p > 0]
    distance = sum((count - mean) ** 2 / mean for count, mean in drawn)
    assert distance < CHI_SQUARE_999[len(drawn)]


def test_seeds_of_one_position_are_independent_draws() -> None:
    config = GenerateConfig(temperature=1.0)
    tokens = [int(sample(torch.zeros(1, 4), config, token_generator(s, 5))) for s in range(2000)]
    counts = [tokens.count(i) for i in range(4)]
    assert sum((count - 500) ** 2 / 500 for count in counts) < CHI_SQUARE_999[4]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(3))
    config = GenerateConfig(temperature=1.5)

    def draws(seed: int) -> list[int]:
        return [int(sample(logits, config, token_generator(seed, index))) for index in range(20)]

    first = draws(1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert draws(1) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert draws(2) != first
    assert draws(2**70) != first
    assert len(set(first)) > 1


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    config = GenerateConfig(temperature=1.0)
    drawn = {int(sample(logits, config, token_generator(0, index))) for index in range(200)}
    assert drawn == {1, 3}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    config = GenerateConfig(temperature=temperature)
    with pytest.raises(LascauxError, match="largest logit is (nan|inf).*lascaux verify"):
        sample(torch.tensor([[0.0, bad]]), config, token_generator(0, 0))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "'max_tokens' must be at least 1; got 0"),
        ("temperature", -0.1, "'temperature' must be 0 or above, and finite; got -0.1"),
        ("temperature", math.nan, "'temperature' must be 0 or above, and finite; got nan"),
        ("temperature", math.inf, "'temperature' must be 0 or above, and finite; got inf"),
        ("top_k", -1, "'top_k' must be 0 (all tokens) or above; got -1"),
        ("top_p", 1.01, "'top_p' must be between 0 and 1; got 1.01"),
        ("top_p", math.nan, "'top_p' must be between 0 and 1; got nan"),
        ("min_p", 1.0, "'min_p' must be at least 0 and below 1; got 1.0"),
        ("min_p", -1e-9, "'min_p' must be at least 0 and below 1; got -1e-09"),
        ("seed", -1, "'seed' must be 0 or above; got -1"),
        ("stop", ("a", ""), "'stop' must be strings that are not empty; got ['a', '']"),
    ],
)
def test_a_setting_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        check_settings(dataclasses.replace(GenerateConfig(), **{field: value}))  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_the_defaults_are_in_range() -> None:
    check_settings(GenerateConfig())
    check_settings(GenerateConfig(temperature=0, top_p=0, top_k=10**9, max_tokens=1))
