"""The manifest of a checkpoint: what it is, which files it consists of, and a hash of everything.

A folder `step_00000120` is a checkpoint if its `manifest.json` is exactly what `encode_manifest`
writes and the folder holds the files it lists and no others. Names, shapes and dtypes of tensors
stand in the header of each safetensors file, whose hash is here. Standard library only.

`manifest.json`: format, step, tokens_seen, state, files {NAME: {bytes, sha256}}, manifest_sha256
(of the same JSON without this entry). Keys sorted, two spaces of indent, floats as Python prints
them, which gives back the same bits.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lascaux.checkpoint.files import WHAT_TO_DO, FileRecord, open_regular, shown, unreadable
from lascaux.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = 1
LARGEST_MANIFEST_BYTES = 16 << 20
STEP_FOLDER = re.compile(r"step_(\d{8,})", re.ASCII)
FILE_NAME = re.compile(r"[A-Za-z0-9_]+\.safetensors", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A checkpoint without its tensors; `state` is JSON that belongs to the trainer."""

    step: int
    tokens_seen: int
    state: Mapping[str, Any]
    files: Mapping[str, FileRecord]


def step_folder_name(step: int) -> str:
    """The name of a checkpoint's folder: 'step_00000120'."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a folder's name, or None if `step_folder_name` never makes that name."""
    match = STEP_FOLDER.fullmatch(name)
    if match is None or step_folder_name(int(match[1])) != name:
        return None
    return int(match[1])


def encode_manifest(manifest: Manifest) -> bytes:
    """The content of manifest.json: equal manifests give equal bytes."""
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "tokens_seen": manifest.tokens_seen,
        "state": dict(manifest.state),
        "files": {
            name: {"bytes": record.size, "sha256": record.sha256}
            for name, record in manifest.files.items()
        },
    }
    encoded = _encode(content | {"manifest_sha256": _hash(content)})
    assert len(encoded) <= LARGEST_MANIFEST_BYTES
    return encoded


def _encode(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_encode(content)).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, itself checked; sizes and hashes of the files are not.

    Raises: CheckpointError if it is missing, torn, edited, of another format or of another step
    than the folder's name says, or if the folder lacks a file or holds one too many.
    """
    names = _names(folder)
    path = folder / MANIFEST_NAME
    manifest = _parse(path, _read(path))
    named = step_of(folder.name)
    if named is not None and named != manifest.step:
        raise CheckpointError(
            f"{path} is of another checkpoint: expected step {named} from the folder's name, found "
            f"step {manifest.step}; {WHAT_TO_DO}"
        )
    _check_names(folder, names, manifest)
    return manifest


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {folder}: no such folder") from error
    except OSError as error:
        raise unreadable(folder, error) from error


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        try:
            content = file.read(LARGEST_MANIFEST_BYTES + 1)
        except OSError as error:
            raise unreadable(path, error) from error
    if len(content) > LARGEST_MANIFEST_BYTES:
        raise _damaged(path, f"more than {LARGEST_MANIFEST_BYTES:,} bytes")
    return content


def _parse(path: Path, encoded: bytes) -> Manifest:
    try:
        content = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{len(encoded):,} bytes that are not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"JSON of type {type(content).__name__}, not an object")
    found = content.get("format")
    if type(found) is not int:
        raise _damaged(path, "no format number")
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {shown(found)}; this version of Lascaux reads format {FORMAT}: use "
            "the version that wrote the checkpoint"
        )
    _check_own_hash(path, content, encoded)
    return _to_manifest(path, content)


def _check_own_hash(path: Path, content: dict[str, Any], encoded: bytes) -> None:
    rest = {name: value for name, value in content.items() if name != "manifest_sha256"}
    try:
        expected = _hash(rest)
        canonical = _encode(rest | {"manifest_sha256": expected})
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"JSON we never write ({error})") from error
    if content.get("manifest_sha256") != expected:
        raise CheckpointError(
            f"{path} is damaged: expected manifest_sha256 {expected} for its content, found "
            f"{shown(content.get('manifest_sha256'))}; {WHAT_TO_DO}"
        )
    if encoded != canonical:
        raise _damaged(path, "other spacing, order or spelling than was written")


def _to_manifest(path: Path, content: dict[str, Any]) -> Manifest:
    wanted = {"format", "step", "tokens_seen", "state", "files", "manifest_sha256"}
    if content.keys() != wanted:
        raise _damaged(path, f"other entries than {', '.join(sorted(wanted))}")
    for name in ("step", "tokens_seen"):
        if type(content[name]) is not int or content[name] < 0:
            raise _damaged(path, f"{name} {shown(content[name])}, not a whole number of 0 or more")
    for name in ("state", "files"):
        if not isinstance(content[name], dict):
            raise _damaged(path, f"{name} that is not an object")
    return Manifest(
        step=content["step"],
        tokens_seen=content["tokens_seen"],
        state=content["state"],
        files={name: _to_record(path, name, entry) for name, entry in content["files"].items()},
    )


def _to_record(path: Path, name: str, entry: Any) -> FileRecord:
    if FILE_NAME.fullmatch(name) is None:
        raise _damaged(path, f"the file name {shown(name)}, not of the form STEM.safetensors")
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        raise _damaged(path, f"an entry of {name} without exactly bytes and sha256")
    size, sha256 = entry["bytes"], entry["sha256"]
    if type(size) is not int or size < 0:
        raise _damaged(path, f"{shown(size)} bytes for {name}, not a whole number of 0 or more")
    if not isinstance(sha256, str) or SHA256.fullmatch(sha256) is None:
        raise _damaged(path, f"a sha256 of {name} that is not 64 hexadecimal digits")
    return FileRecord(size, sha256)


def _check_names(folder: Path, found: set[str], manifest: Manifest) -> None:
    wanted = {MANIFEST_NAME, *manifest.files}
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise CheckpointError(
            f"{folder / missing[0]} is missing: expected {len(wanted)} files in the checkpoint, "
            f"found {len(wanted) - len(missing)} of them; {WHAT_TO_DO}"
        )
    if extra:
        raise CheckpointError(
            f"{folder / extra[0]} does not belong to the checkpoint: expected only "
            f"{', '.join(sorted(wanted))}, found {len(extra)} more; move it out of that folder"
        )


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: expected the manifest of a checkpoint, found {found}; {WHAT_TO_DO}"
    )
