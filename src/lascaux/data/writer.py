"""Writing a prepared folder: hashed files, token shards, and a folder that appears whole or not.

All files are written into a hidden sibling of the target, synced, and renamed into place last.
"""

import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lascaux.errors import DataError

SHARD_TOKENS = 1 << 27
BUFFER_BYTES = 1 << 20
PART_TOKENS = 1 << 20


class HashedFile:
    """A new file that hashes what is written to it and is synced to disk when finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._file = io.BufferedWriter(io.FileIO(path, "x"), BUFFER_BYTES)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> str:
        """Sync and close; returns the SHA-256 of the content."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close without caring for the content; the folder is about to be removed."""
        # Closing the unbuffered file first drops the buffer: a full disk cannot fail a second time.
        self._file.raw.close()


class StreamWriter:
    """Writes the documents of one source and split as token shards with document offsets.

    Shard n: PREFIX.0000n.tokens holds little-endian ids, PREFIX.0000n.documents the positions (in
    the whole stream, uint64) at which documents begin that begin in this shard.
    """

    def __init__(
        self, folder: Path, prefix: str, dtype: np.dtype[Any], end_of_text_id: int
    ) -> None:
        self.documents = self.tokens = self.text_bytes = 0
        self.largest_id = -1
        self._folder, self._prefix, self._dtype = folder, prefix, dtype
        self._end = np.array([end_of_text_id], dtype=dtype)
        self._shards: list[dict[str, Any]] = []
        self._open: tuple[HashedFile, HashedFile] | None = None
        self._room = 0

    def add(self, ids: NDArray[np.unsignedinteger], text_bytes: int) -> None:
        """Append one document, to which the end-of-text id is added; its text has `text_bytes`."""
        begin = np.array([self.tokens], dtype="<u8").tobytes()
        for number, part in enumerate(self._parts(ids)):
            tokens_file, documents_file = self._files()
            tokens_file.write(part.astype(self._dtype).tobytes())
            if number == 0:
                documents_file.write(begin)
            self._room -= len(part)
        self.documents += 1
        self.tokens += len(ids) + 1
        self.text_bytes += text_bytes
        self.largest_id = max(self.largest_id, int(ids.max(initial=self._end[0])))

    def finish(self) -> dict[str, Any]:
        """Sync all files; returns what the index says of this split."""
        self._finish_shard()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "largest_id": self.largest_id,
            "shards": self._shards,
        }

    def abandon(self) -> None:
        """Close what is open."""
        for file in self._open or ():
            file.abandon()

    def _parts(self, ids: NDArray[np.unsignedinteger]) -> Iterator[NDArray[np.unsignedinteger]]:
        """The document in pieces that fit the shard they go to, then its end-of-text id."""
        while len(ids):
            size = min(self._room or SHARD_TOKENS, PART_TOKENS)
            yield ids[:size]
            ids = ids[size:]
        yield self._end

    def _files(self) -> tuple[HashedFile, HashedFile]:
        if self._room == 0:
            self._finish_shard()
            stem = f"{self._prefix}.{len(self._shards):05d}"
            tokens_file = HashedFile(self._folder / f"{stem}.tokens")
            self._open = (tokens_file, HashedFile(self._folder / f"{stem}.documents"))
            self._room = SHARD_TOKENS
        assert self._open is not None
        return self._open

    def _finish_shard(self) -> None:
        if self._open is None:
            return
        tokens_file, documents_file = self._open
        self._shards.append(
            {
                "file": tokens_file.path.name,
                "tokens": tokens_file.size // self._dtype.itemsize,
                "bytes": tokens_file.size,
                "sha256": tokens_file.finish(),
                "documents_file": documents_file.path.name,
                "documents_bytes": documents_file.size,
                "documents_sha256": documents_file.finish(),
            }
        )
        self._open, self._room = None, 0


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` to write into; renamed to `out` at the end, removed on any error.

    What a killed run left there is removed first. `out` must not exist, or be an empty folder.

    Raises: DataError when another process is writing it, and for a full disk or any other failure
        to write, with the folder and the bytes that are free.
    """
    staging = out.with_name(f".{out.name}.lascaux.tmp")
    lock = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(staging, out)
        try:
            yield staging
            sync_folder(staging)
            staging.rename(out)
        except BaseException:
            if staging.exists():
                shutil.rmtree(staging)
            raise
        sync_folder(out.parent)
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        if lock is not None:
            os.close(lock)


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(staging: Path, out: Path) -> int:
    """Make the staging folder anew and lock it; the kernel frees the lock when we die."""
    if staging.exists():
        stale = _lock(staging, out)
        shutil.rmtree(staging)
        os.close(stale)
    staging.mkdir()
    return _lock(staging, out)


def _lock(folder: Path, out: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"another process is preparing '{out}'; wait for it to end") from None
    return descriptor


def _cannot_write(out: Path, error: OSError) -> DataError:
    existing = next((place for place in (out.parent, *out.parents) if place.is_dir()), None)
    free = "" if existing is None else f"; {shutil.disk_usage(existing).free} bytes free there"
    return DataError(
        f"cannot write prepared data to '{out}': {error.strerror or error}{free}; nothing was kept"
    )
