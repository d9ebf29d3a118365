"""One writer for each run: RUN/LOCK, held with flock.

The kernel gives the lock back when its holder dies, however it dies, so nothing has to be guessed
from what an old LOCK file says. A forked child drops its share at once: it would otherwise keep the
lock of a parent that is gone. Readers of a run take no lock. Standard library only.
"""

import errno
import fcntl
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from lascaux.errors import CheckpointError

LOCK_NAME = "LOCK"
OWNER_BYTES = 1 << 16


class RunLock:
    """Holds the lock of an existing run folder inside a `with` block.

    Raises: CheckpointError at once, with nothing written, when another process holds it, naming
    that process; and when the folder or its filesystem does not allow locks.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / LOCK_NAME
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        assert self._descriptor is None
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise CheckpointError(f"cannot lock the run: {self.path}: {error.strerror}") from error
        try:
            _lock(descriptor, self.path)
            _write_owner(descriptor, self.path)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is None:  # a forked child leaves its parent's block
            return
        _held.discard(self)
        os.ftruncate(self._descriptor, 0)
        self._let_go()

    def _let_go(self) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"{path.parent} is in use by {_describe_owner(descriptor)}; wait until it ends, stop "
            "it, or start a new run with another --run folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise CheckpointError(f"cannot lock {path}: {error.strerror}") from error
        raise CheckpointError(
            f"cannot lock {path}: its filesystem has no file locks ({error.strerror}); put the run "
            "on a local disk"
        ) from error


def _write_owner(descriptor: int, path: Path) -> None:
    owner = {
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "start": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode("ascii") + b"\n", 0)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; make room, or take a --run folder on another "
            "disk"
        ) from error


def _describe_owner(descriptor: int) -> str:
    """Who wrote the LOCK file; it is empty for an instant while a process is starting."""
    try:
        owner = json.loads(os.pread(descriptor, OWNER_BYTES, 0))
        return f"process {owner['pid']} on {owner['host']}, started {owner['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process, which does not say which one it is (yet)"


_held: set[RunLock] = set()


def _drop_in_child() -> None:
    """Close the child's copies; the parent's lock stays, as only the last close would free it."""
    for lock in _held:
        lock._let_go()
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)
