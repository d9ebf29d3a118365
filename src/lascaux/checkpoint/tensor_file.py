"""The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes.

We write and read it ourselves because the library neither hashes while it writes nor syncs, builds
a file in memory or leaves it unsynced, and maps what it reads, so that the bytes used need not be
the bytes that were hashed. Other programs read our files as any other safetensors file.

Tensors lie in order of falling item size, then name, without gaps: the same tensors give the same
file, and each one is aligned. Format: https://huggingface.co/docs/safetensors (little-endian).
A tensor may be a part of a larger one; where it begins there and the whole shape stand in the
header's metadata under its name, as JSON: [[starts], [shape]].
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lascaux.checkpoint.files import WHAT_TO_DO, shown
from lascaux.errors import CheckpointError

CHUNK_BYTES = 4 << 20
ALIGNMENT = 8
LARGEST_HEADER_BYTES = 16 << 20
MOST_TENSORS = 100_000
MOST_DIMS = 64

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a larger one."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    """of the whole"""


Places = Mapping[str, Place]
"""of the tensors that are parts"""


def encoded_bytes(tensors: Mapping[str, Tensor], places: Places | None = None) -> int:
    """The size of the file that `encode` gives."""
    return len(_header(tensors, places or {})) + sum(tensor.nbytes for tensor in tensors.values())


def encode(
    tensors: Mapping[str, Tensor], places: Places | None = None
) -> Iterator[bytes | memoryview]:
    """The file in chunks. What comes from a device exists on the CPU one chunk at a time.

    A tensor that is not contiguous is copied where it is, at most two at a time. Tensors
    that share storage are written one by one.
    """
    yield _header(tensors, places or {})
    for _, tensor in _in_order(tensors):
        for chunk in tensor.detach().reshape(-1).view(torch.uint8).split(CHUNK_BYTES):
            yield chunk.cpu().numpy().data


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(tensors: Mapping[str, Tensor], places: Places) -> bytes:
    entries: dict[str, Any] = {}
    if places:
        entries["__metadata__"] = {
            name: json.dumps([place.start, place.shape]) for name, place in sorted(places.items())
        }
    end = 0
    for name, tensor in _in_order(tensors):
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(entries, separators=(",", ":")).encode("ascii")
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def decode(path: Path, content: bytearray) -> dict[str, Tensor]:
    """The tensors of a file that was read from `path`, as views of its content.

    The memory is given back when the last of them is gone. Every entry is checked against the
    length of the content before a tensor is made.

    Raises: CheckpointError naming the file and the tensor for whatever the format does not allow.
    """
    entries, _, data_start = _read_header(path, content, len(content))
    cursor = data_start
    placed: list[tuple[str, torch.dtype, list[int], int]] = []
    for name, entry in entries:
        dtype, shape, begin, end = _check_entry(path, name, entry)
        if (data_start + begin, data_start + end) != (cursor, cursor + _size(dtype, shape)):
            raise _damaged(
                path,
                f"tensor {shown(name)} at bytes {begin} to {end} of the data, not "
                f"{cursor - data_start} to {cursor - data_start + _size(dtype, shape)}",
            )
        if cursor % dtype.itemsize:
            raise _damaged(
                path, f"tensor {shown(name)} at byte {cursor}, not aligned to its item size"
            )
        placed.append((name, dtype, shape, cursor))
        cursor = data_start + end
    if cursor != len(content):
        raise _damaged(path, f"{len(content):,} bytes; its header describes {cursor:,}")
    return {name: _view(content, dtype, shape, start) for name, dtype, shape, start in placed}


@dataclass(frozen=True, slots=True)
class Saved:
    """What a header says of one tensor in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """in this file"""
    place: Place


def describe_file(path: Path, start: bytes | bytearray, size: int) -> dict[str, Saved]:
    """What a file of `size` bytes holds, from its beginning, which must have the whole header.

    Raises: CheckpointError for whatever the format does not allow, and for a part that is not
    inside its whole.
    """
    entries, metadata, _ = _read_header(path, start, size)
    found: dict[str, Saved] = {}
    for name, entry in entries:
        dtype, shape, _, _ = _check_entry(path, name, entry)
        place = Place((0,) * len(shape), tuple(shape))
        if name in metadata:
            place = _parse_place(path, name, metadata[name])
            ends = [a + n for a, n in zip(place.start, shape, strict=False)]
            lengths = {len(shape), len(place.start), len(place.shape)}
            if len(lengths) > 1 or any(e > n for e, n in zip(ends, place.shape, strict=True)):
                raise _damaged(path, f"tensor {shown(name)} at {shown(metadata[name])}")
        found[name] = Saved(dtype, tuple(shape), place)
    return found


def header_bytes(path: Path, first_eight: bytes) -> int:
    """How many bytes from the start of a file `describe_file` needs."""
    length = int.from_bytes(first_eight, "little")
    if len(first_eight) < 8 or length > LARGEST_HEADER_BYTES:
        raise _damaged(path, f"a header of {length:,} bytes")
    return 8 + length


def _parse_place(path: Path, name: str, text: Any) -> Place:
    try:
        start, shape = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, f"tensor {shown(name)} at {shown(text)}") from error
    if not _are_counts(start) or not _are_counts(shape) or not _is_addressable(shape):
        raise _damaged(path, f"tensor {shown(name)} at {shown(text)}")
    return Place(tuple(start), tuple(shape))


def _read_header(
    path: Path, content: bytes | bytearray, size: int
) -> tuple[list[tuple[str, Any]], dict[str, Any], int]:
    """Entries, metadata, and where the data begins; `size` is that of the whole file."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(size - 8, LARGEST_HEADER_BYTES):
        raise _damaged(path, f"a header of {length:,} bytes in a file of {size:,}")
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"a header that is not valid JSON ({error})") from error
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise _damaged(path, f"a header that is not an object of at most {MOST_TENSORS:,} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "metadata that is not an object")
    return list(header.items()), metadata, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _check_entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {shown(name)} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"tensor {shown(name)} of dtype {shown(dtype)}")
    if not _are_counts(shape) or not _is_addressable(shape):
        raise _damaged(path, f"tensor {shown(name)} of shape {shown(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {shown(name)} with data_offsets {shown(offsets)}")
    return DTYPES[dtype], shape, offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _is_addressable(shape: list[int]) -> bool:
    """Whether torch can hold the strides, in which a size of 0 counts as 1."""
    return len(shape) <= MOST_DIMS and math.prod(max(size, 1) for size in shape) < 1 << 60


def _size(dtype: torch.dtype, shape: list[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _view(content: bytearray, dtype: torch.dtype, shape: list[int], start: int) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start).reshape(shape)


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path} is no valid safetensors file: found {found}; {WHAT_TO_DO}")
