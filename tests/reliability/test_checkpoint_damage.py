"""Damaged checkpoints: none loads, each is refused with the name of the damaged file."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lascaux.checkpoint.load import load_tensors, newest_valid, verify_checkpoint
from lascaux.errors import CheckpointError
from tests.unit.checkpoint.builders import folder_in_memory, save

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10000\n"

Damage = Callable[[random.Random, Path], None]


def flip_a_bit(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(rng: random.Random, path: Path) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def append(rng: random.Random, path: Path) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 40)))


def lose_a_block(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    begin = rng.randrange(len(content))
    block = content[begin : begin + 512]
    content[begin : begin + 512] = bytes(len(block)) if any(block) else b"\x01" * len(block)
    path.write_bytes(content)


def shift(rng: random.Random, path: Path) -> None:
    content = path.read_bytes()
    begin = rng.randrange(len(content))
    path.write_bytes(content[:begin] + b"\x00" + content[begin:-1])


def swap_bytes(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    one = rng.randrange(len(content))
    other = next(i for i, byte in enumerate(content) if byte != content[one])
    content[one], content[other] = content[other], content[one]
    path.write_bytes(content)


def empty(rng: random.Random, path: Path) -> None:
    path.write_bytes(b"")


def delete(rng: random.Random, path: Path) -> None:
    path.unlink()


def take_another_steps_file(rng: random.Random, path: Path) -> None:
    shutil.copy(path.parent.parent / "step_00000001" / path.name, path)


def take_a_neighbours_content(rng: random.Random, path: Path) -> None:
    other = rng.choice([name for name in FILES if name != path.name])
    shutil.copy(path.with_name(other), path)


def make_a_folder(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_a_link(rng: random.Random, path: Path) -> None:
    target = path.parent.parent / f"{path.name}.moved"
    path.rename(target)
    path.symlink_to(target)


def make_a_pointer(rng: random.Random, path: Path) -> None:
    path.write_bytes(LFS_POINTER)


def add_a_file(rng: random.Random, path: Path) -> None:
    path.with_name("extra.safetensors").write_bytes(rng.randbytes(8))


KINDS = [
    pytest.param(flip_a_bit, 500, id=flip_a_bit.__name__),
    pytest.param(truncate, 150, id=truncate.__name__),
    pytest.param(append, 80, id=append.__name__),
    pytest.param(lose_a_block, 80, id=lose_a_block.__name__),
    pytest.param(shift, 80, id=shift.__name__),
    pytest.param(swap_bytes, 80, id=swap_bytes.__name__),
    pytest.param(take_another_steps_file, 1, id=take_another_steps_file.__name__),
    pytest.param(take_a_neighbours_content, 4, id=take_a_neighbours_content.__name__),
    pytest.param(empty, 1, id=empty.__name__),
    pytest.param(delete, 1, id=delete.__name__),
    pytest.param(make_a_folder, 1, id=make_a_folder.__name__),
    pytest.param(make_a_link, 1, id=make_a_link.__name__),
    pytest.param(make_a_pointer, 1, id=make_a_pointer.__name__),
    pytest.param(add_a_file, 1, id=add_a_file.__name__),
]


@pytest.fixture(scope="module")
def intact() -> Iterator[Path]:
    with folder_in_memory() as folder:
        save(folder, 1)
        save(folder, 2)
        yield folder


def assert_refused(folder: Path, named: str) -> None:
    path = folder / "step_00000002"
    with pytest.raises(CheckpointError) as info:
        verify_checkpoint(path)
    assert str(path / named) in str(info.value)
    found, rejected = newest_valid(folder)
    assert found == folder / "step_00000001"
    assert [str(error) for error in rejected] == [str(info.value)]
    stems = ("model", "optimizer") if named == "manifest.json" else (Path(named).stem,)
    for stem in stems:
        with pytest.raises(CheckpointError, match=named):
            load_tensors(path, stem)


@pytest.mark.parametrize(("damage", "count"), KINDS)
def test_no_damaged_checkpoint_loads(intact: Path, damage: Damage, count: int):
    rng = random.Random(damage.__name__)
    for name in FILES:
        for _ in range(count):
            with folder_in_memory() as folder:
                shutil.copytree(intact, folder, dirs_exist_ok=True)
                damage(rng, folder / "step_00000002" / name)
                named = "extra.safetensors" if damage is add_a_file else name
                assert_refused(folder, named)


def test_no_bit_of_the_manifest_is_without_effect(intact: Path):
    with folder_in_memory() as folder:
        shutil.copytree(intact, folder, dirs_exist_ok=True)
        path = folder / "step_00000002" / "manifest.json"
        original = path.read_bytes()
        for place in range(len(original)):
            mutant = bytearray(original)
            mutant[place] ^= 1 << place % 8
            path.write_bytes(mutant)
            with pytest.raises(CheckpointError, match="manifest.json"):
                verify_checkpoint(path.parent)


def test_exchanged_files_of_one_checkpoint_are_refused(intact: Path):
    with folder_in_memory() as folder:
        shutil.copytree(intact, folder, dirs_exist_ok=True)
        path = folder / "step_00000002"
        (path / "model.safetensors").rename(path / "x")
        (path / "optimizer.safetensors").rename(path / "model.safetensors")
        (path / "x").rename(path / "optimizer.safetensors")
        assert_refused(folder, "model.safetensors")


def test_an_older_checkpoint_under_a_newer_name_is_refused(intact: Path):
    with folder_in_memory() as folder:
        shutil.copytree(intact, folder, dirs_exist_ok=True)
        shutil.rmtree(folder / "step_00000002")
        shutil.copytree(folder / "step_00000001", folder / "step_00000002")
        assert_refused(folder, "manifest.json")


def test_a_checkpoint_that_nobody_can_read_is_passed_over(
    intact: Path, monkeypatch: pytest.MonkeyPatch
):
    with folder_in_memory() as folder:
        shutil.copytree(intact, folder, dirs_exist_ok=True)
        broken = str(folder / "step_00000002" / "model.safetensors")

        def fail_on_broken(path: object, *rest: object, **named: object) -> int:
            if str(path) == broken:
                raise OSError(5, "Input/output error", broken)
            return real_open(path, *rest, **named)  # type: ignore[arg-type]

        real_open = os.open
        monkeypatch.setattr(os, "open", fail_on_broken)
        assert_refused(folder, "model.safetensors")
