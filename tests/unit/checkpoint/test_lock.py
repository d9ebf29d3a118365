"""The lock of a run inside one process; more of them in tests/reliability/test_lock.py."""

import json
import os
from pathlib import Path

import pytest

from lascaux.checkpoint.lock import RunLock
from lascaux.errors import CheckpointError


def test_the_holder_is_written_into_the_file(tmp_path: Path):
    with RunLock(tmp_path):
        owner = json.loads((tmp_path / "LOCK").read_bytes())
        assert owner["pid"] == os.getpid()
        assert owner.keys() == {"pid", "host", "start", "argv"}


def test_a_second_start_is_refused_with_pid_host_and_start_and_writes_nothing(tmp_path: Path):
    with RunLock(tmp_path):
        before = (tmp_path / "LOCK").read_bytes()
        owner = json.loads(before)
        with pytest.raises(CheckpointError) as info:
            RunLock(tmp_path).__enter__()
        message = str(info.value)
        assert f"{tmp_path} is in use by process {owner['pid']} on {owner['host']}" in message
        assert f"started {owner['start']}" in message
        assert (tmp_path / "LOCK").read_bytes() == before


def test_the_lock_is_free_after_the_block_even_after_an_error(tmp_path: Path):
    with pytest.raises(RuntimeError):
        with RunLock(tmp_path):
            raise RuntimeError
    with RunLock(tmp_path):
        pass


def test_an_old_lock_file_is_no_obstacle(tmp_path: Path):
    (tmp_path / "LOCK").write_text('{"pid": 1, "host": "gone", "start": "1999"}' + "x" * 5000)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_holder_that_has_not_written_yet_is_no_crash(tmp_path: Path, content: bytes):
    with RunLock(tmp_path):
        (tmp_path / "LOCK").write_bytes(content)
        with pytest.raises(CheckpointError, match="in use by another process"):
            RunLock(tmp_path).__enter__()


def test_two_runs_have_two_locks(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with RunLock(tmp_path / "a") as first, RunLock(tmp_path / "b") as second:
        assert first.path != second.path and first.path.exists() and second.path.exists()


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere/LOCK: No such file or directory"):
        RunLock(tmp_path / "nowhere").__enter__()
