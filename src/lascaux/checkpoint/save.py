"""Saving a checkpoint, deleting old ones, and whether there is room.

The caller holds the run's lock (`lock.py`). What a checkpoint is: `manifest.py`. How it comes to be
all at once: `commit.py`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lascaux.checkpoint.commit import (
    commit_folder,
    make_folder,
    remove_leftovers,
    retire_folders,
)
from lascaux.checkpoint.files import FileRecord, write_file
from lascaux.checkpoint.load import list_checkpoints, verify_checkpoint
from lascaux.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    encode_manifest,
    read_manifest,
    step_folder_name,
)
from lascaux.checkpoint.parts import Piece, part_bytes, part_records, write_part
from lascaux.errors import CheckpointError
from lascaux.units import format_bytes


@dataclass(frozen=True, slots=True)
class Others:
    """The other processes that write parts of a checkpoint; the first one publishes it."""

    announce: Callable[[Path], None]
    """tell them the folder to write to"""
    collect: Callable[[], Mapping[str, FileRecord]]
    """wait for their files; raises CheckpointError when one of them failed"""


def save_checkpoint(
    checkpoints: Path,
    *,
    step: int,
    tokens_seen: int,
    tensors: Mapping[str, Sequence[Piece]],
    state: Mapping[str, Any],
    others: Others | None = None,
) -> Path:
    """Write CHECKPOINTS/step_0000STEP, durable when this returns; afterwards it is there or not.

    `tensors` has the pieces of each stem that this process writes; `state` is JSON. A checkpoint of
    this step that is there and intact is never overwritten: it is returned if it holds the same
    tensors (its `state` may differ, elapsed time does), and refused otherwise, as it always is
    where other processes write too. A damaged one is replaced, once the new one is complete.

    Raises: CheckpointError with path, bytes needed and bytes free; nothing of this save is then
    left that a load would find, and older checkpoints are as they were.
    """
    final = checkpoints / step_folder_name(step)
    needed_bytes = sum(part_bytes(pieces) for pieces in tensors.values())

    def write(folder: Path) -> None:
        if others is not None:
            others.announce(folder)
        files = write_tensors(folder, tensors, None if others is None else 0)
        if others is not None:
            files |= others.collect()
        manifest = Manifest(step=step, tokens_seen=tokens_seen, state=state, files=files)
        write_file(folder / MANIFEST_NAME, [encode_manifest(manifest)])

    try:
        make_folder(checkpoints)
        remove_leftovers(checkpoints)
        if _is_intact(final):
            _require_same(final, tokens_seen, tensors, others)
        else:
            commit_folder(final, write)
    except OSError as error:
        raise CheckpointError(
            f"cannot save step {step} in {checkpoints}: {_reason(error)}; it needs "
            f"{format_bytes(needed_bytes)}, {_describe_free(checkpoints.parent)}. The checkpoints "
            "saved before are untouched; make room there or mend what the reason names"
        ) from error
    return final


def write_tensors(
    folder: Path, tensors: Mapping[str, Sequence[Piece]], rank: int | None
) -> dict[str, FileRecord]:
    """One process's files of a checkpoint: `rank` of several, None for the only one.

    Raises: OSError.
    """
    files: dict[str, FileRecord] = {}
    for stem, pieces in tensors.items():
        files |= write_part(folder, stem, pieces, rank)
    return files


def whole_pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Tensors that are no parts of others."""
    return [Piece(name, tensor) for name, tensor in tensors.items()]


def _is_intact(path: Path) -> bool:
    if not os.path.lexists(path):
        return False
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _require_same(
    path: Path,
    tokens_seen: int,
    tensors: Mapping[str, Sequence[Piece]],
    others: Others | None,
) -> None:
    saved = read_manifest(path)
    wanted: dict[str, FileRecord] = {}
    for stem, pieces in tensors.items():
        wanted |= part_records(stem, pieces)
    names = sorted(saved.files.keys() | wanted.keys())
    differing = [name for name in names if saved.files.get(name) != wanted.get(name)]
    if saved.tokens_seen != tokens_seen:
        differing.append(f"tokens_seen, saved: {saved.tokens_seen:,}, wanted: {tokens_seen:,}")
    if others is not None:
        differing = ["what other processes have, perhaps"]
    if differing:
        raise CheckpointError(
            f"{path} holds another checkpoint of step {saved.step}, which is not overwritten; "
            f"different in {'; '.join(differing)}. Move that folder away, or start a new run with "
            "another --run folder"
        )


def remove_old(checkpoints: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, after reading the newest again; 0 keeps all.

    Raises: CheckpointError, without deleting anything, when the newest one is damaged; and when the
    system refuses to delete.
    """
    surplus = list_checkpoints(checkpoints)[keep:] if keep else []
    if surplus:
        verify_checkpoint(list_checkpoints(checkpoints)[0])
    try:
        retire_folders(surplus)
        remove_leftovers(checkpoints)
    except OSError as error:
        raise CheckpointError(
            f"cannot delete old checkpoints in {checkpoints}: {_reason(error)}; delete what begins "
            "with .del_ there yourself, or keep all with --checkpoint.keep=0"
        ) from error


def free_space_problem(folder: Path, needed_bytes: int) -> str | None:
    """Why `needed_bytes` will not fit on the disk of an existing folder, or None if they will."""
    try:
        free_bytes = _free_bytes(folder)
    except OSError as error:
        return f"cannot tell how much room there is for checkpoints in {folder}: {error.strerror}"
    if free_bytes >= needed_bytes:
        return None
    return (
        f"not enough room for checkpoints in {folder}: {format_bytes(needed_bytes)} needed, "
        f"{format_bytes(free_bytes)} free; make room, or take a --run folder on another disk"
    )


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _describe_free(folder: Path) -> str:
    try:
        return f"{format_bytes(_free_bytes(folder))} are free"
    except OSError as error:
        return f"how much is free cannot be told ({error.strerror})"


def _reason(error: OSError) -> str:
    """The system's words and the file, where it names one: a failed write does not."""
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
