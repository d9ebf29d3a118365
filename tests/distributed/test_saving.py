"""Saves in the background: the step they were begun at, whole or not at all, on every process."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lascaux.train.saving as saving
from lascaux.checkpoint.load import list_checkpoints, load_tensors, verify_checkpoint
from lascaux.checkpoint.parts import Piece
from lascaux.checkpoint.save import whole_pieces
from lascaux.checkpoint.tensor_file import Place
from lascaux.parallel.layout import Layout
from lascaux.parallel.world import World
from lascaux.train.saving import Save, Saver
from tests.conftest import metrics
from tests.distributed.ranks import on_ranks

CPU = torch.device("cpu")
VALUES = torch.arange(24.0).reshape(6, 4)


def make_save(rank: int, folder: Path, step: int, world: World, seconds: float = 30) -> Save:
    """Two rows of a tensor of six on each of three processes."""
    rows = VALUES[2 * rank : 2 * rank + 2] + step
    piece = Piece("embed.weight", rows, Place((2 * rank, 0), (6, 4)))
    return Save(
        checkpoints=folder,
        step=step,
        tokens_seen=step,
        keep=2,
        pieces={"model": [piece], "optimizer": []},
        state={},
        world=world,
        timeout_seconds=seconds,
    )


def save_three_times(rank: int, folder: Path, broken: int | None, kind: str) -> list[str | None]:
    world = World(Layout(dp_replicate=3), rank, CPU)
    saver, problems = Saver(0), []
    original = saving.write_tensors
    for step in (1, 2, 3):
        save = make_save(rank, folder, step, world, seconds=2 if kind == "silent" else 30)
        if rank == broken and step == 2:
            if kind == "silent":
                problems.append(None)
                torch.distributed.barrier()
                continue
            saving.write_tensors = fail
        saver.begin(save)
        ended = saver.wait()
        saving.write_tensors = original
        assert ended is not None
        problems.append(ended.problem)
        if kind == "silent":
            torch.distributed.barrier()
    torch.distributed.barrier()
    return problems


def fail(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def found_in(folder: Path) -> list[str]:
    names = [path.name for path in list_checkpoints(folder)]
    for path in list_checkpoints(folder):
        verify_checkpoint(path)
        step = int(path.name[-1])
        assert torch.equal(load_tensors(path, "model")["embed.weight"], VALUES + step)
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    return names


def test_every_process_writes_its_part_and_the_first_publishes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert on_ranks(3, save_three_times, folder, None, "") == [[None] * 3] * 3
    assert found_in(folder) == ["step_00000003", "step_00000002"]
    names = {path.name for path in (folder / "step_00000003").iterdir()}
    assert names == {
        "manifest.json",
        *(
            f"{stem}_{rank:05d}_00000.safetensors"
            for stem in ("model", "optimizer")
            for rank in range(3)
        ),
    }


def test_a_full_disk_on_one_process_fails_the_save_on_all_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for problems in on_ranks(3, save_three_times, folder, 1, "full"):
        assert problems[0] is None and problems[2] is None
        assert "process 1 cannot write its part of step 2" in problems[1]
        assert "No space left on device" in problems[1]
    assert found_in(folder) == ["step_00000003", "step_00000001"]


def test_a_silent_process_is_named_after_the_time_it_has(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, silent, third = on_ranks(3, save_three_times, folder, 1, "silent")
    assert first[1] == third[1] and "process 1 has not finished its part" in first[1]
    assert found_in(folder) == ["step_00000003", "step_00000001"]


def test_a_save_cut_off_from_the_others_ends_at_once(tmp_path: Path) -> None:
    def wait_alone(rank: int) -> str | None:
        world = World(Layout(dp_replicate=3), rank, CPU)
        saver, problem = Saver(0), None
        if rank == 2:
            saver.begin(make_save(rank, tmp_path, 1, world, seconds=1000))
            error = RuntimeError("Connection closed by peer")
            threading.Timer(0.5, saver.wait_unless_cut_off, (RuntimeError, error, None)).start()
            ended = saver.wait()
            assert ended is not None
            problem = ended.problem
        torch.distributed.barrier()
        return problem

    assert "has not finished" in on_ranks(3, wait_alone)[2]


def test_training_goes_on_beside_a_save_and_does_not_change_it(
    tmp_path: Path, config_file: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save as slow as three steps, of each step that is due, has the bytes of a waiting one."""
    flags = ["--checkpoint.every_steps=3", "--checkpoint.keep=0"]
    waiting = tmp_path / "waiting"
    assert (
        cli("train", config_file, "--run", waiting, *flags, "--checkpoint.background=false").code
        == 0
    )
    beside = tmp_path / "beside"
    original, lines_when_written = saving.save_checkpoint, []

    def slow(*arguments: Any, **keywords: Any) -> Any:
        started = len(metrics(beside))
        while len(metrics(beside)) < min(started + 2, 8):
            threading.Event().wait(0.01)
        lines_when_written.append(len(metrics(beside)))
        return original(*arguments, **keywords)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    assert cli("train", config_file, "--run", beside, *flags).code == 0
    assert lines_when_written[0] > 3
    names = [path.name for path in list_checkpoints(waiting / "checkpoints")]
    assert names == [path.name for path in list_checkpoints(beside / "checkpoints")]
    for name in names:
        for stem in ("model", "optimizer"):
            file = Path("checkpoints") / name / f"{stem}.safetensors"
            assert (beside / file).read_bytes() == (waiting / file).read_bytes()


def test_a_copy_is_taken_only_where_training_goes_on() -> None:
    world = World(Layout(), 0, CPU)
    weight = torch.ones(3)
    for copied in (True, False):
        (piece,) = saving.own_pieces([("norm.weight", weight)], {}, world, copied)["model"]
        assert (piece.tensor.data_ptr() == weight.data_ptr()) != copied
    assert whole_pieces({"a": weight})[0].place is None
