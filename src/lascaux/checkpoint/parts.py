"""Tensors of a checkpoint over several files: cut into pieces when saved, put together when read.

STEM.safetensors has whole tensors. What several processes saved, or what is large, lies in
STEM_RRRRR_NNNNN.safetensors, file N of process R: each has pieces of tensors and says where they
belong. Any slab of any tensor can be read, one file in memory at a time.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lascaux.checkpoint.files import (
    WHAT_TO_DO,
    FileRecord,
    open_regular,
    read_checked,
    record_of,
    unreadable,
    write_file,
)
from lascaux.checkpoint.tensor_file import (
    Place,
    Saved,
    decode,
    describe_file,
    encode,
    encoded_bytes,
    header_bytes,
)
from lascaux.errors import CheckpointError

LARGEST_FILE_BYTES = 1 << 30
Slab = tuple[slice, ...]
"""a range for every dimension"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to be saved, or the part of it that lies at `place`."""

    name: str
    tensor: Tensor
    place: Place | None = None


def part_bytes(pieces: Sequence[Piece]) -> int:
    """What `write_part` writes, headers included."""
    return sum(encoded_bytes(*_contents(group)) for group in _groups(pieces))


def write_part(
    folder: Path, stem: str, pieces: Sequence[Piece], rank: int | None
) -> dict[str, FileRecord]:
    """Write the pieces of one process, `rank` of several or None for the only one.

    Files have at most `LARGEST_FILE_BYTES` and a row; larger tensors are cut along their first
    dimension. Raises: OSError.
    """
    return {
        name: write_file(folder / name, encode(*_contents(group)))
        for name, group in _files(stem, pieces, rank).items()
    }


def part_records(stem: str, pieces: Sequence[Piece]) -> dict[str, FileRecord]:
    """What `write_part` would return for the only process, without files."""
    files = _files(stem, pieces, None)
    return {name: record_of(encode(*_contents(group))) for name, group in files.items()}


def _files(stem: str, pieces: Sequence[Piece], rank: int | None) -> dict[str, list[Piece]]:
    groups = list(_groups(pieces))
    if rank is None and len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}_{rank or 0:05d}_{n:05d}.safetensors": group for n, group in enumerate(groups)}


def _contents(group: Sequence[Piece]) -> tuple[dict[str, Tensor], dict[str, Place]]:
    tensors = {piece.name: piece.tensor for piece in group}
    return tensors, {piece.name: piece.place for piece in group if piece.place is not None}


def _groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces of each file; one file, perhaps without tensors, at least."""
    group: list[Piece] = []
    held = 0
    for small in (cut for piece in pieces for cut in _cut(piece)):
        if group and held + small.tensor.nbytes > LARGEST_FILE_BYTES:
            yield group
            group, held = [], 0
        group.append(small)
        held += small.tensor.nbytes
    yield group


def _cut(piece: Piece) -> Iterator[Piece]:
    """The piece, or rows of it that fit a file each."""
    tensor = piece.tensor
    if tensor.nbytes <= LARGEST_FILE_BYTES or tensor.ndim == 0:
        yield piece
        return
    place = piece.place or Place((0,) * tensor.ndim, tuple(tensor.shape))
    rows = max(1, LARGEST_FILE_BYTES * len(tensor) // tensor.nbytes)
    for first in range(0, len(tensor), rows):
        start = (place.start[0] + first, *place.start[1:])
        yield Piece(piece.name, tensor[first : first + rows], Place(start, place.shape))


def files_of(stem: str, names: Mapping[str, FileRecord]) -> list[str]:
    """The files that hold a stem's tensors."""
    pattern = re.compile(rf"{re.escape(stem)}(_\d{{5,}}_\d{{5,}})?\.safetensors", re.ASCII)
    return sorted(name for name in names if pattern.fullmatch(name))


def saved_tensors(folder: Path, files: Mapping[str, FileRecord], stem: str) -> dict[str, Tensor]:
    """Every tensor that is saved, whole, on the meta device, as the headers say.

    The headers count as read only when `read_slabs` has compared their files with the records.
    Raises: CheckpointError for headers that contradict each other.
    """
    found: dict[str, Tensor] = {}
    for name in files_of(stem, files):
        for tensor, saved in _headers(folder / name).items():
            whole = torch.empty(saved.place.shape, dtype=saved.dtype, device="meta")
            other = found.setdefault(tensor, whole)
            if (other.shape, other.dtype) != (whole.shape, whole.dtype):
                raise CheckpointError(
                    f"{folder / name} has a part of {tensor} of shape {tuple(whole.shape)}, "
                    f"another file one of shape {tuple(other.shape)}"
                )
    return found


def tensors_by_file(
    folder: Path, files: Mapping[str, FileRecord], stem: str
) -> dict[str, frozenset[str]]:
    """The names of the tensors that each of a stem's files has, or parts of them."""
    return {name: frozenset(_headers(folder / name)) for name in files_of(stem, files)}


def _headers(path: Path) -> dict[str, Saved]:
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            start += file.read(header_bytes(path, start) - 8)
        except OSError as error:
            raise unreadable(path, error) from error
    return describe_file(path, start, size)


def read_slabs(
    folder: Path,
    files: Mapping[str, FileRecord],
    stem: str,
    wanted: Mapping[str, Slab] | None = None,
) -> dict[str, Tensor]:
    """The wanted ranges of saved tensors, on the CPU, or all tensors whole.

    A file whose header has nothing of them is not read further; of the others nothing is taken but
    from the very bytes that were hashed.
    Raises: CheckpointError for a damaged file, and for a range that no file has.
    """
    found: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for name in files_of(stem, files):
        path = folder / name
        if wanted is not None and not _has_any(_headers(path), wanted):
            continue
        content = read_checked(path, files[name])
        pieces = decode(path, content)
        for tensor, saved in describe_file(path, content, len(content)).items():
            if wanted is not None and tensor not in wanted:
                continue
            slab = None if wanted is None else wanted[tensor]
            most = 2 * pieces[tensor].nbytes > len(content)
            if most and slab == tuple(slice(0, size) for size in saved.place.shape):
                slab = None  # a view costs less than a copy
            filled[tensor] = filled.get(tensor, 0) + _put(
                found, tensor, pieces[tensor], saved, slab
            )
    for tensor in wanted or found:
        if tensor not in found or filled[tensor] != found[tensor].numel():
            raise CheckpointError(f"{folder} has not all of '{tensor}' in {stem}; {WHAT_TO_DO}")
    return found


def _has_any(headers: Mapping[str, Saved], wanted: Mapping[str, Slab]) -> bool:
    here = headers.keys() & wanted.keys()
    return any(0 in _shape(wanted[t]) or _overlap(wanted[t], headers[t]) for t in here)


def _put(found: dict[str, Tensor], name: str, part: Tensor, saved: Saved, slab: Slab | None) -> int:
    """Copy what a file has of a slab into its place; returns how many elements that is."""
    if slab is None and saved.shape == saved.place.shape:
        found[name] = part  # a view of what was read: nothing is held twice
        return part.numel()
    slab = slab or tuple(slice(0, size) for size in saved.place.shape)
    if name not in found:
        found[name] = torch.empty(_shape(slab), dtype=saved.dtype)
    overlap = _overlap(slab, saved)
    if overlap is None:
        return 0
    source, target = overlap
    found[name][target] = part[source]
    return part[source].numel()


def _shape(slab: Slab) -> tuple[int, ...]:
    return tuple(wanted.stop - wanted.start for wanted in slab)


def _overlap(slab: Slab, saved: Saved) -> tuple[Slab, Slab] | None:
    """The ranges, in the file's tensor and in the slab, of what both have; None for nothing."""
    source: list[slice] = []
    target: list[slice] = []
    for wanted, start, size in zip(slab, saved.place.start, saved.shape, strict=True):
        first, last = max(wanted.start, start), min(wanted.stop, start + size)
        if first >= last:
            return None
        source.append(slice(first - start, last - start))
        target.append(slice(first - wanted.start, last - wanted.start))
    return tuple(source), tuple(target)
