"""The drawings: what they show of the numbers, and that they can stand in any page."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from lascaux.report.plots import INK, MOST_POINTS, draw_plots, smooth, superscript


def metrics(num_steps: int, validate_every: int = 10) -> list[dict[str, float]]:
    records = []
    for step in range(1, num_steps + 1):
        record = {
            "step": step,
            "tokens_seen": step * 8192,
            "loss": 2 + 6 / step,
            "lr": 6e-4 * step / num_steps,
            "grad_norm": 1 + 1 / step,
            "tokens_per_second": 16_000 + step % 7,
            "mfu": 0.4,
            "seconds": 0.5,
        }
        if step % validate_every == 0:
            record |= {"valid_loss": 2.1 + 6 / step, "bits_per_byte": 1 + 2 / step}
        records.append(record)
    return records


def test_every_curve_is_drawn_once() -> None:
    titles = [plot.title for plot in draw_plots(metrics(40))]
    assert titles == [
        "Loss",
        "Learning rate",
        "Bits per byte",
        "Bits per byte over time",
        "Gradient norm",
        "Tokens per second",
        "MFU",
    ]
    without = [plot.title for plot in draw_plots(metrics(5))]
    assert without == [title for title in titles if "Bits" not in title]


@pytest.mark.parametrize("num_steps", [1, 2, 40])
def test_drawings_take_the_colours_of_the_page_and_share_no_ids(num_steps: int) -> None:
    plots = draw_plots(metrics(num_steps))
    ids = [id_ for plot in plots for id_ in re.findall(r'\bid="([^"]+)"', plot.svg)]
    assert len(ids) == len(set(ids))
    for plot in plots:
        root = ElementTree.fromstring(plot.svg.replace("<svg ", '<svg xmlns="x" ', 1))
        assert root.get("viewBox") == "0 0 338.4 198"
        assert root.get("width") is None
        assert INK not in plot.svg
        assert "currentColor" in plot.svg
        assert "#ffffff" not in plot.svg


def test_the_same_numbers_give_the_same_drawing() -> None:
    assert draw_plots(metrics(20)) == draw_plots(metrics(20))


def test_a_step_without_a_finite_number_is_a_gap() -> None:
    records = metrics(40)
    records[7]["grad_norm"] = float("inf")
    records[9]["loss"] = float("nan")
    for plot in draw_plots(records):
        assert "nan" not in plot.svg
        assert "inf" not in plot.svg


def test_a_long_run_does_not_make_a_large_page() -> None:
    plots = draw_plots(metrics(10 * MOST_POINTS, validate_every=10**9))
    assert all(len(plot.svg) < 120_000 for plot in plots)


def test_smoothing_is_the_mean_around_each_step() -> None:
    values = np.random.default_rng(0).normal(size=400)
    smoothed = smooth(values)
    assert smoothed[0] == values[0]
    assert smoothed[2] == pytest.approx(values[:5].mean())
    assert smoothed[200] == pytest.approx(values[196:205].mean())
    assert smoothed[-1] == pytest.approx(values[-5:].mean())
    line = np.arange(300.0)
    assert smooth(line)[:290] == pytest.approx(line[:290])


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    values = np.ones(200)
    values[[50, 60]] = np.nan, np.inf
    assert smooth(values) == pytest.approx(np.ones(200))


def test_superscripts() -> None:
    assert superscript(-14) == "⁻¹⁴"
