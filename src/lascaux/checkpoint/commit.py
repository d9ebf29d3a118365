"""A folder that appears whole or not at all, and folders that disappear the same way.

`.tmp_NAME_NONCE` is being written, `.del_NAME_NONCE` is being deleted; nobody reads either. The
order that a power cut cannot break: files synced, folder synced, rename, parent synced. Standard
library only; every OSError reaches the caller. One process at a time works in a folder of
checkpoints: the one that holds the run's lock.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp_"
RETIRED = ".del_"


def make_folder(path: Path) -> None:
    """Make a folder that survives a power cut, unless it is there already."""
    if not path.is_dir():
        os.mkdir(path)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder with synced files, then give it its final name.

    Something that has that name already is retired only when the new folder is complete. After any
    error the name stands for what it stood for before, or nothing; what cannot be removed of the
    temporary folder at that moment is removed before the next save.
    """
    temporary = _sibling(final, TEMPORARY)
    os.mkdir(temporary)
    try:
        write(temporary)
        sync_folder(temporary)
        if os.path.lexists(final):
            os.rename(final, _sibling(final, RETIRED))
        os.rename(temporary, final)
        try:
            sync_folder(final.parent)
        except OSError:
            os.rename(final, temporary)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def commit_locked_folder(final: Path, write: Callable[[Path], None]) -> None:
    """As `commit_folder`; meanwhile `remove_abandoned` of another process leaves it alone."""

    def write_locked(folder: Path) -> None:
        with _being_written(folder):
            write(folder)

    commit_folder(final, write_locked)


def retire_folders(paths: Iterable[Path]) -> None:
    """Take folders out of sight for good; `remove_leftovers` deletes them."""
    parents: set[Path] = set()
    for path in paths:
        os.rename(path, _sibling(path, RETIRED))
        parents.add(path.parent)
    for parent in parents:
        sync_folder(parent)


def remove_leftovers(parent: Path) -> None:
    """Delete what is retired, and what a process that died was writing."""
    for name in sorted(os.listdir(parent)):
        if name.startswith((TEMPORARY, RETIRED)):
            shutil.rmtree(parent / name)


def remove_abandoned(final: Path) -> None:
    """Delete what a process that died was writing to become `final`; a living one is left alone."""
    name = re.compile(rf"({TEMPORARY}|{RETIRED}){re.escape(final.name)}_[0-9a-f]{{8}}")
    for path in sorted(final.parent.iterdir()):
        if not name.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody writes there, or nobody can tell
            continue
        else:
            shutil.rmtree(path)
        finally:
            os.close(descriptor)


@contextmanager
def _being_written(folder: Path) -> Iterator[None]:
    """Say, where the filesystem has locks, that a folder's writer is alive."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sibling(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}_{secrets.token_hex(4)}")
