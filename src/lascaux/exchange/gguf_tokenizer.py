"""A tokenizer and the roles of its tokens from the metadata of a GGUF file.

Two kinds: "gpt2" is byte-level BPE; "llama" is SentencePiece's, where a score says what is merged
first and single bytes stand in for what has no token.
`tokenizer.ggml.pre` names how text is cut into words; the patterns are those that llama.cpp and the
models' own tokenizer.json have. A name that is not here is refused: another pattern would give
other ids, and the model would answer worse without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lascaux.checkpoint.files import shown
from lascaux.data.byte_fallback import SPACE
from lascaux.data.roles import TokenRoles
from lascaux.data.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from lascaux.errors import DataError
from lascaux.exchange.token_files import with_begin

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""values of tokenizer.ggml.token_type"""
LONGEST_TOKEN = 1000
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (WORDS,),
    "mpt": (WORDS,),
    "olmo": (WORDS,),
    "smollm": (r"\p{N}", WORDS),
    "starcoder": (r"\p{N}", WORDS),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""the cuts of each name, one after the other"""
WHOLE_WORDS = ("llama-bpe",)
"""a word that is a token stays one, whatever the merges say; a text begins with the begin token"""


def read_tokenizer(metadata: Mapping[str, Any], path: Path) -> tuple[Tokenizer, TokenRoles]:
    """The tokenizer and the roles of a file.

    Raises: DataError for metadata that is missing or malformed, and for what it cannot rebuild.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = read_tokens(metadata, path)
    if kind not in ("gpt2", "llama"):
        raise DataError(
            f"{path}: tokenizer.ggml.model {shown(kind)} cannot be rebuilt; Lascaux reads 'gpt2' "
            "(byte-level BPE) and 'llama' (SentencePiece)"
        )
    types = read_types(metadata, len(tokens), path)
    inner = (byte_level if kind == "gpt2" else scored)(metadata, tokens, types, path)
    for role in (CONTROL, UNKNOWN):
        inner.add_special_tokens(
            [_added(tokens[i], True) for i in np.flatnonzero(types == role) if tokens[i]]
        )
    inner.add_tokens([_added(tokens[i], False) for i in np.flatnonzero(types == USER_DEFINED)])
    tokenizer = Tokenizer(inner, str(path))
    roles = read_token_roles(metadata, tokens, tokenizer, path)
    if roles.begin_ids and roles.begin_token is not None:
        tokenizer = with_begin(tokenizer, roles.begin_token, roles.begin_ids[0])
    return tokenizer, roles


def _added(name: str, special: bool) -> AddedToken:
    return AddedToken(name, special=special, normalized=False)


def read_tokens(metadata: Mapping[str, Any], path: Path) -> list[str]:
    """The name of each id."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= MAX_VOCAB_SIZE:
        raise DataError(
            f"{path}: tokenizer.ggml.tokens must be a list of names; found {shown(tokens)}"
        )
    names = [name for name in cast(list[str], tokens) if name]
    if len(set(names)) != len(names):
        raise DataError(f"{path}: tokenizer.ggml.tokens has a name twice")
    return cast(list[str], tokens)


def read_types(metadata: Mapping[str, Any], size: int, path: Path) -> Any:
    """The type of each id, shape (size,)."""
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return np.full(size, NORMAL)
    if not isinstance(types, np.ndarray) or types.shape != (size,) or types.dtype.kind not in "iu":
        raise DataError(f"{path}: tokenizer.ggml.token_type must have a number for each token")
    return types


def byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: Any, path: Path
) -> tokenizers.Tokenizer:
    """Byte-level BPE; tokens that are there to fill up the embedding are left out."""
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PATTERNS:
        raise DataError(
            f"{path}: tokenizer.ggml.pre {shown(name)} is not known to Lascaux; it reads "
            f"{', '.join(PATTERNS)}. Import the model's Hugging Face folder instead"
        )
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise DataError(f"{path}: tokenizer.ggml.merges must be a list; found {shown(lines)}")
    merges: list[tuple[str, str]] = []
    for line in cast(list[Any], lines):
        pair = str(line).split(" ")
        if len(pair) != 2 or not all(pair):
            raise DataError(f"{path}: tokenizer.ggml.merges has {shown(line)}, not two tokens")
        merges.append((pair[0], pair[1]))
    vocabulary = {token: i for i, token in enumerate(tokens) if token and types[i] != UNUSED}
    inner = _bpe(path, vocabulary, merges, ignore_merges=name in WHOLE_WORDS)
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PATTERNS[name]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    inner.decoder = decoders.ByteLevel()
    return inner


def _bpe(
    path: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"{path}: tokens and merges of the tokenizer disagree: {shown(str(error))}"
        ) from None


def scored(
    metadata: Mapping[str, Any], tokens: list[str], types: Any, path: Path
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of all neighbours that are a token together, the best score first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != types.shape:
        raise DataError(f"{path}: tokenizer.ggml.scores must have a number for each token")
    spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if type(spaced) is not bool:
        raise DataError(f"{path}: tokenizer.ggml.add_space_prefix must be true or false")
    if (longest := max(map(len, tokens))) > LONGEST_TOKEN:
        raise DataError(f"{path}: tokenizer.ggml.tokens has one of {longest:,} characters")
    vocabulary = {token: i for i, token in enumerate(tokens) if token and types[i] != UNUSED}
    plain = {token: i for token, i in vocabulary.items() if types[i] == NORMAL}
    merges = [
        (-float(scores[i]), i, token[:cut], token[cut:])
        for token, i in plain.items()
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    unknown = np.flatnonzero(types == UNKNOWN)
    inner = _bpe(
        path,
        vocabulary,
        [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=tokens[unknown[0]] if len(unknown) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    to_mark = normalizers.Replace(" ", SPACE)
    before = [normalizers.Prepend(SPACE)] if spaced else []
    inner.normalizer = normalizers.Sequence([*before, to_mark])
    after = [decoders.Strip(" ", 1, 0)] if spaced else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return inner


def read_token_roles(
    metadata: Mapping[str, Any], tokens: list[str], tokenizer: Tokenizer, path: Path
) -> TokenRoles:
    """Which tokens begin and end a text, and the template."""

    def name_of(role: Literal["bos", "eos", "eot", "eom", "padding"]) -> str | None:
        key = f"tokenizer.ggml.{role}_token_id"
        value = metadata.get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(tokens):
            raise DataError(f"{path}: {key} must be an id below {len(tokens):,}; got {value!r}")
        return tokens[value] if tokenizer.token_id(tokens[value]) is not None else None

    begins = metadata.get("tokenizer.ggml.add_bos_token")
    if begins is None:
        scored_too = metadata.get("tokenizer.ggml.model") == "llama"
        begins = scored_too or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    template = metadata.get("tokenizer.chat_template")
    if type(begins) is not bool or not isinstance(template, str | None):
        raise DataError(
            f"{path}: tokenizer.ggml.add_bos_token must be true or false and "
            f"tokenizer.chat_template a text; got {begins!r:.40} and {shown(template)}"
        )
    begin, end = name_of("bos"), name_of("eos")
    begin_id = None if begin is None else tokenizer.token_id(begin)
    usual = tokenizer.end_of_text_id
    ends = [name for name in (end, name_of("eot"), name_of("eom")) if name is not None]
    ids = [token for name in ends if (token := tokenizer.token_id(name)) is not None]
    return TokenRoles(
        begin_ids=(begin_id,) if begins and begin_id is not None else (),
        end_ids=tuple(dict.fromkeys([usual, *ids])),
        begin_token=begin,
        end_token=end or tokenizer.token_name(usual),
        pad_token=name_of("padding"),
        chat_template=template or None,
    )
