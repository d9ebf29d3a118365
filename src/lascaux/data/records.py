"""Documents out of files that hold many: .jsonl (also .zst and .gz) and .parquet.

Everything streams; a line has a limit, a compressed file a window and a ratio limit. What is no
good record is handed to `Exclusions`; what makes a whole file unreadable is a DataError.
Lines end at byte 0x0A alone. A byte order mark at the start of a .jsonl file is dropped, for it
lies outside the first record. Byte offsets count uncompressed bytes.
"""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from lascaux.errors import DataError, suggest

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
MAX_WINDOW_BYTES = 128 << 20
# A slice of compressed input may unpack to 64 MiB at once (a zstd block of 4 bytes holds 128 KiB).
SLICE_BYTES = 1 << 11
MAX_RATIO = 2000
RATIO_FREE_BYTES = 16 << 20
MAX_LISTED = 10_000
MAX_FIELDS_NAMED = 50

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it comes from: 'path' or 'path:line' (parquet: 'path:row')."""

    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Something left out. Lines and rows count from 1, bytes from 0; None where there is none."""

    file: str
    line: int | None
    byte_offset: int | None
    reason: str


@dataclass(slots=True)
class Exclusions:
    """What a source left out: all of it counted by reason, the first 10,000 listed."""

    strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    listed: list[Exclusion] = field(default_factory=list)

    def skip(self, file: Path, reason: str) -> None:
        """Count a file that is not meant to be read: hidden, binary, empty."""
        self._add(Exclusion(str(file), None, None, reason))

    def bad_record(
        self, file: Path, line: int | None, byte_offset: int | None, reason: str
    ) -> None:
        """Count a record that cannot be used; with `strict` raise a DataError that names it."""
        if self.strict:
            place = "" if line is None else f", line {line}"
            place += "" if byte_offset is None else f", byte {byte_offset}"
            raise DataError(
                f"{file}{place}: {reason}; mend the record, or set data.strict to false to leave "
                f"bad records out"
            )
        self._add(Exclusion(str(file), line, byte_offset, reason))

    def _add(self, exclusion: Exclusion) -> None:
        self.counts[exclusion.reason] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(exclusion)


@dataclass(slots=True)
class FieldCensus:
    """Whether any record of a source has the text field, and which fields there are."""

    text_field: str
    found: int = 0
    missing: int = 0
    names: set[str] = field(default_factory=set)

    def check(self, source: str) -> None:
        """Raise a DataError when there are records and none has the text field."""
        if self.missing and not self.found:
            raise no_text_field(source, self.text_field, self.names, "no record has")


class BadRecordError(Exception):
    """Inside this module: why one record cannot be used."""


def no_text_field(place: str, text_field: str, names: set[str], complaint: str) -> DataError:
    """The error for a source whose records hold their text under another name."""
    listed = ", ".join(f"'{name}'" for name in sorted(names)[:MAX_FIELDS_NAMED]) or "none"
    hint = suggest(text_field, names) or "; set the source's text_field to the one with the text"
    return DataError(f"{place}: {complaint} the text field '{text_field}'; fields: {listed}{hint}")


def read_jsonl(
    path: Path, census: FieldCensus, exclusions: Exclusions, on_bytes: OnBytes
) -> Iterator[Document]:
    """Documents of a .jsonl, .jsonl.zst or .jsonl.gz file. `on_bytes` gets bytes read from disk.

    Lines of blank space hold no record and are passed over.

    Raises: DataError for a missing, unreadable, truncated or damaged file.
    """
    for number, byte_offset, line in _lines(_chunks(path, on_bytes)):
        try:
            text = _text_of_line(line, number == 1, census)
        except BadRecordError as error:
            exclusions.bad_record(path, number, byte_offset, str(error))
            continue
        if text is not None:
            yield Document(text, f"{path}:{number}")


def read_parquet(
    path: Path, census: FieldCensus, exclusions: Exclusions, on_bytes: OnBytes
) -> Iterator[Document]:
    """Documents of a .parquet file, a few rows at a time.

    Raises: DataError for a missing or damaged file, an absent text column, one without text.
    """
    try:
        with pq.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
            _check_column(path, census.text_field, file.schema_arrow)
            size, num_rows = path.stat().st_size, max(1, file.metadata.num_rows)
            row = reported = 0
            for batch in file.iter_batches(64, columns=[census.text_field], use_threads=False):
                for value in batch.column(0).cast(pa.large_string()).cast(pa.large_binary()):
                    row += 1
                    try:
                        text = _text_of_bytes(value.as_py())
                    except BadRecordError as error:
                        exclusions.bad_record(path, row, None, str(error))
                        continue
                    census.found += 1
                    yield Document(text, f"{path}:{row}")
                on_bytes(size * row // num_rows - reported)
                reported = size * row // num_rows
            on_bytes(size - reported)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error


def _check_column(path: Path, text_field: str, schema: pa.Schema) -> None:
    if text_field not in schema.names:
        raise no_text_field(str(path), text_field, set(schema.names), "the table lacks")
    kind = schema.field(text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: column '{text_field}' holds {kind}, expected string")


def _text_of_bytes(data: bytes | None) -> str:
    if data is None:
        raise BadRecordError("text is not a string")
    if len(data) > MAX_LINE_BYTES:
        raise BadRecordError(f"text longer than {MAX_LINE_BYTES} bytes")
    if not data:
        raise BadRecordError("empty text")
    return _utf8(data)


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRecordError("invalid UTF-8") from None


# Whole numbers beside the text may have any number of digits; their value is not used.
_DECODER = json.JSONDecoder(parse_int=float)


def _text_of_line(line: bytes | None, first: bool, census: FieldCensus) -> str | None:
    """The text of one JSON line; None for a blank one; `line` None stands for an over-long one."""
    if line is None:
        raise BadRecordError(f"line longer than {MAX_LINE_BYTES} bytes")
    source = _utf8(line.removeprefix(b"\xef\xbb\xbf") if first else line).strip(" \t\r")
    if not source:
        return None
    try:
        record = _DECODER.decode(source)
    except RecursionError:
        raise BadRecordError("nested too deeply") from None
    except ValueError:
        raise BadRecordError("invalid JSON") from None
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object")
    return _text_of_record(record, census)


def _text_of_record(record: dict[str, Any], census: FieldCensus) -> str:
    if census.text_field not in record:
        census.missing += 1
        if len(census.names) < MAX_FIELDS_NAMED:
            census.names.update(list(record)[:MAX_FIELDS_NAMED])
        raise BadRecordError(f"text field '{census.text_field}' missing")
    census.found += 1
    text = record[census.text_field]
    if not isinstance(text, str):
        raise BadRecordError("text is not a string")
    if not text:
        raise BadRecordError("empty text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRecordError("lone surrogate") from None
    return text


def _lines(chunks: Iterator[bytes]) -> Iterator[tuple[int, int, bytes | None]]:
    """(line number, byte offset, line) without the line break; None for an over-long line."""
    number, line_start = 1, 0
    pending: list[bytes] = []
    length = 0
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            length += len(part)
            pending.append(part)
            yield number, line_start, None if length > MAX_LINE_BYTES else b"".join(pending)
            number, line_start = number + 1, line_start + length + 1
            pending, length = [], 0
        length += len(rest)
        if length > MAX_LINE_BYTES:
            pending = []
        elif rest:
            pending.append(rest)
    if length:
        yield number, line_start, None if length > MAX_LINE_BYTES else b"".join(pending)


def _chunks(path: Path, on_bytes: OnBytes) -> Iterator[bytes]:
    """The uncompressed content of a file, piece by piece."""
    try:
        with path.open("rb") as file:
            raw = _counted(iter(lambda: file.read(CHUNK_BYTES), b""), on_bytes)
            if path.suffix.lower() == ".zst":
                decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
                yield from _unpacked(path, raw, decompressor.decompressobj)
            elif path.suffix.lower() == ".gz":
                yield from _unpacked(path, raw, lambda: zlib.decompressobj(zlib.MAX_WBITS | 16))
            else:
                yield from raw
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _counted(chunks: Iterator[bytes], on_bytes: OnBytes) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        on_bytes(len(chunk))


class _Frame(Protocol):
    """One compressed frame: what zstandard and zlib have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _slices(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), SLICE_BYTES):
            yield chunk[start : start + SLICE_BYTES]


def _unpacked(path: Path, raw: Iterator[bytes], new_frame: Callable[[], _Frame]) -> Iterator[bytes]:
    """Join the frames of a compressed file; a truncated or damaged one is a DataError."""
    frame, inside = new_frame(), True
    consumed = produced = 0
    for piece in _slices(raw):
        while piece:
            inside = True
            try:
                text = frame.decompress(piece)
            except (zstandard.ZstdError, zlib.error) as error:
                raise DataError(f"{path}: damaged near byte {consumed}: {error}") from error
            rest = frame.unused_data if frame.eof else b""
            consumed += len(piece) - len(rest)
            produced += len(text)
            if produced > max(RATIO_FREE_BYTES, MAX_RATIO * consumed):
                raise DataError(
                    f"{path}: the first {consumed} bytes unpack to more than {produced}; a file "
                    f"packed tighter than 1:{MAX_RATIO} is refused"
                )
            if text:
                yield text
            if frame.eof:
                frame, inside = new_frame(), False
            piece = rest
    if inside:
        raise DataError(f"{path}: truncated: the file ends at byte {consumed} inside a frame")
