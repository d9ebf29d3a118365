"""The facts themselves: parameters to the last one, sources everywhere, and the fit to them."""

import math

import numpy as np
import pytest

from lascaux.errors import ConfigError
from lascaux.model.accounting import count_parameters, replicated_parameters
from lascaux.planner.calibration import Residual, fit_effects
from lascaux.planner.devices import device_rows, find_device
from lascaux.planner.facts import read_facts
from lascaux.planner.fitted import fit_all, fitted, to_toml
from lascaux.planner.machine import gpu_device
from lascaux.planner.money import price_row
from lascaux.planner.runs import find_run, published_runs
from lascaux.planner.scorecard import HALF, NINE_TENTHS, t4_cdf
from lascaux.planner.uncertainty import Draws, interval_of, shares_of_spread
from lascaux.planner.work import Constants

EXACT = [run.name for run in published_runs() if run.name.startswith("llm-foundry-")]


@pytest.mark.parametrize("name", EXACT)
def test_parameters_of_llm_foundry_to_the_last_one(name: str) -> None:
    """Its table prints every parameter: learned positions, biases everywhere, tied head."""
    run = find_run(name)
    assert run.job is not None
    assert count_parameters(run.job.config.model).total == run.row["parameters"]


def test_parameters_of_gpt_j_with_what_it_counts_eight_times() -> None:
    run = find_run("gpt-j-6b-run")
    assert run.job is not None
    model = run.job.config.model
    counted = count_parameters(model).total + 7 * replicated_parameters(model) + 8 * model.d_model
    assert abs(counted - run.row["parameters"]) <= 8 * model.d_model


@pytest.mark.parametrize(
    "name", [run.name for run in published_runs() if run.name.startswith("narayanan-2021-t")]
)
def test_parameters_of_the_megatron_tables_as_far_as_they_are_printed(name: str) -> None:
    run = find_run(name)
    assert run.job is not None
    total = count_parameters(run.job.config.model).total
    assert total == pytest.approx(run.row["parameters"], rel=0.03)


def test_tokens_are_steps_times_batch_wherever_both_are_printed() -> None:
    seen = 0
    for run in published_runs():
        row = run.row
        if {"tokens", "steps", "batch_tokens"} <= set(row):
            seen += 1
            assert row["steps"] * row["batch_tokens"] == pytest.approx(row["tokens"], rel=0.01)
    assert seen >= 6


def test_every_row_names_its_source() -> None:
    tables = [("devices", "device"), ("prices", "price"), ("runs", "run"), ("own_runs", "run")]
    for file, table in tables:
        for row in read_facts(file)[table]:
            assert len(row["source"]) > 10, row
    for table in ("server_price", "average_watts", "grid", "hours_between_failures"):
        for row in read_facts("costs")[table]:
            assert len(row["source"]) > 10, row


def test_devices_are_possible() -> None:
    for row in device_rows():
        device = find_device(row["id"].lower())
        for precision, rate in device.reached_flops_per_second.items():
            assert rate <= device.peak(precision)
        assert 1e9 < device.memory_bytes < 1e12
        assert device.network_bytes_per_second <= device.link_bytes_per_second


def test_an_unknown_device_is_answered_with_those_that_begin_alike() -> None:
    with pytest.raises(ConfigError, match="A100-80GB-SXM"):
        find_device("A100")
    with pytest.raises(ConfigError, match="did you mean 'H100-80GB-SXM'"):
        find_device("H-100-80GB-SMX")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB-SXM"),
        ("NVIDIA A100-SXM4-40GB, 40960 MiB", "A100-40GB-SXM"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB-PCIe"),
        ("NVIDIA H100 80GB HBM3, 81559 MiB", "H100-80GB-SXM"),
        ("NVIDIA H100 PCIe", "H100-80GB-PCIe"),
        ("NVIDIA H200, 143771 MiB", "H200-141GB-SXM"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA GeForce RTX 4090, 24564 MiB", "RTX-4090"),
    ],
)
def test_the_driver_s_name_finds_its_row(name: str, expected: str) -> None:
    assert gpu_device(name).id == expected


def test_a_year_before_the_first_price_is_refused() -> None:
    device = find_device("H100-80GB-SXM")
    row = price_row(device, 2024)
    assert row is not None and row["n"] == 21  # not the one offer of the same year
    with pytest.raises(ConfigError, match="before 2023"):
        price_row(device, 2019)


def test_the_fitted_table_is_the_fit() -> None:
    assert to_toml(fit_all()) == to_toml(fitted())


def test_effects_and_spreads_are_found_again_in_made_rows() -> None:
    """Forty stacks of ten shapes with three rows: spreads 0.3, 0.2 and 0.1 in ln."""
    draw = np.random.default_rng(0)
    rows = []
    for stack in range(40):
        effect = 0.1 + 0.3 * draw.standard_t(4)
        for shape in range(10):
            of_shape = effect + 0.2 * draw.standard_t(4)
            for row in range(3):
                value = of_shape + 0.1 * draw.standard_t(4)
                rows.append(Residual(f"{row}", f"s{stack}", "g", (shape,), value))
    found = fit_effects(rows, Constants())
    assert found.row_sd == pytest.approx(0.1, rel=0.1)
    assert found.shape_sd == pytest.approx(0.2, rel=0.15)
    assert found.stack_sd == pytest.approx(0.3, rel=0.3)
    assert found.mean == pytest.approx(0.1, abs=0.15)
    unknown, known = found.predict("unknown", "g"), found.predict("s3", "g")
    assert unknown.sd > known.sd > found.shape_sd
    of_stack = found.effects["s3", "g"][0]
    assert abs(known.mean - of_stack) < abs(found.mean - of_stack)


def test_draws_have_the_quantiles_they_are_said_to_have() -> None:
    draws = Draws(1)
    t = draws.student4("x")
    assert np.quantile(np.abs(t), 0.5) == pytest.approx(HALF, rel=5e-3)
    assert np.quantile(np.abs(t), 0.9) == pytest.approx(NINE_TENTHS, rel=5e-3)
    sample = np.random.default_rng(0).standard_t(4, 400_000)
    for value in (-3.0, -0.7, 0.4, 2.1):
        assert t4_cdf(value) == pytest.approx(float(np.mean(sample <= value)), abs=3e-3)
    ninety = interval_of(draws.lognormal90("y", 2.0, 8.0))
    assert (ninety.p5, ninety.p50, ninety.p95) == pytest.approx((2.0, 4.0, 8.0), rel=5e-3)


def test_factors_are_independent_seeded_and_told_apart() -> None:
    one, again, other = Draws(3), Draws(3), Draws(4)
    a, b = one.normal("a"), one.normal("b")
    assert np.array_equal(a, again.normal("a")) and not np.array_equal(a, other.normal("a"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    product = np.exp(2 * a + 1 * b)
    shares = shares_of_spread(product, one.factors)
    assert shares["a"] == pytest.approx(0.8, abs=0.05)
    assert math.fsum(shares.values()) == pytest.approx(1.0, abs=0.02)
