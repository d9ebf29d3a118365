"""`torchrun … lascaux train`: the curve of one process, other layouts, and processes that die."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lascaux.checkpoint.load import load_tensors
from tests.conftest import metrics

CONFIG = """
[model]
num_layers = 4
d_model = 32
num_heads = 4
vocab_size = 300
max_context = 32
[data]
sources = "{text}"
valid_fraction = 0.2
[train]
steps = 12
batch_tokens = 256
microbatch_seqs = 2
seq_len = 32
precision = "fp32"
threads = 1
[schedule]
warmup_steps = 2
[checkpoint]
every_steps = 4
keep = 0
[evaluate]
every_steps = 6
sample_prompts = ["a"]
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    (folder / "text").mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * 7 + i * i) % 50}" for i in range(200))
        (folder / "text" / f"{number}.txt").write_text(words)
    path = folder / "config.toml"
    path.write_text(CONFIG.format(text=folder / "text"))
    return path


@pytest.fixture(scope="module")
def one(config_path: Path) -> Path:
    run = config_path.parent / "one"
    start(1, config_path, run).wait_for_end()
    return run


class Job:
    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    def wait_for_end(self, code: int = 0) -> str:
        output, _ = self.process.communicate(timeout=200)
        assert self.process.returncode == code, output
        return output

    def workers(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


def start(processes: int, config: Path, run: Path, *flags: str, restarts: int = 0) -> Job:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    launcher += ["--shutdown-timeout", "3"] if processes > 1 else []
    launcher += ["--max-restarts", str(restarts), "-m", "--"] if processes > 1 else []
    launcher = launcher if processes > 1 else ["-m"]
    train = ["lascaux", "train", str(config), "--run", str(run), *flags]
    return Job([sys.executable, *launcher, *train])


def same_curve(found: Path, wanted: Path) -> None:
    a, b = metrics(found), metrics(wanted)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for got, want in zip(a, b, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    assert a[-1]["valid_loss"] == pytest.approx(b[-1]["valid_loss"], rel=1e-5)


def test_a_run_moves_between_layouts(config_path: Path, one: Path) -> None:
    """Saved on 2 x 2, continued from step 4 on one process and on four with other axes."""
    first = config_path.parent / "dp2tp2"
    start(4, config_path, first, "--parallel.tp=2").wait_for_end()
    same_curve(first, one)
    for processes, flags in ((1, ()), (4, ("--parallel.pp=2", "--parallel.cp=2"))):
        run = config_path.parent / f"continued{processes}"
        shutil.copytree(first, run)
        for step in (8, 12):
            shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
        axes = flags or ("--parallel.tp=1",)
        output = start(processes, config_path, run, *axes).wait_for_end()
        assert "continued at step 4 of 12" in output and "changed at step 4: parallel.tp" in output
        same_curve(run, one)


def test_a_killed_process_costs_nothing(config_path: Path) -> None:
    whole_run, killed = (config_path.parent / name for name in ("whole", "killed"))
    start(2, config_path, whole_run).wait_for_end()
    job = start(2, config_path, killed, restarts=1)
    deadline = time.monotonic() + 100
    checkpoint = killed / "checkpoints" / "step_00000004" / "manifest.json"
    while not checkpoint.exists():
        assert time.monotonic() < deadline and job.process.poll() is None
        time.sleep(0.01)
    os.kill(job.workers()[-1], signal.SIGKILL)
    job.wait_for_end()
    ends = [run / "checkpoints" / "step_00000012" for run in (whole_run, killed)]
    for stem in ("model", "optimizer"):
        wanted, found = (load_tensors(end, stem) for end in ends)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_process_that_hangs_ends_the_job_and_is_named(config_path: Path) -> None:
    run = config_path.parent / "hanging"
    job = start(2, config_path, run, "--parallel.timeout_seconds=10", "--train.steps=100000")
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert time.monotonic() < deadline and job.process.poll() is None
        time.sleep(0.05)
    os.kill(job.workers()[1], signal.SIGSTOP)
    stopped = job.workers()[1]
    started = time.monotonic()
    try:
        output, _ = job.process.communicate(timeout=90)
    finally:
        os.kill(stopped, signal.SIGCONT) if Path(f"/proc/{stopped}").exists() else None
    assert job.process.returncode != 0
    assert "rank 0, step" in output and "another process ended or did not answer" in output
    assert "rank 1 is in step" in output or "all of them had begun this step" in output
    assert time.monotonic() - started < 80
