"""A prepared folder: its index, its token shards in mapped memory, its hashes.

`prepare.py` writes such a folder, `loader.py` cuts sequences out of it. The index carries a hash
of itself and, for every other file, size and SHA-256. Opening checks the index and all sizes;
`hash_problems` reads every byte.

`index.json`: format, dtype, vocab_size, tokenizer_sha256, end_of_text_id, options, request,
sources [{path, text_field, weight, files, excluded, splits {train, valid: {documents, tokens,
text_bytes, largest_id, shards [{file, tokens, bytes, sha256, documents_file, documents_bytes,
documents_sha256}]}}}], files, identity, index_sha256.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from lascaux.data.tokenizer import Tokenizer, load_tokenizer
from lascaux.errors import DataError

INDEX_FILE = "index.json"
FORMAT = 1
SPLITS: tuple["Split", "Split"] = ("train", "valid")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
HASH_CHUNK_BYTES = 1 << 20

Split = Literal["train", "valid"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a prepared folder as the index describes it."""

    path: Path
    size: int
    sha256: str


class TokenStream:
    """The tokens of one source and split, end to end over all its shards."""

    def __init__(
        self, shards: Sequence[NDArray[Any]], documents: int, text_bytes: int, largest_id: int
    ) -> None:
        self._shards = shards
        self._ends = np.cumsum([0, *map(len, shards)])
        self.tokens: int = int(self._ends[-1])
        self.documents = documents
        self.text_bytes = text_bytes
        self.largest_id = largest_id

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start to stop, fewer where the stream ends before."""
        stop = min(stop, self.tokens)
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        parts = []
        for shard in range(first, len(self._shards)):
            begin = int(self._ends[shard])
            if begin >= stop:
                break
            parts.append(self._shards[shard][max(start - begin, 0) : stop - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.uint16)])


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """One source inside a prepared folder."""

    path: str
    text_field: str
    weight: float | None
    files: int
    excluded: dict[str, int]
    train: TokenStream
    valid: TokenStream

    def stream(self, split: Split) -> TokenStream:
        """The tokens of a split."""
        return self.train if split == "train" else self.valid


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Token shards ready to be read: one prepared folder, or several with the same tokenizer.

    `identity` is a hash of content, tokenizer and options; it does not change with the place of
    the folder. `request` is what `prepare` was asked for.
    """

    folders: tuple[Path, ...]
    tokenizer: Tokenizer
    vocab_size: int
    end_of_text_id: int
    sources: tuple[PreparedSource, ...]
    identity: str
    options: dict[str, Any]
    request: dict[str, Any]
    files: tuple[FileRecord, ...]

    @property
    def weights(self) -> tuple[float | None, ...]:
        """The weight of each source in a mixture; None where it was not set."""
        return tuple(source.weight for source in self.sources)

    @property
    def excluded(self) -> dict[str, int]:
        """What all sources left out, counted by reason."""
        total: dict[str, int] = {}
        for source in self.sources:
            for reason, count in source.excluded.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def tokens(self, split: Split) -> int:
        """Tokens of a split, end-of-text tokens included."""
        return sum(source.stream(split).tokens for source in self.sources)

    def documents(self, split: Split) -> int:
        """Documents of a split."""
        return sum(source.stream(split).documents for source in self.sources)

    def text_bytes(self, split: Split) -> int:
        """Bytes of UTF-8 text of a split, end-of-text tokens not counted."""
        return sum(source.stream(split).text_bytes for source in self.sources)

    def hash_problems(self) -> list[str]:
        """Read every byte; one line for each file that is not what the index says."""
        problems = []
        for record in self.files:
            problem = _size_problem(record)
            if problem is None and (found := sha256_of_file(record.path)) != record.sha256:
                problem = f"{record.path}: expected sha256 {record.sha256}, found {found}"
            if problem is not None:
                problems.append(problem)
        return problems

    def check_hashes(self) -> None:
        """Raise a DataError that names every file with a wrong size or hash."""
        problems = self.hash_problems()
        if problems:
            raise DataError(
                "prepared data is damaged; restore it or prepare it again:\n" + "\n".join(problems)
            )


def open_prepared(folder: Path) -> PreparedData:
    """Open a folder made by `prepare`: index, tokenizer and all file sizes are checked.

    Raises: DataError naming the file, and the field or the size that is wrong.
    """
    index = _read_index(folder)
    place = str(folder / INDEX_FILE)
    dtype_name = get_field(index, "dtype", str, place)
    if dtype_name not in DTYPES:
        raise DataError(f"{place}: dtype '{dtype_name}', expected one of {', '.join(DTYPES)}")
    vocab_size = get_field(index, "vocab_size", int, place)
    records = [
        _file_record(folder, name, entry, place)
        for name, entry in get_field(index, "files", dict, place).items()
    ]
    sources = []
    for number, entry in enumerate(get_field(index, "sources", list, place)):
        where = f"{place}: sources[{number}]"
        sources.append(_open_source(folder, entry, DTYPES[dtype_name], vocab_size, records, where))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    wanted = get_field(index, "tokenizer_sha256", str, place)
    if tokenizer.sha256 != wanted:
        raise DataError(
            f"{folder / 'tokenizer.json'}: not the tokenizer the shards were made with: "
            f"expected hash {wanted}, found {tokenizer.sha256}"
        )
    return PreparedData(
        folders=(folder,),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        end_of_text_id=get_field(index, "end_of_text_id", int, place),
        sources=tuple(sources),
        identity=get_field(index, "identity", str, place),
        options=get_field(index, "options", dict, place),
        request=get_field(index, "request", dict, place),
        files=tuple(records),
    )


def is_prepared(folder: Path) -> bool:
    """Whether a path is a folder that holds an index."""
    return (folder / INDEX_FILE).is_file()


def canonical_json(value: Any) -> bytes:
    """One spelling for equal values: sorted keys, no blank space, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def index_sha256(index: dict[str, Any]) -> str:
    """The hash that an index carries of itself: of everything but that field."""
    rest = {key: value for key, value in index.items() if key != "index_sha256"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hash of a file's content, read in pieces."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def get_field(record: Any, name: str, kind: type[T], place: str) -> T:
    """A field of an index entry; DataError with its place when it is absent or of another type."""
    if not isinstance(record, dict) or name not in record:
        raise DataError(f"{place}: field '{name}' is missing")
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{place}: field '{name}' must be {kind.__name__}; got {value!r:.60}")
    if isinstance(value, int) and value < 0 and name != "largest_id":
        raise DataError(f"{place}: field '{name}' must not be negative; got {value}")
    return value


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"'{folder}' is no prepared folder: {INDEX_FILE}: {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    found_format = get_field(index, "format", int, str(path))
    if found_format != FORMAT:
        raise DataError(
            f"{path}: format {found_format}, this version reads format {FORMAT}; "
            f"prepare the sources again"
        )
    wanted, found = get_field(index, "index_sha256", str, str(path)), index_sha256(index)
    if wanted != found:
        raise DataError(f"{path}: damaged: expected hash {wanted}, found {found}")
    return index


def _open_source(
    folder: Path,
    entry: Any,
    dtype: np.dtype[Any],
    vocab_size: int,
    records: list[FileRecord],
    place: str,
) -> PreparedSource:
    splits = get_field(entry, "splits", dict, place)
    streams = {}
    for split in SPLITS:
        where = f"{place}.splits.{split}"
        streams[split] = _open_stream(
            folder, get_field(splits, split, dict, where), dtype, vocab_size, records, where
        )
    return PreparedSource(
        path=get_field(entry, "path", str, place),
        text_field=get_field(entry, "text_field", str, place),
        weight=None if entry.get("weight") is None else get_field(entry, "weight", float, place),
        files=get_field(entry, "files", int, place),
        excluded=get_field(entry, "excluded", dict, place),
        train=streams["train"],
        valid=streams["valid"],
    )


def _open_stream(
    folder: Path,
    entry: dict[str, Any],
    dtype: np.dtype[Any],
    vocab_size: int,
    records: list[FileRecord],
    place: str,
) -> TokenStream:
    """Check one split against its files and map its shards."""
    largest_id = get_field(entry, "largest_id", int, place)
    if largest_id >= vocab_size:
        raise DataError(f"{place}: largest_id {largest_id} is beyond vocab_size {vocab_size}")
    shards = []
    for number, shard in enumerate(get_field(entry, "shards", list, place)):
        where = f"{place}.shards[{number}]"
        tokens = get_field(shard, "tokens", int, where)
        name = get_field(shard, "file", str, where)
        record = _file_record(folder, name, shard, where)
        if tokens == 0 or record.size != tokens * dtype.itemsize:
            raise DataError(
                f"{where}: {tokens} tokens of {dtype.itemsize} bytes do not make "
                f"{record.size} bytes"
            )
        documents = {
            "bytes": get_field(shard, "documents_bytes", int, where),
            "sha256": get_field(shard, "documents_sha256", str, where),
        }
        name = get_field(shard, "documents_file", str, where)
        records += [record, _file_record(folder, name, documents, where)]
        # As a plain array: slices of np.memmap cost a microsecond more each.
        shards.append(np.asarray(np.memmap(record.path, dtype=dtype, mode="r")))
    stream = TokenStream(
        shards,
        documents=get_field(entry, "documents", int, place),
        text_bytes=get_field(entry, "text_bytes", int, place),
        largest_id=largest_id,
    )
    tokens = get_field(entry, "tokens", int, place)
    if stream.tokens != tokens:
        raise DataError(f"{place}: {tokens} tokens, but the shards hold {stream.tokens}")
    return stream


def _file_record(folder: Path, name: str, entry: Any, place: str) -> FileRecord:
    if Path(name).name != name:
        raise DataError(f"{place}: file name {name!r} leads out of the folder")
    record = FileRecord(
        folder / name,
        get_field(entry, "bytes", int, place),
        get_field(entry, "sha256", str, place),
    )
    problem = _size_problem(record)
    if problem is not None:
        raise DataError(problem)
    return record


def _size_problem(record: FileRecord) -> str | None:
    try:
        found = record.path.stat().st_size
    except OSError as error:
        return f"{record.path}: {error.strerror}"
    if found != record.size:
        return f"{record.path}: expected {record.size} bytes, found {found}"
    return None
