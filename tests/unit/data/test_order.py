"""The order of samples: bijective, shuffled, in proportion, and a function of the seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lascaux.data.order import check_weights, derive_key, mixture_schedule, permute
from lascaux.errors import ConfigError


def test_permute_is_a_bijection_for_every_size_to_2000():
    for size in range(1, 2001):
        images = permute(np.arange(size), size, derive_key(size, 7))
        assert np.array_equal(np.sort(images), np.arange(size)), size


def test_permute_one_index_equals_permuting_all():
    images = permute(np.arange(1001), 1001, 5)
    assert [int(permute(np.array([i]), 1001, 5)[0]) for i in range(1001)] == images.tolist()


def test_permute_takes_large_sizes():
    size = 2**61 + 12345
    images = permute(np.array([0, 1, size - 1]), size, 3)
    assert len(set(images.tolist())) == 3
    assert images.min() >= 0 and images.max() < size


def test_different_keys_give_different_orders():
    orders = {tuple(permute(np.arange(50), 50, derive_key(seed, 0, 0))) for seed in range(100)}
    assert len(orders) == 100


@pytest.mark.parametrize("seed", range(5))
def test_shuffle_passes_chi_square_and_lag_one_within_four_sigma(seed: int):
    size, cells = 200_000, 64
    images = permute(np.arange(size), size, derive_key(seed, 0, 0))
    row, column = np.arange(size) * cells // size, images * cells // size
    counts = np.bincount(row * cells + column, minlength=cells * cells)
    expected = size / cells**2
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = (cells - 1) ** 2
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    centred = images - images.mean()
    lag_one = float((centred[:-1] * centred[1:]).sum() / (centred**2).sum())
    assert abs(lag_one) < 4 / size**0.5


weight_lists = st.lists(st.floats(0.1, 100), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(weight_lists)
def test_mixture_stays_within_one_sample_of_its_shares(weights: list[float]):
    schedule = mixture_schedule(weights)
    period = len(schedule.pattern)
    steps = np.arange(1, period + 1)
    for source, count in enumerate(schedule.counts):
        taken = np.cumsum(schedule.pattern == source)
        assert np.abs(taken - steps * count / period).max() <= 1
        assert abs(count / period - weights[source] / sum(weights)) <= 1e-4 + 1e-9


@settings(max_examples=40, deadline=None)
@given(weight_lists, st.integers(0, 10**12))
def test_mixture_numbers_the_samples_of_each_source_without_gap(weights: list[float], start: int):
    schedule = mixture_schedule(weights)
    length = len(schedule.pattern) + 3
    source, running = schedule.locate(np.arange(start, start + length))
    for number in range(len(weights)):
        mine = running[source == number]
        assert np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)))


def test_simple_shares_are_met_exactly():
    assert mixture_schedule([0.7, 0.3]).counts.tolist() == [7, 3]
    assert mixture_schedule([2, 1, 1]).counts.tolist() == [2, 1, 1]
    source, running = mixture_schedule([5.0]).locate(np.arange(4))
    assert source.tolist() == [0, 0, 0, 0] and running.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_must_be_positive_and_finite(weights: list[float]):
    with pytest.raises(ConfigError, match=r"'data.sources\[0\].weight' must be above 0"):
        mixture_schedule(weights)


def test_a_weight_that_rounds_to_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"sources\[1\].weight' 1e-07 is less than 1/10000"):
        mixture_schedule([1.0, 1e-7])


def test_weights_are_set_for_all_sources_or_for_none():
    assert check_weights([None, None]) is None
    assert check_weights([1.0, 2.0]) == (1.0, 2.0)
    with pytest.raises(ConfigError, match=r"'data.sources\[1\].weight' is not set but other"):
        check_weights([1.0, None])
