"""`prepare`: whole documents, exact counts, repeatable folders, nothing half made."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lascaux.config.schema import DataConfig, SourceConfig, TokenizerConfig
from lascaux.data import writer
from lascaux.data.prepare import is_held_out, prepare
from lascaux.data.shards import PreparedData, open_prepared
from lascaux.data.tokenizer import Tokenizer
from lascaux.errors import ConfigError, DataError

from .conftest import make_texts

MakePrepared = Callable[..., PreparedData]


def tree_hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def corpus(folder: Path, texts: list[str], name: str = "corpus.jsonl") -> DataConfig:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(sources=(SourceConfig(path=str(path)),), valid_fraction=0.2)


def documents_of(prepared: PreparedData, split: str) -> list[str]:
    """The documents of a split, cut at end-of-text tokens and decoded."""
    found = []
    for source in prepared.sources:
        stream = source.stream(split)  # type: ignore[arg-type]
        tokens = stream.read(0, stream.tokens)
        ends = np.flatnonzero(tokens == prepared.end_of_text_id)
        begins = [0, *(ends[:-1] + 1)]
        found += [
            prepared.tokenizer.decode(tokens[begin:end].tolist())
            for begin, end in zip(begins, ends, strict=True)
        ]
    return found


def test_documents_go_whole_to_the_split_their_hash_names(tmp_path: Path):
    texts = [*make_texts(300), "with <|endoftext|> inside", make_texts(1)[0]]
    data = corpus(tmp_path, texts)
    summary = prepare(data, TokenizerConfig(), 400, tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")

    def held_out(text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < 0.2

    assert documents_of(prepared, "valid") == [text for text in texts if held_out(text)]
    assert documents_of(prepared, "train") == [text for text in texts if not held_out(text)]
    assert 30 < summary.valid_documents < 90
    assert summary.train_documents + summary.valid_documents == len(texts)
    assert summary.text_bytes == sum(len(text.encode()) for text in texts)
    assert summary.train_tokens == prepared.tokens("train")
    assert summary.vocab_size == prepared.vocab_size == prepared.tokenizer.vocab_size <= 400


def test_document_offsets_are_where_documents_begin(
    make_prepared: MakePrepared, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writer, "SHARD_TOKENS", 64)
    prepared = make_prepared(make_texts(40))
    stream = prepared.sources[0].train
    tokens = stream.read(0, stream.tokens)
    begins = np.flatnonzero(tokens == prepared.end_of_text_id)[:-1] + 1
    files = sorted(prepared.folders[0].glob("s0.train.*.documents"))
    assert len(files) > 5
    offsets = np.concatenate([np.fromfile(file, dtype="<u8") for file in files])
    assert offsets.tolist() == [0, *begins.tolist()]
    for number, file in enumerate(files):
        inside = np.fromfile(file, dtype="<u8") // 64
        assert set(inside.tolist()) <= {number}
    assert open_prepared(prepared.folders[0]).hash_problems() == []


def test_tokenizer_sees_train_documents_only(tmp_path: Path):
    held_out = next(
        text
        for text in (f"{'qzx' * 500} {n}" for n in range(1000))
        if is_held_out(text.encode(), 0.2)
    )
    texts = [text for text in make_texts(200) if not is_held_out(text.encode(), 0.2)]
    prepare(corpus(tmp_path, texts, "a.jsonl"), TokenizerConfig(), 400, tmp_path / "a")
    prepare(corpus(tmp_path, [*texts, held_out], "b.jsonl"), TokenizerConfig(), 400, tmp_path / "b")
    a, b = open_prepared(tmp_path / "a"), open_prepared(tmp_path / "b")
    assert a.tokenizer.sha256 == b.tokenizer.sha256
    assert a.documents("train") == b.documents("train") and b.documents("valid") == 1


def test_tokenizer_reads_no_more_than_train_bytes(tmp_path: Path):
    texts = make_texts(100)
    limit = len("".join(texts[:1]).encode())
    data = replace(corpus(tmp_path, texts), valid_fraction=0.0)
    prepare(data, TokenizerConfig(train_bytes=limit), 400, tmp_path / "a")
    alone = replace(corpus(tmp_path, texts[:1], "one.jsonl"), valid_fraction=0.0)
    prepare(alone, TokenizerConfig(), 400, tmp_path / "b")
    hashes = {open_prepared(tmp_path / name).tokenizer.sha256 for name in "ab"}
    assert len(hashes) == 1


def test_same_sources_give_the_same_folder_and_moving_keeps_its_identity(tmp_path: Path):
    data = corpus(tmp_path, make_texts(100))
    for name in ("a", "b"):
        prepare(data, TokenizerConfig(), 400, tmp_path / name)
    assert tree_hashes(tmp_path / "a") == tree_hashes(tmp_path / "b")
    identity = open_prepared(tmp_path / "a").identity
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    moved = open_prepared(tmp_path / "elsewhere")
    assert moved.identity == identity and moved.hash_problems() == []
    other = corpus(tmp_path, make_texts(100), "renamed.jsonl")
    assert prepare(other, TokenizerConfig(), 400, tmp_path / "c").identity == identity
    changed = corpus(tmp_path, make_texts(101), "more.jsonl")
    assert prepare(changed, TokenizerConfig(), 400, tmp_path / "d").identity != identity


def test_exclusions_are_counted_and_listed(tmp_path: Path, tokenizer: Tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n[]\n{"text": ""}\n{"text": "fine"}\nnope\n')
    data = DataConfig(sources=(SourceConfig(path=str(path)),), valid_fraction=0.0)
    summary = prepare(data, TokenizerConfig(), 400, tmp_path / "out", tokenizer=tokenizer)
    assert summary.excluded == {"empty text": 1, "invalid JSON": 1, "not a JSON object": 1}
    lines = (tmp_path / "out" / "excluded.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "file": str(path),
        "line": 2,
        "byte_offset": 17,
        "reason": "not a JSON object",
    }
    assert [json.loads(line)["line"] for line in lines] == [2, 3, 5]
    assert open_prepared(tmp_path / "out").excluded == summary.excluded
    with pytest.raises(DataError, match="line 2, byte 17: not a JSON object"):
        prepare(replace(data, strict=True), TokenizerConfig(), 400, tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


def test_large_vocabularies_are_stored_in_32_bits(tmp_path: Path, tokenizer: Tokenizer):
    tokenizer.save(tmp_path / "small.json")
    content = json.loads((tmp_path / "small.json").read_text())
    content["model"]["vocab"]["abc"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    data = corpus(tmp_path, make_texts(20))
    config = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
    prepare(data, config, 70_001, tmp_path / "wide")
    wide = open_prepared(tmp_path / "wide")
    assert wide.sources[0].train.read(0, 1).dtype == np.dtype("<u4")
    assert documents_of(wide, "train") == [
        text for text in make_texts(20) if not is_held_out(text.encode(), 0.2)
    ]


def test_progress_counts_bytes_on_disk(tmp_path: Path, tokenizer: Tokenizer):
    data = corpus(tmp_path, make_texts(50))
    seen: list[tuple[int, int | None]] = []
    prepare(
        data,
        TokenizerConfig(),
        400,
        tmp_path / "out",
        tokenizer=tokenizer,
        progress=lambda done, total: seen.append((done, total)),
    )
    size = (tmp_path / "corpus.jsonl").stat().st_size
    assert seen[-1] == (size, size) and seen == sorted(seen)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_corpus_is_a_data_error(tmp_path: Path, tokenizer: Tokenizer, content: str):
    (tmp_path / "x.jsonl").write_text(content)
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "x.jsonl")),))
    with pytest.raises(DataError, match="no training text: 0 train documents"):
        prepare(data, TokenizerConfig(), 400, tmp_path / "out", tokenizer=tokenizer)
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_what_exists_is_never_overwritten(tmp_path: Path, tokenizer: Tokenizer):
    data = corpus(tmp_path, make_texts(20))
    (tmp_path / "out").mkdir()
    prepare(data, TokenizerConfig(), 400, tmp_path / "out", tokenizer=tokenizer)
    before = tree_hashes(tmp_path / "out")
    with pytest.raises(DataError, match="already holds prepared data"):
        prepare(data, TokenizerConfig(), 400, tmp_path / "out", tokenizer=tokenizer)
    assert tree_hashes(tmp_path / "out") == before
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        prepare(data, TokenizerConfig(), 400, tmp_path / "corpus.jsonl", tokenizer=tokenizer)


def test_contradictions_are_refused_before_reading(tmp_path: Path, make_prepared: MakePrepared):
    prepared = make_prepared(make_texts(20))

    def attempt(data: DataConfig, out: str = "new", vocab_size: int = 400) -> None:
        prepare(data, TokenizerConfig(), vocab_size, tmp_path / out, tokenizer=prepared.tokenizer)

    data = corpus(tmp_path, make_texts(20))
    with pytest.raises(ConfigError, match="'data.valid_fraction' must be at least 0 and below 1"):
        attempt(replace(data, valid_fraction=1.0))
    with pytest.raises(DataError, match="is prepared already"):
        attempt(DataConfig(sources=(SourceConfig(path=str(prepared.folders[0])),)))
    with pytest.raises(DataError, match="lies inside the source folder"):
        attempt(DataConfig(sources=(SourceConfig(path=str(tmp_path)),)))
    with pytest.raises(DataError, match="but model.vocab_size is 300"):
        attempt(data, vocab_size=300)
    mixed = (replace(data.sources[0], weight=1.0), SourceConfig())
    with pytest.raises(ConfigError, match="is not set but other sources have a weight"):
        attempt(replace(data, sources=mixed))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fail_at", range(8))
def test_full_disk_at_any_sync_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fail_at: int
):
    data = corpus(tmp_path, make_texts(50))
    calls = iter(range(1000))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DataError, match="No space left on device; [0-9]+ bytes free there"):
        prepare(data, TokenizerConfig(), 400, tmp_path / "out", tokenizer=tokenizer)
    assert os.listdir(tmp_path) == ["corpus.jsonl"]


def test_ctrl_c_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer):
    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    data = corpus(tmp_path, make_texts(50))
    with pytest.raises(KeyboardInterrupt):
        prepare(
            data, TokenizerConfig(), 400, tmp_path / "out", tokenizer=tokenizer, progress=interrupt
        )
    assert os.listdir(tmp_path) == ["corpus.jsonl"]


def test_file_size_limit_is_a_data_error_and_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    corpus(tmp_path, make_texts(2000))
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from lascaux.config.schema import *\n"
        "from lascaux.data.prepare import prepare\n"
        "from lascaux.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "data = DataConfig(sources=(SourceConfig(path='corpus.jsonl'),))\n"
        "try:\n"
        "    prepare(data, TokenizerConfig(path='tokenizer.json'), 400, Path('out'))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "File too large" in done.stdout and str(tmp_path / "out") in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "tokenizer.json"]


def test_two_at_once_on_one_folder_do_not_mix(tmp_path: Path, tokenizer: Tokenizer):
    data = corpus(tmp_path, make_texts(50))

    def second(done: int, total: int | None) -> None:
        with pytest.raises(DataError, match="another process is preparing"):
            prepare(data, TokenizerConfig(), 400, tmp_path / "out", tokenizer=tokenizer)

    prepare(data, TokenizerConfig(), 400, tmp_path / "out", tokenizer=tokenizer, progress=second)
    assert open_prepared(tmp_path / "out").hash_problems() == []
