"""Saving, finding, loading, keeping and deleting checkpoints on a machine that works."""

import os
from pathlib import Path

import pytest
import torch

from lascaux.checkpoint import save as save_module
from lascaux.checkpoint.load import (
    copy_into,
    list_checkpoints,
    load_tensors,
    newest_valid,
    verify_checkpoint,
)
from lascaux.checkpoint.manifest import read_manifest
from lascaux.checkpoint.save import free_space_problem, remove_old, save_checkpoint
from lascaux.checkpoint.verify import verify_run
from lascaux.errors import CheckpointError
from tests.unit.checkpoint.builders import is_checkpoint_of, pieces, save, tensors_of


def steps(checkpoints: Path) -> list[int]:
    return [read_manifest(path).step for path in list_checkpoints(checkpoints)]


def damage(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def test_what_is_saved_is_loaded(tmp_path: Path):
    path = save(tmp_path / "checkpoints", 120)
    assert path == tmp_path / "checkpoints" / "step_00000120"
    assert sorted(os.listdir(path)) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    assert is_checkpoint_of(path, 120)


def test_loading_and_saving_again_gives_the_same_files(tmp_path: Path):
    first = save(tmp_path / "one", 120)
    manifest = read_manifest(first)
    again = save_checkpoint(
        tmp_path / "two",
        step=manifest.step,
        tokens_seen=manifest.tokens_seen,
        tensors=pieces({stem: load_tensors(first, stem) for stem in ("optimizer", "model")}),
        state=manifest.state,
    )
    for name in os.listdir(first):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_the_same_step_again_is_verified_and_left_alone(tmp_path: Path):
    path = save(tmp_path, 120)
    before = {name: (path / name).stat() for name in os.listdir(path)}
    assert (
        save_checkpoint(
            tmp_path,
            step=120,
            tokens_seen=120_000,
            tensors=pieces(tensors_of(120)),
            state={"other": 1},
        )
        == path
    )
    assert {name: (path / name).stat().st_mtime_ns for name in os.listdir(path)} == {
        name: status.st_mtime_ns for name, status in before.items()
    }


def test_another_checkpoint_of_the_same_step_is_not_overwritten(tmp_path: Path):
    path = save(tmp_path, 120)
    with pytest.raises(CheckpointError) as info:
        save_checkpoint(
            tmp_path, step=120, tokens_seen=7, tensors=pieces(tensors_of(121)), state={}
        )
    message = str(info.value)
    assert str(path) in message and "optimizer.safetensors" in message
    assert "tokens_seen, saved: 120,000, wanted: 7" in message
    assert is_checkpoint_of(path, 120) and os.listdir(tmp_path) == ["step_00000120"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    path = save(tmp_path, 120)
    damage(path)
    assert is_checkpoint_of(save(tmp_path, 120), 120)
    remove_old(tmp_path, 0)
    assert os.listdir(tmp_path) == ["step_00000120"]


def test_what_dead_processes_left_goes_with_the_next_save(tmp_path: Path):
    for name in (".tmp_step_00000100_0a", ".del_step_00000080_0b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").touch()
    save(tmp_path, 120)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step_00000120"]


def test_the_newest_valid_checkpoint_is_found_and_damage_reported(tmp_path: Path):
    for step in (20, 100, 40, 60, 80):
        save(tmp_path, step)
    (tmp_path / "step_120").mkdir()
    damage(tmp_path / "step_00000100")
    (tmp_path / "step_00000080" / "manifest.json").write_bytes(b"")
    path, rejected = newest_valid(tmp_path)
    assert path == tmp_path / "step_00000060"
    assert len(rejected) == 2
    assert "step_00000100/model.safetensors is damaged: expected SHA-256" in str(rejected[0])
    assert "step_00000080/manifest.json is damaged" in str(rejected[1])


def test_no_checkpoints_is_no_error(tmp_path: Path):
    assert newest_valid(tmp_path / "checkpoints") == (None, [])
    assert list_checkpoints(tmp_path) == []


def test_a_checkpoint_deleted_by_a_trainer_meanwhile_is_not_reported_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path, 1)

    def list_then_delete(checkpoints: Path) -> list[Path]:
        listed = list_checkpoints(checkpoints)
        if read_manifest(listed[0]).step == 1:
            save(checkpoints, 2)
            remove_old(checkpoints, 1)
        return listed

    monkeypatch.setattr("lascaux.checkpoint.load.list_checkpoints", list_then_delete)
    assert newest_valid(tmp_path) == (tmp_path / "step_00000002", [])


def test_an_unknown_stem_names_those_there_are(tmp_path: Path):
    with pytest.raises(CheckpointError, match="has no ema.safetensors; found: model.safetensors"):
        load_tensors(save(tmp_path, 1), "ema")


def test_a_file_is_read_once_and_hashed_as_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(tmp_path, 1)
    opened: list[str] = []
    real_open = os.open
    monkeypatch.setattr(
        os, "open", lambda name, *rest: (opened.append(Path(name).name), real_open(name, *rest))[1]
    )
    load_tensors(path, "model")
    assert opened == ["manifest.json", "model.safetensors"]


@pytest.mark.parametrize(("keep", "kept"), [(0, 5), (1, 1), (3, 3), (5, 5), (9, 5)])
def test_the_newest_are_kept(tmp_path: Path, keep: int, kept: int):
    for step in range(1, 6):
        save(tmp_path, step)
    remove_old(tmp_path, keep)
    assert steps(tmp_path) == [5, 4, 3, 2, 1][:kept]
    assert len(os.listdir(tmp_path)) == kept


def test_nothing_is_deleted_when_the_newest_is_damaged(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / "step_00000003")
    with pytest.raises(CheckpointError, match="step_00000003/model.safetensors is damaged"):
        remove_old(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_00000003",
        "step_00000002",
        "step_00000001",
    ]


def test_room_is_compared_with_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save_module, "_free_bytes", lambda folder: 3 << 20)
    assert free_space_problem(tmp_path, 3 << 20) is None
    problem = free_space_problem(tmp_path, (3 << 20) + 1)
    assert problem is not None and str(tmp_path) in problem
    assert "3.00 MiB needed, 3.00 MiB free" in problem


def test_room_that_cannot_be_measured_is_a_problem(tmp_path: Path):
    problem = free_space_problem(tmp_path / "nowhere", 1)
    assert problem is not None and "No such file or directory" in problem


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot save step 1 in .*run/checkpoints: Not a dir"):
        save(tmp_path / "run" / "checkpoints", 1)


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path):
    path = save(tmp_path, 1)
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="model.safetensors must be a regular file"):
        verify_checkpoint(path)


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(tmp_path: Path):
    path = save(tmp_path, 1)
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors must be a regular file"):
        verify_checkpoint(path)


def test_tensors_are_copied_in_place(tmp_path: Path):
    loaded = load_tensors(save(tmp_path, 3), "model")
    state = {name: torch.zeros_like(tensor) for name, tensor in loaded.items()}
    state["embed.weight"] = torch.nn.Parameter(state["embed.weight"])
    copy_into(state, loaded, "model")
    assert all(torch.equal(state[name], loaded[name]) for name in loaded)


def test_every_difference_is_shown_and_nothing_changed():
    wanted = {f"wanted.{i}": torch.zeros(2) for i in range(7)}
    wanted |= {"a.same": torch.zeros(2), "b.shape": torch.zeros(2, 3), "c.dtype": torch.zeros(2)}
    loaded = {
        "saved.0": torch.ones(4, dtype=torch.int8),
        "a.same": torch.ones(2),
        "b.shape": torch.ones(3, 2),
        "c.dtype": torch.ones(2, dtype=torch.bfloat16),
    }
    with pytest.raises(CheckpointError) as info:
        copy_into(wanted, loaded, "model")
    assert str(info.value).splitlines() == [
        "the saved model does not fit this configuration:",
        "  saved.0  saved: int8 (4,)  wanted: none",
        *[f"  wanted.{i}  saved: none  wanted: float32 (2,)" for i in range(5)],
        "  and 2 more like that",
        "  b.shape  saved: float32 (3, 2)  wanted: float32 (2, 3)",
        "  c.dtype  saved: bfloat16 (2,)  wanted: float32 (2,)",
        "use the configuration it was saved with, or another checkpoint",
    ]
    assert wanted["a.same"].tolist() == [0, 0]


def test_a_run_is_verified_file_by_file(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints", step)
    damage(tmp_path / "checkpoints" / "step_00000002")
    (tmp_path / "checkpoints" / "step_00000001" / "optimizer.safetensors").unlink()
    findings = verify_run(tmp_path)
    assert [(str(f.path.relative_to(tmp_path / "checkpoints")), f.ok) for f in findings] == [
        ("step_00000003/manifest.json", True),
        ("step_00000003/model.safetensors", True),
        ("step_00000003/optimizer.safetensors", True),
        ("step_00000002/manifest.json", True),
        ("step_00000002/model.safetensors", False),
        ("step_00000002/optimizer.safetensors", True),
        ("step_00000001", False),
    ]
    assert "optimizer.safetensors is missing" in findings[-1].detail


def test_a_run_without_checkpoints_has_no_findings_and_no_run_is_an_error(tmp_path: Path):
    assert verify_run(tmp_path) == []
    with pytest.raises(CheckpointError, match="there is no run folder"):
        verify_run(tmp_path / "nowhere")
