"""Mixtures from the command line: beside the usual loop, from a dense model, in the report."""

import json
from pathlib import Path
from typing import Any

import pytest

from lascaux.bench.experts import usual_loop
from lascaux.model.moe import MixtureOfExperts
from tests.conftest import last_weights, metrics


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_a_run_has_the_loss_curve_of_the_usual_loop(
    precision: str,
    bound: float,
    tmp_path: Path,
    config_file: Path,
    cli: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 experts, one for each token; without balance and z loss, which the loop has not."""
    flags = ["--model.num_experts=64", "--model.experts_per_token=1", "--model.balance=none"]
    flags += ["--model.router_z_weight=0", "--train.steps=40", f"--train.precision={precision}"]
    assert cli("train", config_file, "--run", tmp_path / "ours", *flags).code == 0
    monkeypatch.setattr(MixtureOfExperts, "forward", usual_loop)
    assert cli("train", config_file, "--run", tmp_path / "loop", *flags).code == 0
    ours, loop = metrics(tmp_path / "ours"), metrics(tmp_path / "loop")
    assert ours[-1]["loss"] < 0.6 * ours[0]["loss"]  # it learns
    pairs = list(zip(ours, loop, strict=True))
    if precision == "bf16":  # rounding turns single choices, and the curves part by and by
        assert sum(a["loss"] / b["loss"] for a, b in pairs) / 40 == pytest.approx(1, abs=0.03)
        pairs = pairs[:10]
    for a, b in pairs:
        assert a["loss"] == pytest.approx(b["loss"], rel=bound)


def test_an_upcycled_mixture_begins_as_the_dense_model_and_learns_on(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    dense, mixture = tmp_path / "dense", tmp_path / "mixture"
    flags = ["--model.activation=swiglu", "--train.steps=12", "--optimizer.name=muon"]
    assert cli("train", config_file, "--run", dense, *flags).code == 0
    wanted = ["--model.num_experts=4", "--model.num_dense_layers=1", "--train.steps=20"]
    result = cli("upcycle", dense, "--out", mixture, *wanted, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["loss"] == pytest.approx(found["dense_loss"], rel=1e-6)
    assert found["active_parameters"] > found["dense_parameters"]
    assert "router" not in found and found["seed"] == 1
    assert cli("verify", mixture).code == 0
    trained = cli("train", "--run", mixture)
    assert trained.code == 0, trained.err
    lines = metrics(mixture)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["bits_per_byte"] < metrics(dense)[-1]["bits_per_byte"]
    text = cli("upcycle", dense, "--out", tmp_path / "other", "--model.num_experts=2")
    assert text.code == 0 and "nats per token, +" in text.out.replace(", -", ", +")


def test_a_run_that_is_continued_knows_the_load_of_the_last_batch(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    """What balance over batches and jitter go by is state of the run, or follows from its step."""
    flags = ["--model.num_experts=4", "--model.balance_over=batch", "--model.balance_weight=0.5"]
    flags += ["--model.router_jitter=0.3", "--schedule.name=constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli("train", config_file, "--run", whole, *flags).code == 0
    assert cli("train", config_file, "--run", parts, *flags, "--train.steps=5").code == 0
    assert cli("train", config_file, "--run", parts, *flags).code == 0
    assert last_weights(parts) == last_weights(whole)
    steady = tmp_path / "steady"
    flags[3] = "--model.router_jitter=0"
    assert cli("train", config_file, "--run", steady, *flags).code == 0
    assert last_weights(steady) != last_weights(whole)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "say how many experts"),
        (["--model.num_experts=4", "--model.experts_per_token=1"], "router's probability"),
        (["--model.num_experts=4", "--model.expert_d_ff=16"], "'model.expert_d_ff' 16 would make"),
        (["--model.num_experts=4", "--model.d_model=64"], "'model.d_model' 64 would make"),
        (["--model.num_experts=4", "--model.router_scale=2"], "'model.router_scale' 2.0"),
    ],
)
def test_what_would_not_begin_as_the_dense_model_is_refused(
    tmp_path: Path, config_file: Path, cli: Any, flags: list[str], words: str
) -> None:
    dense = tmp_path / "dense"
    assert cli("train", config_file, "--run", dense, "--train.steps=3").code == 0
    result = cli("upcycle", dense, "--out", tmp_path / "mixture", *flags)
    assert result.code == 2 and words in result.err
    assert not (tmp_path / "mixture" / "config.toml").exists()


def test_the_report_shows_the_load_of_every_expert(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    flags = ["--model.num_experts=4", "--model.capacity_factor=1.0"]
    assert cli("train", config_file, "--run", run, *flags).code == 0
    lines = [json.loads(line) for line in (run / "experts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert len(line["load"]) == 2  # layers
        for layer in line["load"]:
            assert len(layer) == 4 and sum(layer) == pytest.approx(4, abs=0.01)
    assert cli("report", run).code == 0
    page = (run / "report.html").read_text()
    for title in ("Load of each expert", "Router entropy", "Busiest expert", "Dropped pairs"):
        assert title in page
    (run / "experts.jsonl").write_text('{"step": 1, "load": [[1, 2], [3]]}\n')
    broken = cli("report", run)
    assert broken.code == 2 and "'load' must be a list of layers" in broken.err


def test_records_of_experts_are_cut_back_with_the_others(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run, "--model.num_experts=4").code == 0
    weights, experts = last_weights(run), (run / "experts.jsonl").read_text()
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        path.rename(tmp_path / path.name)
    assert cli("train", config_file, "--run", run, "--model.num_experts=4").code == 0
    assert last_weights(run) == weights
    assert (run / "experts.jsonl").read_text() == experts
