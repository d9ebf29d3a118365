"""Finding checkpoints and loading them; nothing is handed out before its hash is right.

Readers take no lock: they look at committed folders only, and those never change, though a trainer
may delete one. What a checkpoint is: `manifest.py`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lascaux.checkpoint.files import FileRecord, check_file, unreadable
from lascaux.checkpoint.manifest import read_manifest, step_of
from lascaux.checkpoint.parts import (
    Slab,
    files_of,
    read_slabs,
    saved_tensors,
    tensors_by_file,
)
from lascaux.errors import CheckpointError

DIFFERENCES_SHOWN = 5


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The folders named step_..., newest first, unverified; none if there is no such folder.

    Raises: CheckpointError if the folder cannot be read.
    """
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(checkpoints, error) from error
    steps = sorted((step, name) for name in names if (step := step_of(name)) is not None)
    return [checkpoints / name for _, name in reversed(steps)]


def verify_checkpoint(path: Path, part: int = 0, parts: int = 1) -> None:
    """Read a whole checkpoint, 256 KiB at a time, or every `parts`-th of its files.

    Raises: CheckpointError naming the first bad file, what was expected and what was found.
    """
    for name, record in list(read_manifest(path).files.items())[part::parts]:
        check_file(path / name, record)


def newest_valid(
    checkpoints: Path,
    paths: Sequence[Path] | None = None,
    verify: Callable[[Path], None] = verify_checkpoint,
) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one.

    Of `paths`, newest first, or of all there are; a checkpoint that a trainer deletes at this
    moment is then no damaged one: the list is read again.
    """
    while True:
        rejected: list[CheckpointError] = []
        for path in list_checkpoints(checkpoints) if paths is None else paths:
            try:
                verify(path)
            except CheckpointError as error:
                if paths is None and not os.path.lexists(path):
                    break
                rejected.append(error)
            else:
                return path, rejected
        else:
            return None, rejected


def load_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a stem in a checkpoint, whole, on the CPU.

    A file that holds whole tensors is read into memory once, hashed there, and the tensors are
    views of those bytes: its size is all the memory it takes, until the last of them is gone.

    Raises: CheckpointError if the manifest or a file is not what was saved.
    """
    return read_slabs(path, files_with(path, stem), stem)


def stream_tensors(path: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a stem, whole, on the CPU; memory holds those of one file at a time.

    Tensors of which several files have parts come last and together.
    Raises: CheckpointError if the manifest or a file is not what was saved.
    """
    files = files_with(path, stem)
    inside = tensors_by_file(path, files, stem)
    places = Counter(name for names in inside.values() for name in names)
    for file_name, names in inside.items():
        if names and all(places[name] == 1 for name in names):
            yield from read_slabs(path, {file_name: files[file_name]}, stem).items()
    shapes = {name: tensor.shape for name, tensor in describe_tensors(path, stem).items()}
    shared = {
        name for names in inside.values() if any(places[n] > 1 for n in names) for name in names
    }
    if shared:
        wanted = {name: tuple(slice(0, size) for size in shapes[name]) for name in sorted(shared)}
        yield from read_slabs(path, files, stem, wanted).items()


def load_slabs(path: Path, stem: str, wanted: Mapping[str, Slab]) -> dict[str, Tensor]:
    """Ranges of a stem's tensors, on the CPU; files without a part of them are not read.

    Raises: CheckpointError if the manifest or a file is not what was saved, or lacks a range.
    """
    return read_slabs(path, files_with(path, stem), stem, wanted)


def describe_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """Every tensor of a stem on the meta device: name, whole shape and dtype.

    Raises: CheckpointError if there are none, or a header is damaged.
    """
    return saved_tensors(path, files_with(path, stem), stem)


def files_with(path: Path, stem: str) -> Mapping[str, FileRecord]:
    """The files of a checkpoint that has this stem."""
    files = read_manifest(path).files
    if not files_of(stem, files):
        raise CheckpointError(
            f"{path} has no {stem}.safetensors; found: {', '.join(sorted(files))}"
        )
    return files


def copy_into(module_state: Mapping[str, Tensor], loaded: Mapping[str, Tensor], what: str) -> None:
    """Copy loaded tensors into those of the same names, on whatever device they are.

    Raises: CheckpointError, with nothing changed, unless names, shapes and dtypes are the same.
    """
    check_fits(module_state, loaded, what)
    with torch.no_grad():
        for name, tensor in module_state.items():
            tensor.copy_(loaded[name])


def check_fits(wanted: Mapping[str, Tensor], loaded: Mapping[str, Tensor], what: str) -> None:
    """Raises: CheckpointError unless names, shapes and dtypes are the same."""
    differences = _differences(loaded, wanted)
    if differences:
        raise CheckpointError(
            f"the saved {what} does not fit this configuration:\n"
            + "\n".join(differences)
            + "\nuse the configuration it was saved with, or another checkpoint"
        )


def _differences(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Lines of a message, the first few of each kind of difference."""
    only_saved = sorted(saved.keys() - wanted.keys())
    only_wanted = sorted(wanted.keys() - saved.keys())
    changed = sorted(
        name
        for name in saved.keys() & wanted.keys()
        if _describe(saved[name]) != _describe(wanted[name])
    )
    return [
        *_first([f"{name}  saved: {_describe(saved[name])}  wanted: none" for name in only_saved]),
        *_first(
            [f"{name}  saved: none  wanted: {_describe(wanted[name])}" for name in only_wanted]
        ),
        *_first(
            [
                f"{name}  saved: {_describe(saved[name])}  wanted: {_describe(wanted[name])}"
                for name in changed
            ]
        ),
    ]


def _first(lines: list[str]) -> list[str]:
    rest = len(lines) - DIFFERENCES_SHOWN
    more = [f"  and {rest} more like that"] if rest > 0 else []
    return [f"  {line}" for line in lines[:DIFFERENCES_SHOWN]] + more


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
