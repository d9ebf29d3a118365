"""Opening a prepared folder: damage is named, hashes find every byte."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lascaux.data.shards import PreparedData, TokenStream, index_sha256, open_prepared
from lascaux.data.tokenizer import train_tokenizer
from lascaux.errors import DataError

from .conftest import make_texts

MakePrepared = Callable[..., PreparedData]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_stream_reads_across_shards_like_one_array(lengths: list[int], start: int, stop: int):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    shards = np.split(whole, np.cumsum(lengths)[:-1]) if lengths else []
    stream = TokenStream(shards, 0, 0, 0)
    start, stop = min(start, stop), max(start, stop)
    assert stream.read(start, stop).tolist() == whole[start:stop].tolist()
    assert stream.tokens == len(whole)


def test_flipped_byte_in_any_file_is_found_by_name(make_prepared: MakePrepared):
    folder = make_prepared(make_texts(60)).folders[0]
    names = sorted(path.name for path in folder.iterdir() if path.stat().st_size)
    assert "index.json" in names and len(names) >= 6
    for name in names:
        whole = (folder / name).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            (folder / name).write_bytes(damaged)
            with pytest.raises(DataError, match=name):
                open_prepared(folder).check_hashes()
        (folder / name).write_bytes(whole)
    open_prepared(folder).check_hashes()


@pytest.mark.parametrize("change", [b"", None, "longer"])
def test_missing_or_resized_shard_is_found_at_open(
    make_prepared: MakePrepared, change: bytes | str | None
):
    folder = make_prepared(make_texts(60)).folders[0]
    shard = folder / "s0.train.00000.tokens"
    size = shard.stat().st_size
    if change is None:
        shard.unlink()
        expected = "No such file"
    else:
        shard.write_bytes(b"" if change == b"" else shard.read_bytes() + b"x")
        expected = f"expected {size} bytes, found {shard.stat().st_size}"
    with pytest.raises(DataError, match=rf"s0.train.00000.tokens: {expected}"):
        open_prepared(folder)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index and give it the right hash again."""
    index = json.loads((folder / "index.json").read_text())
    change(index)
    index["index_sha256"] = index_sha256(index)
    (folder / "index.json").write_text(json.dumps(index))


def train_of(index: dict[str, Any]) -> dict[str, Any]:
    return index["sources"][0]["splits"]["train"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("dtype"), "field 'dtype' is missing"),
        (lambda i: i.update(dtype="int8"), "dtype 'int8', expected one of uint16, uint32"),
        (lambda i: i.update(vocab_size="x"), "field 'vocab_size' must be int; got 'x'"),
        (lambda i: i.update(vocab_size=True), "field 'vocab_size' must be int"),
        (lambda i: i.update(format=99), "format 99, this version reads format 1"),
        (lambda i: i.update(sources={}), "field 'sources' must be list"),
        (lambda i: i["sources"].append(3), r"sources\[1\]: field 'splits' is missing"),
        (lambda i: train_of(i).update(largest_id=400), "largest_id 400 is beyond vocab_size"),
        (lambda i: train_of(i).update(tokens=1), "1 tokens, but the shards hold"),
        (lambda i: train_of(i).update(documents=-1), "'documents' must not be negative; got -1"),
        (
            lambda i: train_of(i)["shards"][0].update(file="../x"),
            "file name '../x' leads out of the folder",
        ),
        (lambda i: train_of(i)["shards"][0].update(tokens=3), "3 tokens of 2 bytes do not make"),
    ],
)
def test_malformed_index_names_the_field(
    make_prepared: MakePrepared, change: Callable[[dict[str, Any]], Any], message: str
):
    folder = make_prepared(make_texts(60)).folders[0]
    edit(folder, change)
    with pytest.raises(DataError, match=message):
        open_prepared(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_unreadable_index_is_a_data_error(tmp_path: Path, content: bytes):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(DataError, match="index.json"):
        open_prepared(tmp_path)


def test_another_tokenizer_is_found_at_open(make_prepared: MakePrepared):
    prepared = make_prepared(make_texts(60))
    other = train_tokenizer(iter(make_texts(200, seed=9)), 400, "gpt2")
    folder = prepared.folders[0]
    other.save(folder / "tokenizer.json")
    size = (folder / "tokenizer.json").stat().st_size
    edit(folder, lambda index: index["files"]["tokenizer.json"].update(bytes=size))
    with pytest.raises(DataError, match="not the tokenizer the shards were made with"):
        open_prepared(folder)


def test_a_folder_without_index_is_no_prepared_folder(tmp_path: Path):
    with pytest.raises(DataError, match="is no prepared folder: index.json: No such file"):
        open_prepared(tmp_path)
