"""Saving while the process is killed or the disk fails: the old or the new, never a mix."""

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lascaux.checkpoint.load import newest_valid
from lascaux.checkpoint.manifest import step_of
from lascaux.checkpoint.save import remove_old
from lascaux.errors import CheckpointError
from tests.unit.checkpoint.builders import folder_in_memory, is_checkpoint_of, save
from tests.unit.checkpoint.faults import AtCall, calls_go_through, failing, in_child, kill

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE)
KILLS = 100
SIZE = 180  # below torch's threshold for threads, which a forked child must not start


def before_the_save(checkpoints: Path) -> None:
    """Steps 1 and 2, and what dead processes left."""
    save(checkpoints, 1)
    save(checkpoints, 2)
    for name in (".tmp_step_00000003_dead", ".del_step_00000000_dead"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "model.safetensors").write_bytes(b"half")


def save_and_keep_two(checkpoints: Path, step: int, size: int = 24) -> None:
    save(checkpoints, step, size)
    remove_old(checkpoints, 2)


def assert_nothing_is_left_over(checkpoints: Path) -> None:
    assert [name for name in os.listdir(checkpoints) if step_of(name) is None] == []


def test_killed_at_every_call_the_old_or_the_new_is_there():
    k, ended = 0, False
    found_steps: set[int] = set()
    while not ended:
        k += 1
        with folder_in_memory() as folder:
            before_the_save(folder)

            def save_and_die(folder: Path = folder, k: int = k) -> None:
                with calls_go_through(AtCall(k, kill)):
                    save_and_keep_two(folder, 3)

            status = os.waitpid(in_child(save_and_die), 0)[1]
            ended = os.waitstatus_to_exitcode(status) == 0
            assert ended or os.WTERMSIG(status) == signal.SIGKILL
            path, rejected = newest_valid(folder)
            assert path is not None and rejected == []
            found = step_of(path.name)
            assert found in (2, 3) and is_checkpoint_of(path, found)
            assert is_checkpoint_of(folder / "step_00000002", 2)
            found_steps.add(found)
            save_and_keep_two(folder, 3)
            assert is_checkpoint_of(folder / "step_00000003", 3)
            assert sorted(os.listdir(folder)) == ["step_00000002", "step_00000003"]
    assert found_steps == {2, 3} and k > 40


def test_killed_at_random_instants_the_run_always_continues(tmp_path: Path):
    rng = random.Random(11)
    checkpoints = tmp_path / "checkpoints"
    step, kills, delay = 1, 0, 0.05
    save(checkpoints, step, SIZE)
    for _ in range(6 * KILLS):
        reader, writer = os.pipe()

        def announce_and_save(writer: int = writer, step: int = step) -> None:
            os.write(writer, b"!")
            save_and_keep_two(checkpoints, step + 1, SIZE)

        pid = in_child(announce_and_save)
        os.read(reader, 1)
        time.sleep(rng.uniform(0, delay))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        os.close(reader)
        os.close(writer)
        kills += os.WIFSIGNALED(status)
        # As long as half of the children are caught, the instants spread over the whole save.
        delay *= 1.1 if os.WIFSIGNALED(status) else 0.9
        path, rejected = newest_valid(checkpoints)
        assert path is not None and rejected == []
        found = step_of(path.name)
        assert found in (step, step + 1) and is_checkpoint_of(path, found, SIZE)
        step = found
        if kills == KILLS:
            break
    assert kills == KILLS and step > 5
    save_and_keep_two(checkpoints, step + 1, SIZE)
    assert_nothing_is_left_over(checkpoints)


@pytest.mark.parametrize("persists", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_an_error_at_any_call_abandons_the_save_and_nothing_else(number: int, persists: bool):
    k = 0
    while True:
        k += 1
        with folder_in_memory() as folder:
            before_the_save(folder)
            fault = AtCall(k, failing(number), persists)
            try:
                with calls_go_through(fault):
                    save(folder, 3)
            except CheckpointError as error:
                message = str(error)
            else:
                assert fault.count < k
                break
            assert f"cannot save step 3 in {folder}: {os.strerror(number)}" in message
            assert "it needs 4.86 KiB" in message and "are free" in message
            assert is_checkpoint_of(folder / "step_00000001", 1)
            assert is_checkpoint_of(folder / "step_00000002", 2)
            new = folder / "step_00000003"
            assert not new.exists() or (persists and is_checkpoint_of(new, 3))
            if not persists:
                written = [name for name in os.listdir(folder) if "_00000003_" in name]
                assert written in ([], [".tmp_step_00000003_dead"])
            save(folder, 3)
            assert is_checkpoint_of(new, 3)
            assert_nothing_is_left_over(folder)
    assert k > 25


def test_an_error_at_any_call_of_retention_leaves_the_newest():
    k = 0
    while True:
        k += 1
        with folder_in_memory() as folder:
            for step in range(1, 5):
                save(folder, step)
            fault = AtCall(k, failing(errno.EIO))
            try:
                with calls_go_through(fault):
                    remove_old(folder, 2)
            except CheckpointError as error:
                assert str(folder) in str(error) and "Input/output error" in str(error)
            else:
                assert fault.count < k
                break
            for step in (3, 4):
                assert is_checkpoint_of(folder / f"step_{step:08d}", step)
            remove_old(folder, 2)
            assert sorted(os.listdir(folder)) == ["step_00000003", "step_00000004"]
    assert k > 15


def test_short_writes_are_continued(tmp_path: Path):
    rng = random.Random(3)

    def write_less(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> int | None:
        if name != "write":
            return None
        descriptor, data = arguments
        return real(descriptor, data[: rng.randint(1, len(data))])

    with calls_go_through(write_less):
        path = save(tmp_path, 1)
    assert is_checkpoint_of(path, 1)


class SyncJudge:
    """What a power cut could take away, from the calls of a save; fsync number `skip` is lost."""

    def __init__(self, skip: int | None = None) -> None:
        self.skip = skip
        self.syncs = 0
        self.paths: dict[int, Path] = {}
        self.unsynced: set[Path] = set()
        self.problems: list[str] = []

    def __call__(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "open" and arguments[1] & (os.O_CREAT | os.O_DIRECTORY):
            return self.opened(real(*arguments), Path(arguments[0]), arguments[1])
        if name == "write":
            self.unsynced.add(self.paths[arguments[0]])
        if name == "mkdir":
            self.unsynced.add(Path(arguments[0]).parent)
        if name == "fsync":
            self.syncs += 1
            if self.syncs != self.skip:
                self.unsynced.discard(self.paths[arguments[0]])
        if name in ("unlink", "rmdir") and self.unsynced:
            self.problems.append(f"{arguments[0]} is deleted before {self.unsynced} is on disk")
        if name == "rename":
            self.renamed(Path(arguments[0]), Path(arguments[1]))
        return None

    def opened(self, descriptor: int, path: Path, flags: int) -> int:
        self.paths[descriptor] = path
        if flags & os.O_CREAT:
            self.unsynced |= {path, path.parent}
        return descriptor

    def renamed(self, source: Path, target: Path) -> None:
        for path in sorted(self.unsynced):
            if path == source or source in path.parents:
                self.problems.append(f"{path} is not on disk when {source} becomes {target}")
        self.unsynced.add(target.parent)

    def verdict(self) -> list[str]:
        return self.problems + [f"{path} is not on disk at the end" for path in self.unsynced]


def judge_a_save(skip: int | None) -> SyncJudge:
    judge = SyncJudge(skip)
    with folder_in_memory() as run:
        with calls_go_through(judge):
            save(run / "checkpoints", 1)
    return judge


def test_everything_is_synced_before_it_is_relied_on_and_no_fsync_is_idle():
    judge = judge_a_save(None)
    assert judge.verdict() == []
    assert judge.syncs == 6  # the run, three files, their folder, the folder of checkpoints
    for skip in range(1, judge.syncs + 1):
        assert judge_a_save(skip).verdict() != []


def judge_a_retention(skip: int | None) -> SyncJudge:
    judge = SyncJudge(skip)
    with folder_in_memory() as folder:
        for step in (1, 2, 3):
            save(folder, step)
        with calls_go_through(judge):
            remove_old(folder, 1)
    return judge


def test_an_old_checkpoint_is_out_of_sight_on_disk_before_its_files_are_deleted():
    judge = judge_a_retention(None)
    assert judge.verdict() == [] and judge.syncs == 1
    assert judge_a_retention(1).verdict() != []
