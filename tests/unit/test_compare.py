"""Dense equivalents against studies whose truth is known, and studies that cannot be read."""

import math
from pathlib import Path

import numpy as np
import pytest

from lascaux.compare.equivalent import Scale, equivalent_places, pooled_spread
from lascaux.compare.study import read_study
from lascaux.errors import ConfigError


def test_a_loss_between_two_dense_models_is_a_size_between_theirs() -> None:
    dense = [[2.0, 2.0], [1.8, 1.8], [1.7, 1.7]]
    scale = Scale((100.0, 400.0, 900.0))
    for loss, size in ((2.0, 100), (1.9, 200), (1.8, 400), (1.75, 600), (1.7, 900)):
        found = equivalent_places(dense, [loss, loss], 0.0, 3)
        assert scale.at(found.p50) == pytest.approx(size)
        assert found.p5 == found.p50 == found.p95  # seeds that agree leave no doubt
    assert equivalent_places(dense, [2.5], 0.0, 3).p50 == 0
    assert equivalent_places(dense, [1.5], 0.0, 3).p50 == 2


def test_one_seed_has_no_interval() -> None:
    spread, freedom = pooled_spread([[1.0], [2.0]])
    assert math.isnan(spread) and freedom == 0
    found = equivalent_places([[2.0], [1.0]], [1.5], spread, freedom)
    assert found.p50 == 0.5 and math.isnan(found.p5) and math.isnan(found.p95)


def test_the_spread_is_that_of_all_models_together() -> None:
    draw = np.random.default_rng(3)
    losses = [(mean + 0.1 * draw.standard_normal(50)).tolist() for mean in (1, 2, 3, 4)]
    spread, freedom = pooled_spread(losses)
    assert spread == pytest.approx(0.1, rel=0.1) and freedom == 196


def test_nine_of_ten_intervals_hold_the_true_size() -> None:
    """Studies of three seeds, drawn from a ladder that is known."""
    draw = np.random.default_rng(0)
    ladder, truth, sigma, studies = np.array([1.68, 1.58, 1.52, 1.48]), 1.55, 0.012, 400
    true_place = 1 + (1.58 - truth) / (1.58 - 1.52)
    held = 0
    for _ in range(studies):
        dense = (ladder[:, None] + sigma * draw.standard_normal((4, 3))).tolist()
        mixtures = (np.array([truth, 1.6])[:, None] + sigma * draw.standard_normal((2, 3))).tolist()
        spread, freedom = pooled_spread([*dense, *mixtures])
        found = equivalent_places(dense, mixtures[0], spread, freedom)
        held += found.p5 <= true_place <= found.p95
    assert 0.86 <= held / studies <= 0.95


def study(tmp_path: Path, text: str) -> str:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return str(path)


TWO = "[compare.models]\na = {}\nb = { model.num_experts = 4 }\n"


def test_a_study_is_models_over_common_settings_and_flags(tmp_path: Path) -> None:
    text = TWO + "c = { train.steps = 70 }\n[compare]\nseeds = [4, 2]\n[train]\nsteps = 50\n"
    path = study(tmp_path, 'preset = "tiny"\n' + text)
    found = read_study(path, ["--optimizer.lr=0.5"], None)
    assert list(found.models) == ["a", "b", "c"] and found.seeds == (4, 2)
    assert [c.model.num_experts for c in found.models.values()] == [0, 4, 0]
    assert [c.train.steps for c in found.models.values()] == [50, 50, 70]
    assert {c.optimizer.lr for c in found.models.values()} == {0.5}
    assert {c.model.d_model for c in found.models.values()} == {192}  # the preset's
    assert read_study(path, [], 2).seeds == (0, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nsteps = 3\n", "is no study: it has no [compare]"),
        ("[compare.models]\na = {}\n", "needs two models or more"),
        ('[compare.models]\na = {}\n"b/c" = {}\n', "'b/c' names a folder"),
        ("[compare.models]\na = {}\nb = 3\n", "model b must be settings"),
        ("[compare.models]\na = {}\nb = { model.num_expert = 2 }\n", "num_experts"),
        ("[compare.models]\na = {}\nb = { model.num_heads = 7 }\n", "model b: [model] d_model"),
        ("[compare]\nseed = [1]\n" + TWO, "did you mean 'seeds'"),
        ("[compare]\nseeds = [1, 1]\n" + TWO, "a list of different whole numbers"),
        ("[compare]\nseeds = []\n" + TWO, "a list of different whole numbers"),
        ("[train]\nseed = 3\n" + TWO, "several seeds"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_study(study(tmp_path, 'preset = "tiny"\n' + text), [], None)
    assert words in str(caught.value)


def test_an_unknown_study_suggests_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dense-vs-moe'"):
        read_study("dense-vs-mo", [], None)
    assert len(read_study(None, [], None).models) == 10
