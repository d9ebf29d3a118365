"""Sources to a prepared folder: tokenizer, token shards, index. `shards.py` reads the result.

A document goes whole to train or validation by the hash of its text, so a text that occurs twice
is never on both sides. Memory stays bounded whatever the size of the sources.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lascaux.config.schema import DataConfig, SourceConfig, TokenizerConfig
from lascaux.data import shards
from lascaux.data.order import check_weights
from lascaux.data.records import MAX_LISTED, Exclusion
from lascaux.data.sources import STDLIB, SourceReader
from lascaux.data.tokenizer import Pattern, Tokenizer, load_tokenizer, train_tokenizer
from lascaux.data.writer import HashedFile, StreamWriter, staging_folder
from lascaux.errors import ConfigError, DataError

BATCH_CHARS = 1 << 22
DEFAULT_TRAIN_BYTES = 32_000_000
DEFAULT_PATTERN: Pattern = "gpt2"

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSummary:
    """What `prepare` made. Tokens include one end-of-text token for each document."""

    folder: Path
    identity: str
    vocab_size: int
    files: int
    train_documents: int
    train_tokens: int
    valid_documents: int
    valid_tokens: int
    text_bytes: int
    """UTF-8 bytes of both splits"""
    excluded: dict[str, int]
    """records and files left out, by reason"""
    seconds: float


def prepare(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    vocab_size: int,
    out: Path,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Encode all sources into the new folder `out`, which appears whole or not at all.

    Without a tokenizer, the one at `tokenizer_config.path` is loaded, or one of `vocab_size` is
    trained on documents of the train split. `progress` gets (bytes read, all bytes), both on disk,
    of the encoding pass.

    Raises: DataError for an existing `out`, a source that cannot be read, a corpus without a
        training token, a full disk; ConfigError for settings that contradict one another.
    """
    started = time.monotonic()
    out = out.expanduser().absolute()
    _check_request(data, out)
    with staging_folder(out) as folder:
        if tokenizer is None:
            tokenizer = _make_tokenizer(data, tokenizer_config, vocab_size)
        check_vocab_size(tokenizer, vocab_size)
        pattern = None if tokenizer_config.path else tokenizer_config.pattern or DEFAULT_PATTERN
        index: dict[str, Any] = {
            "format": shards.FORMAT,
            "dtype": tokenizer.dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            "end_of_text_id": tokenizer.end_of_text_id,
            "options": {"valid_fraction": data.valid_fraction, "pattern": pattern},
            "request": request_of(data, tokenizer_config, vocab_size),
        }
        index["sources"], listed = _encode_sources(data, tokenizer, folder, progress)
        _check_not_empty(index["sources"])
        index["files"] = {
            "tokenizer.json": _write(folder / "tokenizer.json", tokenizer.json.encode()),
            "excluded.jsonl": _write(folder / "excluded.jsonl", _as_lines(listed)),
        }
        index["identity"] = identity_of(index)
        index["index_sha256"] = shards.index_sha256(index)
        _write(folder / shards.INDEX_FILE, json.dumps(index, indent=1).encode())
    return _summary(out, index, time.monotonic() - started)


def is_held_out(text: bytes, valid_fraction: float) -> bool:
    """Whether a document (its UTF-8) belongs to the validation split: a function of its hash."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < valid_fraction


def request_of(
    data: DataConfig, tokenizer_config: TokenizerConfig, vocab_size: int
) -> dict[str, Any]:
    """The settings that decide what a prepared folder contains."""
    return {
        "sources": [asdict(source) for source in data.sources],
        "valid_fraction": data.valid_fraction,
        "tokenizer": asdict(tokenizer_config),
        "vocab_size": vocab_size,
    }


def identity_of(index: dict[str, Any]) -> str:
    """A hash of content, tokenizer and options, free of paths and names."""
    content = [
        {
            "weight": source["weight"],
            "splits": {
                split: [
                    (shard["tokens"], shard["sha256"], shard["documents_sha256"])
                    for shard in entry["shards"]
                ]
                for split, entry in source["splits"].items()
            },
        }
        for source in index["sources"]
    ]
    parts = [index[name] for name in ("format", "dtype", "tokenizer_sha256", "options")]
    return hashlib.sha256(shards.canonical_json([*parts, content])).hexdigest()


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise a DataError when the tokenizer has ids that the model has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{tokenizer.origin} has {tokenizer.vocab_size} token ids, but model.vocab_size is "
            f"{vocab_size}; set model.vocab_size to at least {tokenizer.vocab_size}"
        )


def _check_request(data: DataConfig, out: Path) -> None:
    """Everything that can be refused before a byte is read."""
    if not 0 <= data.valid_fraction < 1:
        raise ConfigError(
            f"'data.valid_fraction' must be at least 0 and below 1; got {data.valid_fraction}"
        )
    if not data.sources:
        raise ConfigError("'data.sources' is empty; give at least one source")
    check_weights([source.weight for source in data.sources])
    if shards.is_prepared(out):
        raise DataError(f"'{out}' already holds prepared data; give another folder or delete it")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"'{out}' exists and is not an empty folder; give another one")
    for source in data.sources:
        path = Path(source.path).expanduser().absolute()
        if source.path == STDLIB or not path.is_dir():
            continue
        if shards.is_prepared(path):
            raise DataError(f"source '{path}' is prepared already; train on it as it is")
        if out.resolve().is_relative_to(path.resolve()):
            raise DataError(f"'{out}' lies inside the source folder '{path}'; write elsewhere")


def _make_tokenizer(
    data: DataConfig, tokenizer_config: TokenizerConfig, vocab_size: int
) -> Tokenizer:
    if tokenizer_config.path is not None:
        return load_tokenizer(Path(tokenizer_config.path).expanduser())
    budget = tokenizer_config.train_bytes or DEFAULT_TRAIN_BYTES
    pattern = tokenizer_config.pattern or DEFAULT_PATTERN
    return train_tokenizer(_training_texts(data, budget), vocab_size, pattern)


def _training_texts(data: DataConfig, budget: int) -> Iterator[str]:
    """Train documents from the start of each source; the budget in bytes is shared evenly."""
    for number, source in enumerate(data.sources):
        share = budget // (len(data.sources) - number)
        with closing(SourceReader(source, data.strict).documents()) as documents:
            for document in documents:
                text = document.text.encode()
                if is_held_out(text, data.valid_fraction):
                    continue
                taken = text[:share]
                share, budget = share - len(taken), budget - len(taken)
                # The cut may fall inside the last character.
                yield document.text if taken == text else taken.decode(errors="ignore")
                if share == 0:
                    break


def _encode_sources(
    data: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], list[Exclusion]]:
    """Write the shards of all sources; returns their index entries and what was left out."""
    if tokenizer.missing_bytes:
        raise DataError(
            f"{tokenizer.origin} has no token for {len(tokenizer.missing_bytes)} of the bytes of "
            f"UTF-8 (the first is {tokenizer.missing_bytes[0]:#04x}); it would lose text"
        )
    readers = [SourceReader(source, data.strict) for source in data.sources]
    dtype = shards.DTYPES[tokenizer.dtype.name]
    total = sum(reader.total_bytes for reader in readers)
    entries: list[dict[str, Any]] = []
    listed: list[Exclusion] = []
    for number, (source, reader) in enumerate(zip(data.sources, readers, strict=True)):
        with ExitStack() as stack:
            writers = {
                split: StreamWriter(folder, f"s{number}.{split}", dtype, tokenizer.end_of_text_id)
                for split in shards.SPLITS
            }
            for writer in writers.values():
                stack.callback(writer.abandon)
            for texts in _batches(reader):
                _encode_batch(texts, tokenizer, data.valid_fraction, writers)
                if progress is not None:
                    progress(sum(other.bytes_read for other in readers), total)
            splits = {split: writer.finish() for split, writer in writers.items()}
        entries.append(_source_entry(source, reader, splits))
        listed += reader.exclusions.listed[: MAX_LISTED - len(listed)]
    if progress is not None:
        progress(total, total)
    return entries, listed


def _batches(reader: SourceReader) -> Iterator[list[str]]:
    """Texts of the source in lists of about BATCH_CHARS characters."""
    texts: list[str] = []
    chars = 0
    with closing(reader.documents()) as documents:
        for document in documents:
            texts.append(document.text)
            chars += len(document.text)
            if chars >= BATCH_CHARS:
                yield texts
                texts, chars = [], 0
    if texts:
        yield texts


def _encode_batch(
    texts: list[str], tokenizer: Tokenizer, valid_fraction: float, writers: dict[Any, StreamWriter]
) -> None:
    for text, ids in zip(texts, tokenizer.encode_arrays(texts), strict=True):
        data = text.encode()
        split = "valid" if is_held_out(data, valid_fraction) else "train"
        writers[split].add(ids, len(data))


def _source_entry(
    source: SourceConfig, reader: SourceReader, splits: dict[Any, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "path": source.path,
        "text_field": source.text_field,
        "weight": None if source.weight is None else float(source.weight),
        "files": len(reader.files),
        "excluded": dict(sorted(reader.exclusions.counts.items())),
        "splits": splits,
    }


def _check_not_empty(sources: list[dict[str, Any]]) -> None:
    train, valid = (
        sum(source["splits"][split]["documents"] for source in sources) for split in shards.SPLITS
    )
    if train:
        return
    excluded = _total_excluded(sources)
    left_out = "".join(f"; left out: {count} x {reason}" for reason, count in excluded.items())
    raise DataError(
        f"the sources hold no training text: 0 train documents, {valid} validation documents"
        f"{left_out}" + ("; give more documents or lower data.valid_fraction" if valid else "")
    )


def _total_excluded(sources: list[dict[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for source in sources:
        total.update(source["excluded"])
    return dict(total)


def _as_lines(listed: list[Exclusion]) -> bytes:
    return "".join(json.dumps(asdict(exclusion)) + "\n" for exclusion in listed).encode()


def _write(path: Path, content: bytes) -> dict[str, Any]:
    file = HashedFile(path)
    try:
        file.write(content)
        return {"bytes": file.size, "sha256": file.finish()}
    finally:
        file.abandon()


def _summary(out: Path, index: dict[str, Any], seconds: float) -> PrepareSummary:
    def total(split: str, name: str) -> int:
        return sum(source["splits"][split][name] for source in index["sources"])

    return PrepareSummary(
        folder=out,
        identity=index["identity"],
        vocab_size=index["vocab_size"],
        files=sum(source["files"] for source in index["sources"]),
        train_documents=total("train", "documents"),
        train_tokens=total("train", "tokens"),
        valid_documents=total("valid", "documents"),
        valid_tokens=total("valid", "tokens"),
        text_bytes=total("train", "text_bytes") + total("valid", "text_bytes"),
        excluded=_total_excluded(index["sources"]),
        seconds=seconds,
    )
