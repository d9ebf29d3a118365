"""Files of a checkpoint: written once, hashed on the way, synced; read back only if they match.

Standard library only. OSErrors of writing are left to the caller, which abandons the whole
checkpoint; what is wrong with a file that is read becomes a CheckpointError naming the file.
"""

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lascaux.errors import CheckpointError

WHAT_TO_DO = "restore it from a copy or use another checkpoint"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a manifest says of a file: its bytes and their SHA-256."""

    size: int
    sha256: str


def shown(value: object) -> str:
    """A value from a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Make a new file of the chunks and sync it to disk; the path must not exist.

    Raises: OSError; the file is then worthless, as a second fsync may report success wrongly.
    """
    digest = hashlib.sha256()
    size = 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            _write_all(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(size, digest.hexdigest())


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def record_of(chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """What `write_file` would return, without a file."""
    digest = hashlib.sha256()
    size = 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def open_regular(path: Path) -> io.FileIO:
    """A regular file, opened to read without following a link at its end.

    Raises: CheckpointError for anything else, FileNotFoundError included.
    """
    try:
        # O_NONBLOCK keeps a pipe of that name from holding us up; a regular file ignores it.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(_not_a_file(path)) from error
        raise unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(_not_a_file(path))
    return io.FileIO(descriptor)


def _not_a_file(path: Path) -> str:
    return f"{path} must be a regular file, not a link, a folder or a device; {WHAT_TO_DO}"


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The CheckpointError for a file the operating system does not let us read."""
    return CheckpointError(f"{path} cannot be read: {error.strerror}; {WHAT_TO_DO}")


def check_file(path: Path, record: FileRecord) -> None:
    """Read the whole file, 256 KiB at a time, and compare it with its record.

    Raises: CheckpointError naming the file, what was expected and what was found.
    """
    with open_regular(path) as file:
        check_size(path, os.fstat(file.fileno()).st_size, record)
        try:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(path, error) from error
    check_hash(path, found, record)


def read_checked(path: Path, record: FileRecord) -> bytearray:
    """The content of a file, compared with its record: the very bytes that were hashed.

    Raises: CheckpointError naming the file, what was expected and what was found.
    """
    with open_regular(path) as file:
        check_size(path, os.fstat(file.fileno()).st_size, record)
        content = bytearray(record.size)
        rest = memoryview(content)
        try:
            while rest and (count := file.readinto(rest)):
                rest = rest[count:]
        except OSError as error:
            raise unreadable(path, error) from error
    check_size(path, record.size - len(rest), record)
    check_hash(path, hashlib.sha256(content).hexdigest(), record)
    return content


def check_size(path: Path, found: int, record: FileRecord) -> None:
    """Raises: CheckpointError when a file is longer or shorter than recorded."""
    if found != record.size:
        raise CheckpointError(
            f"{path} is damaged: expected {record.size:,} bytes, found {found:,}; {WHAT_TO_DO}"
        )


def check_hash(path: Path, found: str, record: FileRecord) -> None:
    """Raises: CheckpointError when a file has another content than recorded."""
    if found != record.sha256:
        raise CheckpointError(
            f"{path} is damaged: expected SHA-256 {record.sha256}, found {found}; {WHAT_TO_DO}"
        )
