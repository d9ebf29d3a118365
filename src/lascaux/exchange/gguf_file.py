"""GGUF, llama.cpp's file of a whole model: metadata, and where each tensor lies.

The header is read here, because the gguf library believes what a header says: every length, count
and offset is held against the file before anything is read or made. The library knows the types of
numbers, and turns quantised ones into fp32. Format: docs/gguf.md of ggml, versions 2 and 3.
"""

import io
import math
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from lascaux.checkpoint.files import shown
from lascaux.errors import CheckpointError
from lascaux.exchange.stored import Stored, open_for_reading, read_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""type numbers of metadata, and how struct and numpy call them"""
STRING, ARRAY = 8, 9
MOST_TENSORS = 100_000
MOST_KEYS = 100_000
MOST_STRINGS = 1 << 22
LONGEST_STRING = 16 << 20
MOST_DIMS = 4
LARGEST_ALIGNMENT = 1 << 16
SLAB_BYTES = 8 << 20
"""of quantised numbers that are turned into fp32 at a time"""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a file says of its model, and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in the header."""

    name: str
    shape: tuple[int, ...]
    """outermost dimension first, the other way round than in the file"""
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


def open_gguf(path: Path, stack: ExitStack) -> GgufFile:
    """The header of a file whose tensors are readable while the stack is open.

    Raises: CheckpointError for a file that is damaged, lies about itself, or has a type of numbers
    that the gguf library does not turn into fp32.
    """
    descriptor = open_for_reading(path, stack)
    size = os.fstat(descriptor).st_size
    header = Header(path, io.BufferedReader(io.FileIO(descriptor, closefd=False)), size)
    if header.take(4) != MAGIC:
        raise header.damaged("another beginning than 'GGUF'")
    version = header.number("I")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path} is GGUF of version {version}, Lascaux reads {VERSIONS}; convert the model "
            "again with llama.cpp of today, in little-endian byte order"
        )
    num_tensors, num_keys = header.count("Q", MOST_TENSORS), header.count("Q", MOST_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = header.string()
        if key in metadata:
            raise header.damaged(f"the key {shown(key)} twice")
        metadata[key] = header.value(header.number("I"))
    entries = [header.entry() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= LARGEST_ALIGNMENT:
        raise header.damaged(f"general.alignment {shown(alignment)}")
    data_start = -(-header.position // alignment) * alignment
    check_places(header, entries, alignment, size - data_start)
    tensors = {
        entry.name: Stored(
            path=path,
            name=entry.name,
            shape=entry.shape,
            dtype=entry.kind.name,
            load=lambda entry=entry: dequantised(path, descriptor, data_start, entry),
        )
        for entry in entries
    }
    return GgufFile(path, metadata, tensors)


class Header:
    """The beginning of a file, read value by value; nothing is taken that the file has not."""

    def __init__(self, path: Path, file: io.BufferedReader, size: int) -> None:
        self.path, self.position = path, 0
        self._file, self._size = file, size

    def damaged(self, found: str) -> CheckpointError:
        """The error for something that cannot be."""
        return CheckpointError(
            f"{self.path} is no valid GGUF file: found {found}; download it again"
        )

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        if num_bytes > self._size - self.position:
            raise self.damaged(
                f"{num_bytes:,} bytes announced at byte {self.position:,} of {self._size:,}"
            )
        try:
            content = self._file.read(num_bytes)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(content) != num_bytes:
            raise self.damaged("an end in the middle of a value")
        self.position += num_bytes
        return content

    def number(self, kind: str) -> Any:
        """A number, little-endian."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, kind: str, most: int) -> int:
        """A number of things that follow, each of a byte or more."""
        found = self.number(kind)
        if found > min(most, self._size - self.position):
            raise self.damaged(f"{found:,} entries announced at byte {self.position:,}")
        return found

    def string(self) -> str:
        """A text with its length before it."""
        content = self.take(self.count("Q", LONGEST_STRING))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"text that is not UTF-8 before byte {self.position:,}") from None

    def value(self, kind: int) -> Any:
        """A value of metadata: a number, a text, a list of texts, or an array of numbers."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise self.damaged(f"metadata of the unknown type {kind}")
        inner = self.number("I")
        if inner == STRING:
            return [self.string() for _ in range(self.count("Q", MOST_STRINGS))]
        if inner not in NUMBERS:
            raise self.damaged(f"an array of the type {inner}")
        kind_of_numbers = np.dtype(NUMBERS[inner]).newbyteorder("<")
        length = self.count("Q", self._size)
        return np.frombuffer(self.take(length * kind_of_numbers.itemsize), kind_of_numbers)

    def entry(self) -> Entry:
        """A tensor's name, dimensions, type and place."""
        name = self.string()
        dims = [self.number("Q") for _ in range(self.count("I", MOST_DIMS))]
        number = self.number("I")
        offset = self.number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self.damaged(f"tensor {shown(name)} of the unknown type {number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        elements = math.prod(dims)
        if not dims or not 0 < elements < 1 << 60 or dims[0] % block:
            raise self.damaged(f"tensor {shown(name)} of shape {shown(dims)}")
        return Entry(name, tuple(reversed(dims)), kind, offset, elements // block * block_bytes)


def check_places(header: Header, entries: Sequence[Entry], alignment: int, data_bytes: int) -> None:
    """Raises: CheckpointError unless every tensor has bytes of its own in the file."""
    end, before = 0, ""
    for entry in sorted(entries, key=lambda each: each.offset):
        where = f"tensor {shown(entry.name)} at bytes {entry.offset:,} to "
        where += f"{entry.offset + entry.num_bytes:,} of the data"
        if entry.offset % alignment:
            raise header.damaged(f"{where}, not a multiple of {alignment}")
        if entry.offset + entry.num_bytes > data_bytes:
            raise header.damaged(f"{where}, which is {max(data_bytes, 0):,} bytes long")
        if entry.offset < end:
            raise header.damaged(f"{where}, which are those of {shown(before)}")
        end, before = entry.offset + entry.num_bytes, entry.name
    if len({entry.name for entry in entries}) != len(entries):
        raise header.damaged("a tensor twice")
    for kind in {entry.kind for entry in entries}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{header.path} has tensors of type {kind.name}, which the gguf library does not "
                "turn into fp32; take the model in another quantisation"
            ) from None


def dequantised(path: Path, descriptor: int, data_start: int, entry: Entry) -> Tensor:
    """A tensor in fp32; of the quantised numbers a few rows are in memory at a time."""
    numbers = torch.empty(entry.shape, dtype=torch.float32)
    rows = numbers.view(-1, entry.shape[-1])
    row_bytes = entry.num_bytes // len(rows)
    step = max(1, SLAB_BYTES // row_bytes)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        begin = data_start + entry.offset + first * row_bytes
        content = read_bytes(path, descriptor, begin, len(part) * row_bytes).numpy()
        found = dequantize(content.reshape(len(part), row_bytes), entry.kind)
        part.copy_(torch.from_numpy(np.ascontiguousarray(found)))
    return numbers
