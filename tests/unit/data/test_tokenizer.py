"""The tokenizer: lossless, deterministic, equal to GPT-2, safe with special tokens."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from lascaux.data import pieces as module
from lascaux.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, train_tokenizer
from lascaux.errors import ConfigError, DataError

GPT2 = Path(__file__).parents[3].parent / "shared" / "data" / "gpt2_bpe"

any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(
        ["<|endoftext|>", "\n", "    ", "\t", "def", " ", "\r\n", "é", "🎉", "'s", "_x"]
    )
).map("".join)


@pytest.fixture(scope="module", params=["gpt2", "code"])
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    text = "def f(self):\n    return self.value  # it's 12345 <|endoftext|> é\n\n\n"
    return train_tokenizer(iter([text] * 20), 320, request.param)


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_round_trip_is_lossless(trained: Tokenizer, text: str):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.end_of_text_id not in ids
    assert int(trained.byte_lengths[ids].sum()) == len(text.encode())
    assert b"".join(map(trained.token_bytes, ids)) == text.encode()


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 330)))
def test_stream_decoder_equals_decode_for_any_ids(trained: Tokenizer, ids: list[int]):
    decoder = StreamDecoder(trained)
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == trained.decode(ids)


def test_stream_decoder_gives_whole_characters_only(trained: Tokenizer):
    decoder = StreamDecoder(trained)
    given_out = [decoder.feed(token_id) for token_id in trained.encode("🎉")]
    assert given_out[-1] == "🎉" and not any(given_out[:-1]) and decoder.flush() == ""
    decoder.feed(trained.encode("🎉")[0])
    assert decoder.flush() == "\ufffd"


def test_special_token_stands_for_no_text(trained: Tokenizer):
    end = trained.end_of_text_id
    assert trained.token_bytes(end) == b"" and trained.byte_lengths[end] == 0
    assert trained.decode([*trained.encode("a"), end, *trained.encode("b")]) == "ab"
    assert trained.token_bytes(10**6) == b"" and trained.token_bytes(-1) == b""
    assert trained.byte_lengths.shape == (trained.vocab_size,) and not trained.missing_bytes


def test_code_pattern_keeps_line_break_and_indentation_together():
    tokenizer = train_tokenizer(iter(["x = 1\n\n        return\n"] * 50), 300, "code")
    pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode("x = 1\n\n        return\n")]
    assert b"\n\n        " in pieces and b"return" in pieces


def test_same_text_trains_the_same_tokenizer_in_another_process(trained: Tokenizer):
    program = (
        "from lascaux.data.tokenizer import train_tokenizer\n"
        "text = ''.join(f'word{n % 97} line{n % 13}\\n' for n in range(3000))\n"
        "print(train_tokenizer(iter([text] * 3), 700, 'code').sha256)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": "random"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for parallel in ("true", "false")
    }
    assert len(hashes) == 1


def test_saved_tokenizer_loads_equal(trained: Tokenizer, tmp_path: Path):
    trained.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.sha256 == trained.sha256
        assert loaded.encode("a<|endoftext|>\n  b") == trained.encode("a<|endoftext|>\n  b")


def test_vocabulary_must_hold_all_bytes():
    with pytest.raises(ConfigError, match="'model.vocab_size' must be at least 257.*got 256"):
        train_tokenizer(iter(["x"]), 256)
    assert train_tokenizer(iter([]), 257).vocab_size == 257


@pytest.mark.parametrize("filler", ["word and ", "    ", "x", "(", "\n \n", "é🎉 "])
def test_long_text_is_encoded_in_pieces_without_loss(
    trained: Tokenizer, monkeypatch: pytest.MonkeyPatch, filler: str
):
    text = filler * 400
    whole = trained.encode(text)
    monkeypatch.setattr(module, "PIECE_CHARS", 100)
    monkeypatch.setattr(module, "BATCH_BYTES", 250)
    pieces = trained.encode(text)
    assert trained.decode(pieces) == text
    if filler == "word and ":
        assert pieces == whole


def test_encode_batch_equals_encode(trained: Tokenizer):
    batch = ["a", "", "def f():\n", "🎉" * 10]
    assert trained.encode_batch(batch) == [trained.encode(text) for text in batch]
    assert all(ids.dtype == np.uint16 for ids in trained.encode_arrays(batch))


@pytest.mark.skipif(not GPT2.is_dir(), reason="GPT-2's files are not here")
def test_gpt2_files_give_gpt2_ids(tmp_path: Path):
    gpt2 = load_tokenizer(GPT2)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" the") == [262]
    assert (gpt2.vocab_size, gpt2.end_of_text_id) == (50257, 50256)
    (tmp_path / "vocab.json").write_bytes((GPT2 / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((GPT2 / "vocab.bpe").read_bytes())
    assert load_tokenizer(tmp_path).sha256 == gpt2.sha256


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ("[]", "", "expected an object"),
        ("{", "", "is malformed"),
        ('{"a": "1"}', "", "expected a whole number"),
        ('{"a": 0, "<|endoftext|>": 1}', "a\n", "line 1: expected two tokens"),
        ('{"a": 0, "<|endoftext|>": 1}', "a b\n", "disagree"),
        ('{"a": 0}', "", "no end-of-text token"),
        ('{"日": 0, "<|endoftext|>": 1}', "", "'日' stands for no byte"),
        ('{"a": 4000000000, "<|endoftext|>": 1}', "", "from 0 to 16777215"),
    ],
)
def test_malformed_gpt2_files_are_data_errors(
    tmp_path: Path, vocabulary: str, merges: str, message: str
):
    (tmp_path / "encoder.json").write_text(vocabulary, encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text(merges)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_malformed_or_missing_tokenizer_is_a_data_error(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(DataError, match="has neither tokenizer.json"):
        load_tokenizer(tmp_path)
    for content in (b"", b"{}", b"\xff", b"[" * 100_000, json.dumps({"model": 1}).encode()):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(DataError, match="tokenizer.json"):
            load_tokenizer(tmp_path)


def test_a_huge_id_in_tokenizer_json_is_refused(trained: Tokenizer, tmp_path: Path):
    content = json.loads(trained.json)
    content["model"]["vocab"]["abc"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="largest token id 4000000000 is beyond 16777216"):
        load_tokenizer(tmp_path)


def test_other_kinds_of_tokenizer_are_refused_by_name():
    inner = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    with pytest.raises(DataError, match="mine: neither a byte-level tokenizer"):
        Tokenizer(inner, "mine")


def test_a_known_end_of_text_name_becomes_special():
    vocabulary = {c: n for n, c in enumerate(pre_tokenizers.ByteLevel.alphabet())} | {"</s>": 256}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(inner)
    assert tokenizer.end_of_text_id == 256
    assert tokenizer.decode(tokenizer.encode("a</s>")) == "a</s>"
