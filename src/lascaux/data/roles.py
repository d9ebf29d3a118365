"""What a model's tokens are for beside text: RUN/tokenizer_config.json, in Hugging Face's keys.

Absent in runs that were trained here: texts then begin and end with the end-of-text token, and
there is no template for conversations. Tokens stand there by name; `further_eos_tokens`, which is
our own key, has those that end a text beside `eos_token`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lascaux.data.tokenizer import Tokenizer
from lascaux.errors import DataError

ROLES_FILE = "tokenizer_config.json"
FURTHER_ENDS = "further_eos_tokens"
LARGEST_FILE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRoles:
    """Which ids begin and end a text, and how a conversation is written."""

    begin_ids: tuple[int, ...] = ()
    """put before the ids of a text that is to be continued"""
    end_ids: tuple[int, ...]
    """each ends a text; the first one is `Tokenizer.end_of_text_id`"""
    begin_token: str | None = None
    end_token: str
    """what ends a turn where a template is used, else the end of text"""
    pad_token: str | None = None
    chat_template: str | None = None
    """Jinja, from whoever made the model: render in a sandbox only"""


def read_roles(run: Path, tokenizer: Tokenizer) -> TokenRoles:
    """The roles of a run's tokens. Raises: DataError for a file that is malformed."""
    path = run / ROLES_FILE
    if not path.exists() and not path.is_symlink():
        return make_roles({}, tokenizer, path)
    return make_roles(read_object(path), tokenizer, path)


def make_roles(content: dict[str, Any], tokenizer: Tokenizer, path: Path) -> TokenRoles:
    """The roles that the content of a tokenizer_config.json gives; other keys are left alone.

    Raises: DataError naming the file, the key, what was found and what is wanted.
    """
    begin, end, pad = (_name(content, f"{role}_token", path) for role in ("bos", "eos", "pad"))
    further = content.get(FURTHER_ENDS) or []
    if not isinstance(further, list) or not all(isinstance(name, str) for name in further):
        raise _wrong(path, FURTHER_ENDS, further, "a list of names of tokens")
    begins = content.get("add_bos_token") or False
    if not isinstance(begins, bool):
        raise _wrong(path, "add_bos_token", begins, "true or false")
    if begins and begin is None:
        raise _wrong(path, "bos_token", None, "the name of a token, as add_bos_token is true")
    usual = tokenizer.end_of_text_id
    ends = [_id(name, tokenizer, path) for name in (end, *further) if name is not None]
    if pad is not None:
        _id(pad, tokenizer, path)
    begin_id = None if begin is None else _id(begin, tokenizer, path)
    return TokenRoles(
        begin_ids=(begin_id,) if begins and begin_id is not None else (),
        end_ids=tuple(dict.fromkeys([usual, *ends])),
        begin_token=begin,
        end_token=end or tokenizer.token_name(usual),
        pad_token=pad,
        chat_template=_template(content, path),
    )


def encode_roles(roles: TokenRoles, tokenizer: Tokenizer) -> bytes:
    """The file that `read_roles` makes the same roles of."""
    ends = [tokenizer.token_name(token_id) for token_id in roles.end_ids]
    content = {
        "bos_token": roles.begin_token,
        "eos_token": roles.end_token,
        "pad_token": roles.pad_token,
        "add_bos_token": bool(roles.begin_ids),
        "chat_template": roles.chat_template,
        FURTHER_ENDS: [name for name in ends if name != roles.end_token] or None,
    }
    given = {key: value for key, value in content.items() if value is not None}
    return json.dumps(given, indent=2).encode("ascii") + b"\n"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: DataError naming it."""
    if path.exists() and not path.is_file():
        raise DataError(f"'{path}' must be a file, not a folder or a device")
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    if len(text) > LARGEST_FILE_BYTES:
        raise DataError(f"'{path}' has more than {LARGEST_FILE_BYTES:,} bytes")
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # half a surrogate is no text
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not valid JSON ({error}); restore it or delete it") from error
    if not isinstance(content, dict):
        raise DataError(f"'{path}': expected a JSON object, found {type(content).__name__}")
    return cast(dict[str, Any], content)


def _name(content: dict[str, Any], key: str, path: Path) -> str | None:
    """A token's name: a string, or an object that has it as "content"."""
    value = content.get(key)
    name = cast(dict[str, Any], value).get("content") if isinstance(value, dict) else value
    if value is not None and (not isinstance(name, str) or not name):
        raise _wrong(path, key, value, "the name of a token")
    return name


def _template(content: dict[str, Any], path: Path) -> str | None:
    """The template, or of several named ones that which is called default."""
    value = content.get("chat_template")
    if isinstance(value, list):
        named = [each for each in cast(list[Any], value) if isinstance(each, dict)]
        found = [each.get("template") for each in named if each.get("name") == "default"]
        value = found[0] if found else value
    if value is not None and not isinstance(value, str):
        raise _wrong(path, "chat_template", value, "a text, or a list with one named 'default'")
    return value or None


def _id(name: str, tokenizer: Tokenizer, path: Path) -> int:
    found = tokenizer.token_id(name)
    if found is None:
        raise DataError(f"'{path}' names the token {name!r:.80}, which {tokenizer.origin} has not")
    return found


def _wrong(path: Path, key: str, found: object, wanted: str) -> DataError:
    return DataError(f"'{path}': '{key}' must be {wanted}; got {found!r:.80}")
