"""What a Hugging Face folder says of its tokens, in four files, as roles; and roles as such files.

The tokenizer's own rule for what comes before a text counts, as in transformers; the flag
add_bos_token of old folders counts where it is set.
"""

from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import processors

from lascaux.checkpoint.files import shown
from lascaux.data.roles import FURTHER_ENDS, TokenRoles, make_roles, read_object
from lascaux.data.tokenizer import Tokenizer
from lascaux.errors import DataError
from lascaux.exchange.settings import Settings

CONFIG, LEGACY_NAMES = "tokenizer_config.json", "special_tokens_map.json"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"


def read_token_files(
    folder: Path, tokenizer: Tokenizer, settings: Settings
) -> tuple[Tokenizer, TokenRoles, list[str]]:
    """The tokenizer, perhaps with a token before each text, its roles, and what was left out.

    `settings` are those of config.json. Raises: DataError for a file that is malformed.
    """
    config = _read(folder / CONFIG)
    content = {key: config.get(key) for key in ("add_bos_token", "chat_template")}
    names = _read(folder / LEGACY_NAMES)
    ignored: list[str] = []
    for key in ("bos_token", "eos_token", "pad_token"):
        value = config.get(key) or names.get(key)
        name = cast(dict[str, Any], value).get("content") if isinstance(value, dict) else value
        if isinstance(name, str) and name and tokenizer.token_id(name) is None:
            ignored.append(f"{key} {shown(name)}, which the tokenizer has not")
        else:
            content[key] = name
    ends, beyond = end_names(_read(folder / GENERATION), settings, tokenizer)
    content[FURTHER_ENDS] = ends
    if (template := folder / TEMPLATE).exists():
        content["chat_template"] = read_text(template)
    elif isinstance(content["chat_template"], list) and len(content["chat_template"]) > 1:
        ignored.append("chat templates other than 'default'")
    begin = begin_of(tokenizer)
    if begin is not None:
        content |= {"bos_token": begin, "add_bos_token": True}
    elif content.get("bos_token") is None:
        content["add_bos_token"] = False
    roles = make_roles(content, tokenizer, folder / CONFIG)
    if begin is None and roles.begin_ids:
        tokenizer = with_begin(tokenizer, cast(str, roles.begin_token), roles.begin_ids[0])
    return tokenizer, roles, ignored + beyond


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def read_text(path: Path) -> str:
    """A template. Raises: DataError."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 at byte {error.start}") from None


def end_names(
    generation: dict[str, Any], settings: Settings, tokenizer: Tokenizer
) -> tuple[list[str], list[str]]:
    """Names of the tokens that end a text, and a line for each id that is none."""
    given = generation.get("eos_token_id", settings.find("eos_token_id")[1])
    ids = cast(list[Any], given) if isinstance(given, list) else [given]
    found: list[str] = []
    ignored: list[str] = []
    for token_id in ids:
        known = type(token_id) is int and 0 <= token_id < tokenizer.vocab_size
        if known and not tokenizer.token_bytes(token_id):
            found.append(tokenizer.token_name(token_id))
        elif token_id is not None:
            ignored.append(f"eos_token_id {shown(token_id)}, which is no special token's")
    return found, ignored


def begin_of(tokenizer: Tokenizer) -> str | None:
    """The token that the tokenizer itself puts before a text, or None.

    Raises: DataError for several.
    """
    inner = tokenizers.Tokenizer.from_str(tokenizer.json)
    try:
        marked = inner.encode("x", add_special_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{tokenizer.origin} cannot encode a text: {error}") from None
    count = marked.special_tokens_mask.index(0) if 0 in marked.special_tokens_mask else 0
    if count > 1:
        raise DataError(
            f"{tokenizer.origin} puts {count} tokens before each text, {marked.tokens[:count]}; "
            "Lascaux puts one there at most"
        )
    return marked.tokens[0] if count else None


def with_begin(tokenizer: Tokenizer, name: str, token_id: int) -> Tokenizer:
    """The same tokenizer with a rule that puts a token before each text, for other programs."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.json)
    inner.post_processor = processors.TemplateProcessing(
        single=[name, "$A"], pair=[name, "$A", name, "$B:1"], special_tokens=[(name, token_id)]
    )
    return Tokenizer(inner, tokenizer.origin)


def token_ids(roles: TokenRoles, tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json and generation_config.json say of the tokens."""
    begin = roles.begin_token or roles.end_token
    end = tokenizer.token_id(roles.end_token)
    ends = list(dict.fromkeys([end, *roles.end_ids]))
    pad = None if roles.pad_token is None else tokenizer.token_id(roles.pad_token)
    return {
        "bos_token_id": tokenizer.token_id(begin),
        "eos_token_id": ends if len(ends) > 1 else end,
        "pad_token_id": pad,
    }


def token_settings(roles: TokenRoles, max_context: int) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": roles.begin_token,
        "eos_token": roles.end_token,
        "pad_token": roles.pad_token,
        "add_bos_token": bool(roles.begin_ids),
        "chat_template": roles.chat_template,
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
    }
    return {key: value for key, value in content.items() if value is not None}
