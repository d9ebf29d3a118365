"""What is chosen for a machine, what the user chose instead, and how it is told."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lascaux.config.schema import TrainConfig
from lascaux.parallel import hardware
from lascaux.parallel.hardware import choose_precision, cpu_quota, measure_matmul_peak, usable_cores
from lascaux.parallel.runtime import let_waiting_threads_sleep
from lascaux.train import machine
from lascaux.train.machine import describe_choices, describe_machine, prepare_device
from tests.conftest import metrics

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({}, None),
    ],
)
def test_a_containers_quota_is_read(
    tmp_path: Path, files: dict[str, str], cores: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == cores


def test_hardware_threads_of_one_core_and_time_not_granted_count_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr(hardware, "siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(hardware, "cpu_quota", lambda: None)
    assert usable_cores() == 4
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 2.5)
    assert usable_cores() == 3
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 0.2)
    assert usable_cores() == 1


@pytest.mark.parametrize(("times", "precision"), [(4.0, "bf16"), (1.2, "fp32"), (0.1, "fp32")])
def test_bf16_is_chosen_where_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, times: float, precision: str
) -> None:
    speeds = {torch.float32: 1e11, torch.bfloat16: times * 1e11}
    monkeypatch.setattr(hardware, "measure_matmul_peak", lambda device, dtype: speeds[dtype])
    assert choose_precision(CPU) == precision


def test_threads_are_those_asked_for_else_one_for_each_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(machine, "usable_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    prepare_device(TrainConfig(threads=3, device="cpu"))
    prepare_device(TrainConfig(device="cpu"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    prepare_device(TrainConfig(device="cpu"))
    assert asked == [3, 7]


def test_the_choices_are_told_in_one_line() -> None:
    text = describe_choices(describe_machine(CPU, TrainConfig(precision="fp32")))
    assert "\n" not in text
    for word in ("threads", "fp32", "matrix-multiply peak", "freed memory kept"):
        assert word in text


def test_a_run_keeps_the_precision_it_was_started_with(
    tmp_path: Path, config_file: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    flags = ["--run", run, "--train.precision=auto"]
    monkeypatch.setattr("lascaux.train.loop.choose_precision", lambda device: "bf16")
    assert cli("train", config_file, *flags, "--train.steps=4").code == 0
    assert 'precision = "bf16"' in (run / "config.toml").read_text()
    monkeypatch.setattr("lascaux.train.loop.choose_precision", lambda device: "fp32")
    result = cli("train", config_file, *flags, "--train.steps=6")
    assert result.code == 0, result.err
    assert 'precision = "bf16"' in (run / "config.toml").read_text()
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_bf16_where_it_is_slow_is_trained_but_not_in_silence(
    tmp_path: Path, config_file: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lascaux.train.loop.choose_precision", lambda device: "fp32")
    result = cli("train", config_file, "--run", tmp_path / "run", "--train.precision=bf16")
    assert result.code == 0 and "bf16 gains little or nothing" in result.err


def test_the_peak_is_the_best_of_both_sizes_unless_the_first_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([0.01, 0.05, 0.2])
    monkeypatch.setattr(hardware, "fastest", lambda work, device, deadline: next(answers))
    assert measure_matmul_peak(CPU, torch.float32) == 2 * 2048**3 / 0.05
    assert measure_matmul_peak(CPU, torch.float32) == 2 * 1024**3 / 0.2
    assert next(answers, None) is None


def test_waiting_threads_sleep_unless_the_user_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    let_waiting_threads_sleep()
    assert os.environ == {"OMP_WAIT_POLICY": "active"}
    monkeypatch.setattr(os, "environ", {})
    let_waiting_threads_sleep()
    assert os.environ == {"GOMP_SPINCOUNT": "1000"}


def test_the_command_line_sets_the_environment_before_torch_is_imported() -> None:
    code = """
import sys
import lascaux.cli as cli
def check():
    assert "torch" not in sys.modules
    print("called in time")
cli.let_waiting_threads_sleep = check
cli.main(["bench", "generate", "--rounds", "0"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "called in time\n" and done.returncode == 2
