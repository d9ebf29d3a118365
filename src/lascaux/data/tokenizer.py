"""Text to token ids and back: byte-level BPE, trained here or loaded, and others with its bytes.

The work is done by the `tokenizers` library; this module fixes what the rest relies on: special
tokens written in a text are ordinary text, ids map to exact bytes, memory stays bounded for long
documents, and the same text trains the same tokenizer. Byte-level BPE: Radford et al. 2019; the
others: `byte_fallback.py`.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from lascaux.data.byte_fallback import bytes_of, read_byte_fallback
from lascaux.data.pieces import Piece, batches, cut
from lascaux.errors import ConfigError, DataError

Pattern = Literal["gpt2", "code"]

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|eot_id|>", "<|im_end|>")
MIN_VOCAB_SIZE = 257
MAX_VOCAB_SIZE = 1 << 24

# In order: a line break with the blank space around it and the indentation that follows;
# an English contraction; a word with the space and one sign before it; up to three digits;
# a run of signs; blank space, leaving its last character to the word behind it.
CODE_PATTERN = "|".join(
    [
        r"\s*\n[ \t]*",
        r"'(?:[sdmt]|ll|re|ve)(?![\p{L}\p{N}_])",
        r" ?[^\s\p{L}\p{N}]?\p{L}[\p{L}\p{M}]*",
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE files."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable}
    stand_in |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


class Tokenizer:
    """A tokenizer whose ids stand for exact bytes: byte-level, or with bytes to fall back on.

    Special tokens come from this program alone: their names inside a text are ordinary text, but
    for `encode_marked`, and they stand for no text themselves (`token_bytes` is empty, `decode`
    leaves them out).

    Raises: DataError for a tokenizer of another kind, or without an end-of-text token.
    """

    def __init__(self, inner: tokenizers.Tokenizer, origin: str = "tokenizer") -> None:
        self.origin = origin
        self._inner = inner
        # First of all: the library itself sizes tables by the largest id.
        largest_id = max(inner.get_vocab(with_added_tokens=True).values(), default=0)
        if largest_id >= MAX_VOCAB_SIZE:
            raise DataError(f"{origin}: largest token id {largest_id} is beyond {MAX_VOCAB_SIZE}")
        inner.no_padding()
        inner.no_truncation()
        byte_level = '"type":"ByteLevel"' in _compact(json.loads(inner.to_str()).get("decoder"))
        self.end_of_text_id: int = _find_end_of_text(inner, origin)
        inner.encode_special_tokens = True
        self._fallback = None if byte_level else read_byte_fallback(inner, origin)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        """smallest type that holds every id"""
        to_bytes = _byte_level if byte_level else bytes_of
        self._bytes = _bytes_of_ids(inner, vocabulary, self.vocab_size, to_bytes, origin)
        known = {token[0] for token in self._bytes if len(token) == 1}
        self.missing_bytes: tuple[int, ...] = tuple(sorted(_UTF8_BYTES - known))
        """Bytes of UTF-8 that no single token stands for; text with them may be lost."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; `decode` gives the text back."""
        return self.encode_batch([text])[0]

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of a text in which the name of a special token stands for that token.

        For text that this program, or whoever it trusts, has put together; not for what users type.
        """
        return self._marked.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, computed on all cores."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Token ids of each text as arrays of `dtype`, with bounded memory beyond the result.

        A text beyond 262,144 characters is encoded in pieces. They are cut before a space between
        two letters, where the known patterns cut as well; a text without one is cut at that length,
        unless the tokenizer falls back on bytes: its ids are those of the whole text.
        """
        other = self._fallback
        inside = self._inner if other is None else other.inside
        cuts, anywhere = other is None or other.cuts, other is None
        pieces = [
            Piece(number, place, piece)
            for number, text in enumerate(texts)
            for place, piece in enumerate(cut(text, anywhere) if cuts else [text])
        ]
        parts: list[list[NDArray[np.unsignedinteger]]] = [[] for _ in texts]
        for batch in batches(pieces):
            for first, group in groupby(batch, key=lambda piece: piece.place == 0):
                listed = list(group)
                encodings = (self._inner if first else inside).encode_batch_fast(
                    [piece.text for piece in listed], add_special_tokens=False
                )
                for piece, encoding in zip(listed, encodings, strict=True):
                    parts[piece.number].append(np.array(encoding.ids, dtype=self.dtype))
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without the space that some tokenizers put before a text.

        Bytes that form no UTF-8 (only a model can put ids so) show as U+FFFD.
        """
        content = b"".join(map(self.token_bytes, ids)).removeprefix(self.prefix)
        return content.decode("utf-8", errors="replace")

    @property
    def prefix(self) -> bytes:
        """What encoding puts before every text; byte-level tokenizers put nothing there."""
        return b" " if self._fallback is not None and self._fallback.prefixed else b""

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token; none for special tokens and for ids without a token."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_name(self, token_id: int) -> str:
        """How a token is written: a special token's name, else its text.

        Bytes that are no whole characters are written like <0xE2>, ids without a token <id 50300>.
        """
        name = self._inner.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if name is None:
            return f"<id {token_id}>"
        content = self._bytes[token_id]
        try:
            return content.decode("utf-8") or name
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in content)

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name in the vocabulary, or None."""
        return self._inner.token_to_id(name)

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        """A tokenizer of its own: the switch between the two is no argument of a call."""
        other = tokenizers.Tokenizer.from_str(self.json)
        other.encode_special_tokens = False
        return other

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32]:
        """Bytes of text of each token id, shape (vocab_size,); 0 for special tokens."""
        return np.array([len(token) for token in self._bytes], dtype=np.int32)

    @cached_property
    def json(self) -> str:
        """The content of tokenizer.json, the same for equal tokenizers."""
        return self._inner.to_str(pretty=False)

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical JSON; equal for tokenizers that encode alike."""
        return hashlib.sha256(_compact(json.loads(self.json)).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write tokenizer.json, which Hugging Face libraries read as well."""
        path.write_text(self.json, encoding="utf-8")


class StreamDecoder:
    """Turns token ids into text one by one, holding back bytes of unfinished characters.

    All that `feed` and `flush` return, joined, equals `Tokenizer.decode` of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prefix = tokenizer.prefix

    def feed(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        content = self._tokenizer.token_bytes(token_id)
        if content:
            content, self._prefix = content.removeprefix(self._prefix), b""
        return self._utf8.decode(content)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character is unfinished, else nothing."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(texts: Iterator[str], vocab_size: int, pattern: Pattern = "gpt2") -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` entries; the same texts give the same one.

    Entries: the end-of-text token, the 256 bytes, then merges seen at least twice. Little text may
    give fewer entries than asked for.

    Raises: ConfigError for a `vocab_size` below 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"'model.vocab_size' must be at least {MIN_VOCAB_SIZE} to train a tokenizer: "
            f"256 bytes and {END_OF_TEXT}; got {vocab_size}"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = _splitter(pattern)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(BYTE_CHARACTERS),
        show_progress=False,
    )
    inner.train_from_iterator((piece for text in texts for piece in cut(text)), trainer)
    return Tokenizer(inner, "trained tokenizer")


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer: tokenizer.json, or a folder with it or with GPT-2's two files.

    GPT-2's files are encoder.json with vocab.bpe, or vocab.json with merges.txt.

    Raises: DataError for a path without them, or a file that is no such tokenizer.
    """
    if path.is_file():
        return _load_json(path)
    if not path.is_dir():
        raise DataError(f"tokenizer '{path}' does not exist")
    if (path / "tokenizer.json").is_file():
        return _load_json(path / "tokenizer.json")
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (path / vocabulary).is_file() and (path / merges).is_file():
            return _load_gpt2(path / vocabulary, path / merges)
    raise DataError(
        f"tokenizer folder '{path}' has neither tokenizer.json, nor encoder.json with vocab.bpe, "
        f"nor vocab.json with merges.txt"
    )


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _splitter(pattern: Pattern) -> pre_tokenizers.PreTokenizer:
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pieces = pre_tokenizers.Split(Regex(CODE_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pieces, to_bytes])


def _find_end_of_text(inner: tokenizers.Tokenizer, origin: str) -> int:
    for name in END_OF_TEXT_NAMES:
        token_id = inner.token_to_id(name)
        if token_id is not None:
            inner.add_special_tokens([AddedToken(name, special=True, normalized=False)])
            return token_id
    raise DataError(f"{origin}: no end-of-text token; known names: {', '.join(END_OF_TEXT_NAMES)}")


def _byte_level(token: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in token)


def _bytes_of_ids(
    inner: tokenizers.Tokenizer,
    vocabulary: dict[str, int],
    size: int,
    to_bytes: Callable[[str], bytes],
    origin: str,
) -> list[bytes]:
    """The bytes of each id; empty for special tokens and for ids that have no token."""
    added = inner.get_added_tokens_decoder()
    bytes_of = [b""] * size
    for token, token_id in vocabulary.items():
        if token_id in added:
            bytes_of[token_id] = b"" if added[token_id].special else token.encode()
            continue
        try:
            bytes_of[token_id] = to_bytes(token)
        except KeyError as error:
            raise DataError(
                f"{origin}: token {token_id} {token!r} is not byte-level: "
                f"{error.args[0]!r} stands for no byte"
            ) from None
    return bytes_of


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"tokenizer file '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"tokenizer file '{path}': not UTF-8 at byte {error.start}") from None


def _load_json(path: Path) -> Tokenizer:
    text = _read_text(path)
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"tokenizer file '{path}' is malformed: {error}") from None
    return Tokenizer(inner, str(path))


def _load_gpt2(vocabulary_path: Path, merges_path: Path) -> Tokenizer:
    try:
        vocabulary = json.loads(_read_text(vocabulary_path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"tokenizer file '{vocabulary_path}' is malformed: {error}") from None
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise DataError(f"tokenizer file '{vocabulary_path}': expected an object of token to id")
    for token, token_id in vocabulary.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_VOCAB_SIZE:
            raise DataError(
                f"tokenizer file '{vocabulary_path}': id of {token!r} is {token_id!r}, "
                f"expected a whole number from 0 to {MAX_VOCAB_SIZE - 1}"
            )
    merges = []
    for number, line in enumerate(_read_text(merges_path).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.removesuffix("\r").split(" ")
        if len(pair) != 2 or not all(pair):
            raise DataError(
                f"tokenizer file '{merges_path}', line {number}: expected two tokens with a space "
                f"between them; got {line[:60]!r}"
            )
        merges.append((pair[0], pair[1]))
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"tokenizer files '{vocabulary_path}' and '{merges_path}' disagree: {error}"
        ) from None
    inner.pre_tokenizer = _splitter("gpt2")
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner, str(vocabulary_path.parent))
