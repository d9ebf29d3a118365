"""A run that was interrupted ends as one left alone: weights, optimizer, metrics, samples."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lascaux.train.loop as loop
from tests.conftest import last_weights, metrics

STEPS = 8


@pytest.fixture(params=["adamw", "muon"])
def flags(request: pytest.FixtureRequest) -> list[str]:
    return [f"--optimizer.name={request.param}"]


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Have this process receive a signal while it takes a step."""
    original: Callable[..., Any] = loop.train_step
    calls = 0

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    monkeypatch.setattr(loop, "train_step", wrapped)


def assert_same_run(run: Path, reference: Path) -> None:
    assert last_weights(run) == last_weights(reference)
    assert metrics(run) == metrics(reference)
    assert (run / "samples.jsonl").read_text() == (reference / "samples.jsonl").read_text()


def test_a_run_stopped_at_any_step_and_continued_is_the_uninterrupted_run(
    tmp_path: Path,
    config_file: Path,
    cli: Any,
    flags: list[str],
) -> None:
    reference = tmp_path / "reference"
    assert cli("train", config_file, "--run", reference, *flags).code == 0
    for step in range(1, STEPS):
        run = tmp_path / f"stopped-{step}"
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(step, patch, signal.SIGTERM if step % 2 else signal.SIGINT)
            stopped = cli("train", config_file, "--run", run, *flags)
        assert stopped.code == 75
        assert f"stopped after step {step} of {STEPS}; nothing is lost" in stopped.err
        assert [line["step"] for line in metrics(run)] == list(range(1, step + 1))
        assert cli("train", config_file, "--run", run, *flags).code == 0
        assert_same_run(run, reference)


def test_a_run_killed_at_any_step_and_continued_is_the_uninterrupted_run(
    tmp_path: Path, config_file: Path, cli: Any, flags: list[str]
) -> None:
    reference = tmp_path / "reference"
    assert cli("train", config_file, "--run", reference, *flags).code == 0
    for step in range(1, STEPS + 1):
        run = tmp_path / f"killed-{step}"
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                interrupt_after(step, patch, signal.SIGKILL)
                cli("train", config_file, "--run", run, *flags)
            os._exit(99)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert cli("train", config_file, "--run", run, *flags).code == 0
        assert_same_run(run, reference)


def test_a_second_signal_stops_at_once_and_loses_only_the_steps_since_the_checkpoint(
    tmp_path: Path, config_file: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = loop.train_step
    calls = 0

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **keywords)

    monkeypatch.setattr(loop, "train_step", wrapped)
    run = tmp_path / "run"
    stopped = cli("train", config_file, "--run", run)
    assert stopped.code == 75
    assert "run the same command again" in stopped.err
    monkeypatch.undo()
    assert os.listdir(run / "checkpoints") == ["step_00000003"]
    finished = cli("train", "--run", run)
    assert finished.code == 0
    assert "continued at step 3 of 8" in finished.err


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, config_file: Path, cli: Any) -> None:
    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run).code == 0
    before = last_weights(run), metrics(run)
    again = cli("train", config_file, "--run", run)
    assert again.code == 0
    assert "has finished all 8 steps" in again.err
    assert (last_weights(run), metrics(run)) == before


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    reference, run = tmp_path / "reference", tmp_path / "run"
    assert cli("train", config_file, "--run", reference).code == 0
    assert cli("train", config_file, "--run", run).code == 0
    weights = run / "checkpoints" / "step_00000008" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    checked = cli("verify", run)
    assert checked.code == 2 and "DAMAGED" in checked.out and str(weights) in checked.out
    again = cli("train", config_file, "--run", run)
    assert "passing over a damaged checkpoint" in again.err
    assert "continued at step 6 of 8" in again.err
    assert again.code == 0
    assert_same_run(run, reference)
    assert cli("verify", run).code == 0
