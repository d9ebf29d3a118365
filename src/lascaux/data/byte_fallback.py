"""Tokenizers in SentencePiece's manner: Llama 1 and 2, Mistral, Mixtral, TinyLlama.

A space is written ▁ (U+2581), most put one before a text, and what has no token of its own is
spelt in tokens of single bytes, <0x00> to <0xFF>. Kudo & Richardson 2018. What such a tokenizer
itself cannot tell apart stays so: ▁ in a text is a space, and those with "Metaspace" take a space
at the very beginning for the one they put there.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import tokenizers

from lascaux.errors import DataError

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
CROSSING = re.compile(f"[^{SPACE}]{SPACE}")
PROBES = ("x", "two  words ", "Aé ①ﬁ e\u0301", "\n\t🎉\x00")
"""texts that other normalisations, of letters, blanks or signs, do not leave as they are"""
HARMLESS = ("Split", "Digits", "Punctuation")
"""ways to cut a text that have no part in its beginning"""


@dataclass(frozen=True, slots=True)
class ByteFallback:
    """How a tokenizer of this kind treats the beginning of a text, and long texts."""

    inside: tokenizers.Tokenizer
    """encodes a piece from inside a text: nothing is put before it"""
    prefixed: bool
    """encoding puts a space before a text"""
    cuts: bool
    """no token goes from one word into the next: text may be encoded in pieces"""


def read_byte_fallback(inner: tokenizers.Tokenizer, origin: str) -> ByteFallback:
    """The tokenizer's habits. Raises: DataError for one of another kind, or that changes texts."""
    content = json.loads(inner.to_str())
    model = content["model"]
    vocabulary = inner.get_vocab(with_added_tokens=False)
    bytes_there = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if not bytes_there or model.get("byte_fallback") is not True:
        raise DataError(
            f"{origin}: neither a byte-level tokenizer (GPT-2, GPT-J, GPT-NeoX, Llama 3, SmolLM2 "
            "and others) nor one with a token for each byte to fall back on (Llama 2, Mixtral)"
        )
    content["normalizer"] = _without_prefix(content.get("normalizer"), origin)
    content["pre_tokenizer"] = _without_prefix(content.get("pre_tokenizer"), origin)
    try:
        first = inner.encode("x", add_special_tokens=False).tokens[0]
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{origin} cannot encode a text: {error}") from None
    found = ByteFallback(
        inside=tokenizers.Tokenizer.from_str(json.dumps(content)),
        prefixed=first.startswith(SPACE),
        cuts=not any(CROSSING.search(token) for token in vocabulary),
    )
    found.inside.encode_special_tokens = True
    for text in PROBES:
        tokens = inner.encode(text, add_special_tokens=False).tokens
        given = b"".join(map(bytes_of, tokens)).removeprefix(b" " if found.prefixed else b"")
        if given != text.encode():
            raise DataError(
                f"{origin}: {text!r} comes back as {given.decode(errors='replace')!r}; a tokenizer "
                "that changes texts cannot be used"
            )
    return found


def _without_prefix(part: dict[str, Any] | None, origin: str) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts nothing before a text."""
    if part is None or part["type"] in HARMLESS:
        return part
    kind = part["type"]
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        kept = [_without_prefix(each, origin) for each in part[key]]
        return part | {key: [each for each in kept if each is not None]}
    if kind == "Prepend" and part["prepend"] == SPACE:
        return None
    if kind == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE:
        return part
    if kind == "Metaspace" and part["replacement"] == SPACE:
        return part | {"prepend_scheme": "never"}
    raise DataError(f"{origin}: has the step '{kind}', which may change texts; it cannot be used")


def bytes_of(token: str) -> bytes:
    """The bytes that a token of the vocabulary stands for."""
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
