"""The lock of a run among processes that start together, die and fork."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lascaux.checkpoint.lock import RunLock
from lascaux.errors import CheckpointError
from tests.unit.checkpoint.faults import in_child


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def assert_free(run: Path) -> None:
    with RunLock(run):
        pass


def assert_held(run: Path) -> None:
    with pytest.raises(CheckpointError, match="in use"):
        RunLock(run).__enter__()


def test_of_many_starts_at_once_one_wins_and_the_others_write_nothing(tmp_path: Path):
    go_reader, go_writer = os.pipe()
    reader, writer = os.pipe()

    def start() -> None:
        os.close(go_writer)
        os.read(go_reader, 1)  # ends for all at once, when the parent closes its end
        try:
            with RunLock(tmp_path):
                os.write(writer, f"won {os.getpid()}\n".encode())
                time.sleep(60)
        except CheckpointError as error:
            os.write(writer, f"lost {error}\n".encode())

    children = [in_child(start) for _ in range(10)]
    os.close(go_writer)
    answers = b""
    while answers.count(b"\n") < 10:
        answers += os.read(reader, 65536)
    lines = answers.decode().splitlines()
    winners = [line.split()[1] for line in lines if line.startswith("won")]
    assert len(winners) == 1
    lost = [line for line in lines if line.startswith("lost")]
    assert len(lost) == 9
    assert all(f"process {winners[0]} on" in line or "(yet)" in line for line in lost)
    assert f'"pid": {winners[0]},' in (tmp_path / "LOCK").read_text()
    assert os.listdir(tmp_path) == ["LOCK"]
    for pid in children:
        kill(pid)
    for descriptor in (go_reader, reader, writer):
        os.close(descriptor)
    assert_free(tmp_path)


def hold(run: Path, then: Callable[[], None]) -> int:
    """A child that holds the lock, does something and sleeps; returns once that is done."""
    reader, writer = os.pipe()

    def work() -> None:
        with RunLock(run):
            then()
            os.write(writer, b"!")
            time.sleep(60)

    pid = in_child(work)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    os.close(writer)
    return pid


def test_a_killed_holder_frees_the_lock(tmp_path: Path):
    for _ in range(5):
        pid = hold(tmp_path, lambda: None)
        assert_held(tmp_path)
        kill(pid)
        assert_free(tmp_path)


def test_a_forked_worker_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path):
    note = tmp_path / "worker"

    def fork_a_worker() -> None:
        note.write_text(str(in_child(lambda: time.sleep(60))))

    parent = hold(tmp_path, fork_a_worker)
    worker = int(note.read_text())
    assert_held(tmp_path)
    kill(parent)
    os.kill(worker, 0)
    assert_free(tmp_path)
    os.kill(worker, signal.SIGKILL)


def test_a_started_program_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path):
    note = tmp_path / "worker"

    def start_a_program() -> None:
        worker = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False
        )
        note.write_text(str(worker.pid))

    parent = hold(tmp_path, start_a_program)
    kill(parent)
    assert_free(tmp_path)
    os.kill(int(note.read_text()), signal.SIGKILL)


def test_a_forked_worker_that_leaves_the_block_leaves_the_lock(tmp_path: Path):
    with RunLock(tmp_path) as lock:
        before = (tmp_path / "LOCK").read_bytes()
        worker = in_child(lambda: lock.__exit__(None, None, None))
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
        assert (tmp_path / "LOCK").read_bytes() == before
        probe = in_child(lambda: assert_held(tmp_path))
        assert os.waitstatus_to_exitcode(os.waitpid(probe, 0)[1]) == 0
    assert_free(tmp_path)
