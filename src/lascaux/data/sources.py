"""Which files a source has, and their documents as a stream.

A source is 'stdlib', one file or one folder; `lascaux/data/records.py` reads the formats that
hold many documents. Text is decoded as strict UTF-8 and kept as it is: line breaks, blank space
and a byte order mark are part of it.
"""

import os
import stat
import sysconfig
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from lascaux.config.schema import SourceConfig
from lascaux.data.records import (
    Document,
    Exclusions,
    FieldCensus,
    OnBytes,
    read_jsonl,
    read_parquet,
)
from lascaux.errors import DataError, suggest

STDLIB = "stdlib"
STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
JSONL_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
BINARY_SUFFIXES = frozenset(
    ".7z .a .avi .bin .bmp .bz2 .class .dll .dylib .eot .exe .flac .gguf .gif .gz .ico .jar .jpeg "
    ".jpg .lz4 .mkv .mov .mp3 .mp4 .npy .npz .o .ogg .onnx .otf .parquet .pdf .pickle .pkl .png "
    ".pt .pth .pyc .pyd .pyo .rar .safetensors .so .sqlite .tar .tgz .tif .tiff .tokens .ttf .wav "
    ".webm .webp .whl .woff .woff2 .xz .zip .zst".split()
)
PROBE_BYTES = 8192
# A longer text file is cut into several documents of about this size, at line breaks.
MAX_TEXT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read and its size on disk in bytes."""

    path: Path
    size: int


class SourceReader:
    """One source: its files, its documents, what it left out, how far it has been read.

    `total_bytes` and `bytes_read` count bytes on disk, compressed as they are.

    Raises: DataError for a missing or unreadable path and for a folder without any file to read.
    """

    def __init__(self, source: SourceConfig, strict: bool = False) -> None:
        self.source = source
        self.exclusions = Exclusions(strict)
        self.bytes_read = 0
        self.files = self._list_files()
        self.total_bytes = sum(file.size for file in self.files)

    def documents(self) -> Generator[Document, None, None]:
        """All documents in a fixed order: files sorted by path, records as they stand.

        Raises: DataError for an unreadable file, a truncated or damaged one, a bad record if
            strict, and at the end if records were read and none has the text field.
        """
        census = FieldCensus(self.source.text_field)
        for file in self.files:
            name = file.path.name.lower()
            if name.endswith(JSONL_SUFFIXES):
                yield from read_jsonl(file.path, census, self.exclusions, self._on_bytes)
            elif name.endswith(".parquet"):
                yield from read_parquet(file.path, census, self.exclusions, self._on_bytes)
            else:
                yield from read_text(file.path, self.exclusions, self._on_bytes)
        census.check(self.source.path)

    def _on_bytes(self, count: int) -> None:
        self.bytes_read += count

    def _list_files(self) -> list[SourceFile]:
        if self.source.path == STDLIB:
            return _stdlib_files()
        path = Path(self.source.path).expanduser()
        mode = _mode(path)
        if mode is None:
            raise _missing(path)
        if stat.S_ISDIR(mode):
            files = list(_walk(path, self.exclusions))
            if not files:
                raise DataError(
                    f"source folder '{path}' has no file to read"
                    + "".join(f"; {n} x {why}" for why, n in self.exclusions.counts.items())
                )
            return files
        if not stat.S_ISREG(mode):
            raise DataError(f"source '{path}' is neither a file nor a folder")
        if _is_binary(path):
            raise DataError(
                f"source '{path}' is a binary file; expected text, .jsonl, .jsonl.zst, .jsonl.gz "
                f"or .parquet"
            )
        return [SourceFile(path, path.stat().st_size)]


def read_text(path: Path, exclusions: Exclusions, on_bytes: OnBytes) -> Iterator[Document]:
    """A text file as one document; one beyond 16 MiB as several, cut at line breaks.

    Raises: DataError if the file cannot be read.
    """
    byte_offset, line = 0, 1
    try:
        with path.open("rb") as file:
            while data := file.read(MAX_TEXT_BYTES):
                if len(data) == MAX_TEXT_BYTES:
                    data += file.readline(MAX_TEXT_BYTES)
                    for _ in range(3):  # no cut inside a character
                        if (following := file.peek(1)[:1]) and following[0] & 0xC0 == 0x80:
                            data += file.read(1)
                try:
                    text = data.decode("utf-8")
                except UnicodeDecodeError as error:
                    bad_line = line + data.count(b"\n", 0, error.start)
                    exclusions.bad_record(
                        path, bad_line, byte_offset + error.start, "invalid UTF-8"
                    )
                else:
                    yield Document(text, f"{path}:{line}" if byte_offset else str(path))
                byte_offset += len(data)
                line += data.count(b"\n")
                on_bytes(len(data))
    except OSError as error:
        raise _unreadable(path, error) from error
    if byte_offset == 0:
        exclusions.skip(path, "empty file")


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in root.rglob("*.py")
        if STDLIB_LEFT_OUT.isdisjoint(path.relative_to(root).parts) and path.is_file()
    ]
    if not paths:
        raise DataError(
            f"source 'stdlib': no .py file below '{root}' (this Python keeps its library in an "
            f"archive or without sources); give a file or a folder instead"
        )
    return [SourceFile(path, path.stat().st_size) for path in sorted(paths)]


def _walk(folder: Path, exclusions: Exclusions) -> Iterator[SourceFile]:
    """Files of a folder and its folders, sorted by name; what is left out is counted."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            exclusions.skip(path, "hidden file or folder")
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(path, exclusions)
        elif not entry.is_file():
            exclusions.skip(path, "not a regular file")
        elif _is_binary(path):
            exclusions.skip(path, "binary file")
        else:
            yield SourceFile(path, entry.stat().st_size)


def _is_binary(path: Path) -> bool:
    name = path.name.lower()
    if name.endswith((*JSONL_SUFFIXES, ".parquet")):
        return False
    if path.suffix.lower() in BINARY_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(PROBE_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _missing(path: Path) -> DataError:
    parent = path.parent
    hint = ""
    if parent.is_dir() and os.access(parent, os.R_OK | os.X_OK):
        hint = suggest(path.name, [*os.listdir(parent), STDLIB])
    return DataError(f"source '{path}' does not exist{hint}")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"'{path}' cannot be read: {error.strerror or error}")
