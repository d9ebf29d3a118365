"""A tensor that lies in somebody's file, and reading its bytes.

Files are read, not mapped: pages of a mapped file would stay in our memory until the end.
"""

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lascaux.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor's place: its file, its name there, its shape and type."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]

    def read(self) -> Tensor:
        """Its numbers, on the CPU. Raises: CheckpointError where the file cannot be read."""
        return self.load()


def open_for_reading(path: Path, stack: ExitStack) -> int:
    """The descriptor of a regular file, or of one that a link leads to, while the stack is open.

    Raises: CheckpointError for anything else.
    """
    try:
        # O_NONBLOCK keeps a pipe of that name from holding us up; a regular file ignores it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    stack.callback(os.close, descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise CheckpointError(f"{path} must be a file, not a folder or a device")
    return descriptor


def read_bytes(path: Path, descriptor: int, begin: int, num_bytes: int) -> Tensor:
    """A range of an open file, shape (num_bytes,), uint8.

    Raises: CheckpointError where it ends before, or cannot be read.
    """
    content = torch.empty(num_bytes, dtype=torch.uint8)
    rest = content.numpy().data
    try:
        while rest and (count := os.preadv(descriptor, [rest], begin + num_bytes - len(rest))):
            rest = rest[count:]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if rest:
        raise CheckpointError(f"{path} became shorter while it was read; download it again")
    return content
