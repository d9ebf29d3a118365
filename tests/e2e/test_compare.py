"""`lascaux compare` as a user runs it: to the end, stopped on the way, with a run that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lascaux.config.load import load_config
from lascaux.model.accounting import count_parameters
from tests.conftest import metrics

MODELS = """
[compare]
seeds = [0]
[compare.models]
small = {}
moe = { model.num_experts = 4 }
wide = { model.d_ff = 256 }
"""


@pytest.fixture
def study(config_file: Path) -> Path:
    path = config_file.with_name("study.toml")
    path.write_text(MODELS + config_file.read_text())
    return path


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}


def test_a_study_trains_every_model_and_shows_what_experts_are_worth(
    tmp_path: Path, study: Path, cli: Any
) -> None:
    folder = tmp_path / "out"
    result = cli("compare", study, "--run", folder, "--runs-at-once", "3", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)["models"]
    assert list(found) == ["small", "moe", "wide"]
    for name, row in found.items():
        run = folder / f"{name}-seed0"
        config = load_config(str(run / "config.toml"))
        assert row["parameters"] == count_parameters(config.model).total
        assert row["bits_per_byte"] == metrics(run)[-1]["bits_per_byte"]
        assert config.data.sources[0].path == str(folder / "data")  # prepared once
        assert not (run / "data").exists()
    sizes = found["moe"]["dense_equivalent"]["parameters"]
    assert found["small"]["parameters"] <= sizes["p50"] <= found["wide"]["parameters"] * 1.0001
    assert sizes["p5"] is None  # one seed
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    before = files(folder)
    again = cli("compare", study, "--run", folder)
    assert again.code == 0 and files(folder) == before
    assert "dense equivalent" in again.out and str(folder / "compare.png") in again.out
    other = cli("compare", study, "--run", folder, "--train.steps=9")
    assert other.code == 2 and "train.steps: 8 -> 9" in other.err


def test_a_study_that_is_stopped_goes_on(tmp_path: Path, study: Path, cli: Any) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "lascaux", "compare", str(study), "--run", str(folder)]
    flags = ["--train.steps=100000", "--schedule.name=constant"]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
    logs = [folder / f"{name}-seed0" / "metrics.jsonl" for name in ("small", "moe")]
    deadline = time.monotonic() + 120
    while not all(log.exists() and log.stat().st_size for log in logs):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "run the same command again" in said
    for log in logs:
        steps = metrics(log.parent)[-1]["step"]
        saved = [path.name for path in (log.parent / "checkpoints").iterdir()]
        assert f"step_{steps:08}" in saved  # each saved where it stopped


def test_a_run_that_fails_is_named(tmp_path: Path, study: Path, cli: Any) -> None:
    folder = tmp_path / "out"
    result = cli("compare", study, "--run", folder, "--optimizer.lr=1e30")
    assert result.code == 2
    assert "seed0 ended with exit code 2: step" in result.err and ".log" in result.err
    assert "Traceback" not in result.err
    assert cli("compare", study, "--run", folder, "--runs-at-once", "0").code == 2
