"""Readers: good documents come out whole, every bad record is counted or refused."""

import gzip
import json
import os
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lascaux.config.schema import SourceConfig
from lascaux.data import records, sources
from lascaux.data.records import Document
from lascaux.data.sources import SourceReader
from lascaux.errors import DataError

GOOD = ["first\r\ndocument\n", "zweites – 日本 🎉", "\ufeffkept \x00 nul", "plain"]

BAD_LINES = {
    "invalid UTF-8": b'{"text": "\xff"}',
    "not a JSON object": b'["text"]',
    "text field 'text' missing": b'{"body": "x"}',
    "text is not a string": b'{"text": 5}',
    "lone surrogate": b'{"text": "\\ud800"}',
    "invalid JSON": b'{"text": "x"',
    "empty text": b'{"text": ""}',
    "line longer than 4096 bytes": b'{"text": "' + b"x" * 5000 + b'"}',
    "nested too deeply": b'{"text": ' + b"[" * 100_000,
}


def line(text: str) -> bytes:
    return json.dumps({"text": text, "id": 1}, ensure_ascii=False).encode()


def read(path: Path | str, strict: bool = False, text_field: str = "text"):
    reader = SourceReader(SourceConfig(path=str(path), text_field=text_field), strict)
    documents = list(reader.documents())
    assert reader.bytes_read == reader.total_bytes
    return documents, reader


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 4096)
    monkeypatch.setattr(records, "CHUNK_BYTES", 1024)


def deep_limit(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """The line that nests too deeply must be read whole; the over-long one must not."""
    if reason == "nested too deeply":
        monkeypatch.setattr(records, "MAX_LINE_BYTES", 1 << 20)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz"])
@pytest.mark.parametrize("reason", BAD_LINES)
def test_bad_record_is_counted_and_the_good_ones_are_whole(
    tmp_path: Path, short_lines: None, monkeypatch: pytest.MonkeyPatch, reason: str, suffix: str
):
    deep_limit(monkeypatch, reason)
    bad = BAD_LINES[reason]
    lines = [line(GOOD[0]), bad, line(GOOD[1]), line(GOOD[2]), bad, bad, line(GOOD[3])]
    content = b"\n".join(lines)
    path = tmp_path / f"data{suffix}"
    path.write_bytes(pack(content, suffix))
    documents, reader = read(path)
    assert texts(documents) == GOOD
    assert [document.origin for document in documents] == [f"{path}:{n}" for n in (1, 3, 4, 7)]
    assert reader.exclusions.counts == {reason: 3}
    first = reader.exclusions.listed[0]
    assert (first.line, first.byte_offset) == (2, len(lines[0]) + 1)
    assert [each.line for each in reader.exclusions.listed] == [2, 5, 6]


@pytest.mark.parametrize("reason", BAD_LINES)
def test_strict_refuses_a_bad_record_by_name(
    tmp_path: Path, short_lines: None, monkeypatch: pytest.MonkeyPatch, reason: str
):
    deep_limit(monkeypatch, reason)
    path = tmp_path / "data.jsonl"
    path.write_bytes(line("ok") + b"\n" + BAD_LINES[reason] + b"\n" + line("ok"))
    with pytest.raises(DataError) as caught:
        read(path, strict=True)
    assert f"{path}, line 2, byte {len(line('ok')) + 1}: {reason}" in str(caught.value)


def pack(content: bytes, suffix: str) -> bytes:
    half = len(content) // 2
    if suffix.endswith(".zst"):
        compress = zstandard.ZstdCompressor().compress
        return compress(content[:half]) + compress(content[half:])
    if suffix.endswith(".gz"):
        return gzip.compress(content[:half], mtime=0) + gzip.compress(content[half:], mtime=0)
    return content


def test_odd_but_good_json_is_read(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "bom"}\r\n\n   \n'
        b'{"n": ' + b"9" * 5000 + b', "text": "long number"}\n'
        b'{"text": "a", "text": "last of two"}\n'
        b'{"x": NaN, "text": "pair \\ud83c\\udf89"}'
    )
    documents, reader = read(path)
    assert texts(documents) == ["bom", "long number", "last of two", "pair 🎉"]
    assert not reader.exclusions.counts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=8))
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_any_text_survives_every_format(tmp_path_factory, suffix: str, written: list[str]):
    path = tmp_path_factory.mktemp("any") / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(written, pa.string())}), path)
    else:
        path.write_bytes(pack(b"\n".join(map(line, written)) or b"\n", suffix))
    assert texts(read(path)[0]) == written


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
def test_every_truncation_is_reported(tmp_path: Path, suffix: str):
    whole = pack(b"\n".join(line(f"text {n}") for n in range(50)), suffix)
    path = tmp_path / f"data{suffix}"
    path.write_bytes(whole)
    frame_end = next(
        size for size in range(1, len(whole)) if _reads(path, whole[:size])
    )  # the end of the first frame is the one cut that leaves a whole file
    for size in range(len(whole)):
        if size == frame_end:
            continue
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"{path.name}: truncated: .* byte {size} "):
            read(path)


def _reads(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        read(path)
    except DataError:
        return False
    return True


def test_damaged_zstd_is_a_data_error(tmp_path: Path):
    path = tmp_path / "data.jsonl.zst"
    content = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(line("x") * 99))
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged near byte"):
        read(path)


def test_a_bomb_is_stopped(tmp_path: Path):
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(bytes(100 << 20)))
    with pytest.raises(DataError, match="packed tighter than 1:2000 is refused"):
        read(path)


def test_a_zstd_window_beyond_the_limit_is_refused(tmp_path: Path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(compressor.compress(line("x")) + compressor.flush())
    with pytest.raises(DataError, match="too much memory"):
        read(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_field_missing_everywhere_names_the_fields(tmp_path: Path, suffix: str):
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"texts": ["a"], "url": ["b"]}), path)
    else:
        path.write_bytes(b'{"texts": "a", "url": "b"}\n' * 3)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).endswith(
        "the text field 'text'; fields: 'texts', 'url'; did you mean 'texts'?"
    )
    assert len(read(path, text_field="texts")[0]) in (1, 3)


def test_parquet_bad_rows_are_counted(tmp_path: Path):
    path = tmp_path / "data.parquet"
    good = [f"row {n}" for n in range(150)]
    values = [text.encode() for text in good]
    values[10:10] = [b"\xff", None, b""]
    column = pa.array(values, pa.binary())
    as_text = pa.StringArray.from_buffers(
        len(column), column.buffers()[1], column.buffers()[2], column.buffers()[0]
    )
    pq.write_table(pa.table({"text": as_text}), path, row_group_size=40)
    documents, reader = read(path)
    assert texts(documents) == good
    assert reader.exclusions.counts == {
        "invalid UTF-8": 1,
        "text is not a string": 1,
        "empty text": 1,
    }
    assert [each.line for each in reader.exclusions.listed] == [11, 12, 13]
    with pytest.raises(DataError, match="line 11: invalid UTF-8"):
        read(path, strict=True)


def test_parquet_column_must_hold_text_and_dictionaries_do(tmp_path: Path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match="column 'text' holds int64, expected string"):
        read(path)
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), path)
    assert texts(read(path)[0]) == ["a", "b", "a"]
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read(path)


def test_text_file_is_one_document_and_nothing_changes(tmp_path: Path):
    path = tmp_path / "notes.md"
    content = "\ufeffline\r\nline\rline\n\tend".encode()
    path.write_bytes(content)
    documents, _ = read(path)
    assert documents == [Document(content.decode(), str(path))]


def test_long_text_file_is_cut_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 50)
    path = tmp_path / "long.txt"
    content = "é" * 33 + "\n" + "".join(f"line {n} 🎉\n" for n in range(40)) + "日本" * 60
    path.write_text(content, encoding="utf-8", newline="")
    documents, reader = read(path)
    assert len(documents) > 5 and not reader.exclusions.counts
    assert "".join(texts(documents)) == content


def test_text_file_with_invalid_utf8_names_line_and_byte(tmp_path: Path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\ntwo\nth\xe9ree")
    assert read(path)[1].exclusions.counts == {"invalid UTF-8": 1}
    with pytest.raises(DataError, match=r"latin.txt, line 3, byte 10: invalid UTF-8"):
        read(path, strict=True)


def test_folder_is_read_in_order_and_what_is_left_out_is_counted(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "b" / "c.txt").write_text("c")
    (tmp_path / "b" / "d.jsonl").write_bytes(line("d"))
    (tmp_path / "b" / "e.jsonl.zst").write_bytes(pack(line("e") + b"\n", ".zst"))
    (tmp_path / "b" / "empty.txt").touch()
    (tmp_path / "f.dat").write_bytes(b"text\0binary")
    (tmp_path / "g.png").write_bytes(b"text")
    (tmp_path / "h").symlink_to(tmp_path / "b")
    (tmp_path / "i.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "z").write_text("z")
    documents, reader = read(tmp_path, strict=True)
    assert texts(documents) == ["a", "c", "d", "e", "z"]
    assert reader.exclusions.counts == {
        "hidden file or folder": 1,
        "binary file": 2,
        "empty file": 1,
        "not a regular file": 2,
    }


def test_stdlib_is_the_sources_of_this_python_without_tests():
    reader = SourceReader(SourceConfig())
    root = Path(sysconfig.get_path("stdlib"))
    found = [file.path.relative_to(root) for file in reader.files]
    assert found == sorted(found) and len(found) > 400
    assert Path("dataclasses.py") in found
    assert not any({"test", "tests", "site-packages"} & set(path.parts) for path in found)


def test_missing_and_unreadable_paths_are_data_errors(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match=r"does not exist; did you mean 'corpus.txt'\?"):
        read(tmp_path / "corpsu.txt")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="has no file to read"):
        read(tmp_path / "void")
    (tmp_path / "picture.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match="is a binary file"):
        read(tmp_path / "picture.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read(tmp_path / "pipe")


def test_a_file_that_vanishes_or_closes_is_a_data_error(tmp_path: Path):
    path = tmp_path / "x.txt"
    path.write_text("x")
    reader = SourceReader(SourceConfig(path=str(path)))
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(reader.documents())
