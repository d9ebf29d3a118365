"""Tokenizers with a token for each byte to fall back on, made here as Llama 2's and others' are."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lascaux.data import pieces as module
from lascaux.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from lascaux.errors import DataError

WORDS = "the words of a text are the words that the text has. def f(x): return x  # 12 é\n"
SPECIAL = ("<unk>", "<s>", "</s>")
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as SentencePiece orders them: special, bytes, merged, characters."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=160, show_progress=False)
    inner.train_from_iterator([WORDS * 30], trainer)
    model = json.loads(inner.to_str())["model"]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), *map(tuple, model["merges"])]
    made = ["▁▁", "▁▁▁▁", *(left + right for left, right in merges[2:])]
    single = [token for token in model["vocab"] if token not in made]
    tokens = [*SPECIAL, *BYTE_TOKENS, *made, *single]
    return {token: i for i, token in enumerate(tokens)}, merges  # type: ignore[return-value]


VOCABULARY, MERGES = trained()
TO_MARK = normalizers.Replace(" ", "▁")
BACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
STRIPPED = decoders.Sequence([*BACK, decoders.Strip(" ", 1, 0)])


def make(normalizer: Any, pre_tokenizer: Any, decoder: Any, extra: str = "") -> Any:
    vocabulary = VOCABULARY | ({extra: len(VOCABULARY)} if extra else {})
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if normalizer is not None:
        inner.normalizer = normalizer
    if pre_tokenizer is not None:
        inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoder
    inner.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in SPECIAL])
    return inner


def metaspace(scheme: str, split: bool) -> Any:
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)  # type: ignore[arg-type]


KINDS = {
    "llama 2": lambda: make(
        normalizers.Sequence([normalizers.Prepend("▁"), TO_MARK]), None, STRIPPED
    ),
    "mistral 3": lambda: make(None, metaspace("first", False), STRIPPED),
    "metaspace": lambda: make(None, metaspace("always", True), STRIPPED),
    "gemma": lambda: make(
        TO_MARK,
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoders.Sequence(BACK),
    ),
}
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")) | st.lists(
    st.sampled_from(
        ["</s>", "<s>", "\n", "    ", "\t", "the", " words", "\r\n", "é", "🎉", "<0x41>"]
    )
).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(KINDS[kind](), kind)


def as_it_comes_back(kind: str, text: str) -> str:
    """Metaspace takes a space at the very beginning for the one it puts there."""
    eaten = kind in ("mistral 3", "metaspace") and text.startswith(" ")
    return text[1:] if eaten else text


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_ids_are_the_librarys_and_the_text_comes_back(
    kind: str, tokenizer: Tokenizer, text: str
) -> None:
    library = KINDS[kind]()
    library.encode_special_tokens = True
    ids = tokenizer.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == as_it_comes_back(kind, text) == library.decode(ids)
    assert not {0, 1, 2} & set(ids), "names of special tokens are text"
    content = b"".join(map(tokenizer.token_bytes, ids))
    assert content == (tokenizer.prefix if text else b"") + tokenizer.decode(ids).encode()
    assert int(tokenizer.byte_lengths[ids].sum()) == len(content)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, len(VOCABULARY) + 3)))
def test_stream_decoder_equals_decode_for_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_every_byte_has_its_token(tokenizer: Tokenizer) -> None:
    for byte, name in enumerate(BYTE_TOKENS):
        assert tokenizer.token_bytes(VOCABULARY[name]) == bytes([byte])
    assert tokenizer.missing_bytes == ()
    assert tokenizer.token_bytes(VOCABULARY["▁the"]) == b" the"
    assert tokenizer.token_name(VOCABULARY["▁the"]) == " the"
    assert tokenizer.token_name(VOCABULARY["<0xE2>"]) == "<0xE2>"
    assert tokenizer.token_name(2) == "</s>" and tokenizer.token_bytes(2) == b""
    assert tokenizer.end_of_text_id == 2


def test_marks_are_transformers_marks(kind: str, tokenizer: Tokenizer) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())
    for text in ("<s>the text</s> the words", "<s> the", "the</s><s>the", "", "é</s>\n"):
        assert tokenizer.encode_marked(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "filler", ["the words of ", "words", "  the   ", "é🎉 ", "a b ", "\n the\n", " (x) the words "]
)
def test_long_texts_have_the_ids_of_the_whole(
    tokenizer: Tokenizer, filler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = filler * 300
    whole = tokenizer.encode(text)
    for length in (40, 100, 333):
        monkeypatch.setattr(module, "PIECE_CHARS", length)
        monkeypatch.setattr(module, "BATCH_BYTES", 3 * length)
        assert tokenizer.encode_batch([text, "the", text, ""]) == [
            whole,
            tokenizer.encode("the"),
            whole,
            [],
        ]


def test_a_token_over_two_words_keeps_texts_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a token may cross from one word into the next, no cut is safe."""
    MERGES_WITH = [*MERGES, ("▁of", "▁a")]
    vocabulary = VOCABULARY | {"▁of▁a": len(VOCABULARY)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=MERGES_WITH, unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), TO_MARK])
    inner.decoder = STRIPPED
    inner.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in SPECIAL])
    crossing = Tokenizer(inner)
    text = "the words of a text " * 100
    whole = crossing.encode(text)
    assert vocabulary["▁of▁a"] in whole
    monkeypatch.setattr(module, "PIECE_CHARS", 50)
    assert crossing.encode(text) == whole


def test_random_texts_in_pieces(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    parts = ["the", " ", "words", "  ", "é", "\n", "f", "(x)", " of", ".", "🎉", "a"]
    for _ in range(100):
        text = "".join(draw.choice(parts) for _ in range(200))
        whole = tokenizer.encode(text)
        with monkeypatch.context() as patch:
            patch.setattr(module, "PIECE_CHARS", draw.randrange(10, 120))
            assert tokenizer.encode(text) == whole


def test_a_saved_one_loads_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path)
    assert loaded.sha256 == tokenizer.sha256 and loaded.encode(WORDS) == tokenizer.encode(WORDS)


def changed(key: str, value: Any) -> Any:
    return lambda content: content | {key: value}


def in_model(key: str, value: Any) -> Any:
    return lambda content: content | {"model": content["model"] | {key: value}}


def without_byte(content: dict[str, Any]) -> dict[str, Any]:
    vocabulary = {t: i for t, i in content["model"]["vocab"].items() if t != "<0x7F>"}
    return content | {"model": content["model"] | {"vocab": vocabulary}}


REFUSED = {
    "no byte fallback": (in_model("byte_fallback", False), "neither a byte-level tokenizer"),
    "a byte missing": (without_byte, "neither a byte-level tokenizer"),
    "compatibility forms": (changed("normalizer", {"type": "NFKC"}), "has the step 'NFKC'"),
    "small letters": (changed("normalizer", {"type": "Lowercase"}), "has the step 'Lowercase'"),
    "stripped": (
        changed("normalizer", {"type": "Strip", "strip_left": True, "strip_right": True}),
        "has the step 'Strip'",
    ),
    "another replacement": (
        changed("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "▁"}),
        "has the step 'Replace'",
    ),
    "blanks taken out": (
        changed("pre_tokenizer", {"type": "WhitespaceSplit"}),
        "has the step 'WhitespaceSplit'",
    ),
    "split and removed": (
        changed(
            "pre_tokenizer",
            {"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed", "invert": False},
        ),
        "'x' comes back as",
    ),
    "no end": (
        lambda c: (
            c
            | {"added_tokens": c["added_tokens"][:2]}
            | {
                "model": c["model"]
                | {"vocab": {t.replace("</s>", "end"): i for t, i in VOCABULARY.items()}}
            }
        ),
        "no end-of-text token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_texts_is_refused(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    content = json.loads(KINDS["llama 2"]().to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(change(content)))
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unigram_with_bytes_to_fall_back_on_works_too() -> None:
    pieces: list[tuple[str, float]] = [(name, 0.0) for name in SPECIAL]
    pieces += [(name, -20.0) for name in BYTE_TOKENS]
    pieces += [("▁", -3.0), ("▁the", -4.0), ("▁words", -5.0), ("t", -8.0), ("he", -7.0)]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = metaspace("always", True)
    inner.decoder = STRIPPED
    inner.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in SPECIAL])
    tokenizer = Tokenizer(inner)
    for text in ("the words", "the é 🎉 words\n", "x"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text == inner.decode(ids)
