"""The manifest: read back equal, and refused whatever else it holds."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lascaux.checkpoint import manifest as module
from lascaux.checkpoint.files import FileRecord
from lascaux.checkpoint.manifest import (
    Manifest,
    encode_manifest,
    read_manifest,
    step_folder_name,
    step_of,
)
from lascaux.errors import CheckpointError
from tests.unit.checkpoint.builders import save, state_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path, 120)


def rewrite(checkpoint: Path, **changes: Any) -> None:
    """An edit by someone who also mends the manifest's own hash."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_bytes()) | changes
    del content["manifest_sha256"]
    content = {name: value for name, value in content.items() if value is not None}
    path.write_bytes(module._encode(content | {"manifest_sha256": module._hash(content)}))


def test_a_manifest_reads_back(checkpoint: Path):
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.tokens_seen) == (120, 120_000)
    assert manifest.state == state_of(120)
    assert encode_manifest(manifest) == (checkpoint / "manifest.json").read_bytes()


def test_floats_in_the_state_keep_their_bits():
    numbers = [0.1, 1e-300, 5e-324, 1.7976931348623157e308, -0.0, 1 / 3]
    manifest = Manifest(step=0, tokens_seen=0, state={"window": numbers}, files={})
    back = json.loads(encode_manifest(manifest))["state"]["window"]
    assert [number.hex() for number in back] == [number.hex() for number in numbers]


def test_equal_manifests_give_equal_bytes():
    files = {"a.safetensors": FileRecord(1, "0" * 64), "b.safetensors": FileRecord(2, "1" * 64)}
    one = Manifest(step=1, tokens_seen=2, state={"x": 1, "y": 2}, files=files)
    two = Manifest(
        step=1, tokens_seen=2, state={"y": 2, "x": 1}, files=dict(reversed(files.items()))
    )
    assert encode_manifest(one) == encode_manifest(two)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_00000120", 120),
        ("step_00000000", 0),
        ("step_123456789", 123456789),
        ("step_120", None),
        ("step_000000120", None),
        ("step_00000120x", None),
        (".tmp_step_00000120_ab", None),
        ("step_٠٠٠٠٠١٢٠", None),
    ],
)
def test_steps_are_read_from_names_that_we_make(name: str, step: int | None):
    assert step_of(name) == step
    assert step is None or step_folder_name(step) == name


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as info:
        read_manifest(checkpoint)
    return str(info.value)


@pytest.mark.parametrize("kept", [0, 1, 50, -1])
def test_a_torn_manifest_is_refused(checkpoint: Path, kept: int):
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refusal(checkpoint)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b'"tokens_seen": 120000', b'"tokens_seen": 120001', "expected manifest_sha256"),
        (b'"d_model": 24', b'"d_model": 48', "expected manifest_sha256"),
        (b'"step": 120', b'"step":  120', "other spacing"),
        (b'"step": 120,', b'"step": 7, "step": 120,', "other spacing"),
        (b"\n}\n", b"\n}\n\n", "other spacing"),
        (b'"format": 1', b'"format": 2', "has format 2; this version of Lascaux reads format 1"),
        (b'"format": 1', b'"format": true', "no format number"),
        (b'"step": 120', b'"step": NaN', "JSON we never write"),
        (b'"step": 120', b'"step": ' + b"9" * 5000, "not JSON"),
        (b'"step": 120', b'"step": ' + b"[" * 100_000, "not JSON"),
        (b'"manifest_sha256"', b'"manifest_sha255"', "expected manifest_sha256"),
    ],
)
def test_an_edited_manifest_is_refused(checkpoint: Path, old: bytes, new: bytes, found: str):
    path = checkpoint / "manifest.json"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    message = refusal(checkpoint)
    assert str(path) in message and found in message and len(message) < 700


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"step": -1}, "step -1"),
        ({"step": True}, "step True"),
        ({"tokens_seen": 1.0}, "tokens_seen 1.0"),
        ({"tokens_seen": None}, "other entries"),
        ({"more": 1}, "other entries"),
        ({"state": []}, "state that is not an object"),
        ({"files": []}, "files that is not an object"),
        ({"files": {"../model.safetensors": {}}}, "the file name '../model.safetensors'"),
        ({"files": {"model.bin": {}}}, "the file name 'model.bin'"),
        ({"files": {"model.safetensors": {"bytes": 1}}}, "without exactly bytes and sha256"),
        ({"files": {"model.safetensors": {"bytes": -1, "sha256": "0" * 64}}}, "-1 bytes"),
        ({"files": {"model.safetensors": {"bytes": 1, "sha256": "0" * 63}}}, "64 hexadecimal"),
    ],
)
def test_a_manifest_with_a_right_hash_and_wrong_content_is_refused(
    checkpoint: Path, changes: dict[str, Any], found: str
):
    rewrite(checkpoint, **changes)
    message = refusal(checkpoint)
    assert str(checkpoint / "manifest.json") in message and found in message


def test_a_manifest_that_is_no_object_is_refused(checkpoint: Path):
    (checkpoint / "manifest.json").write_bytes(b"[]\n")
    assert "JSON of type list" in refusal(checkpoint)


def test_a_manifest_without_end_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LARGEST_MANIFEST_BYTES", 100)
    assert "more than 100 bytes" in refusal(checkpoint)


def test_a_folder_of_another_step_is_refused(checkpoint: Path):
    moved = checkpoint.rename(checkpoint.with_name("step_00000140"))
    assert "expected step 140 from the folder's name, found step 120" in refusal(moved)


def test_a_copy_under_another_name_is_a_checkpoint(checkpoint: Path, tmp_path: Path):
    shutil.copytree(checkpoint, tmp_path / "my-model")
    assert read_manifest(tmp_path / "my-model").step == 120


def test_a_missing_file_is_named(checkpoint: Path):
    (checkpoint / "model.safetensors").unlink()
    assert str(checkpoint / "model.safetensors") + " is missing" in refusal(checkpoint)


def test_a_file_too_many_is_named(checkpoint: Path):
    (checkpoint / "notes.txt").touch()
    assert str(checkpoint / "notes.txt") + " does not belong" in refusal(checkpoint)


def test_a_missing_manifest_or_folder_is_named(checkpoint: Path):
    (checkpoint / "manifest.json").unlink()
    assert "manifest.json cannot be read: No such file" in refusal(checkpoint)
    assert "no such folder" in refusal(checkpoint / "nowhere")
