"""What a run says of its tokens, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from lascaux.data.roles import ROLES_FILE, TokenRoles, encode_roles, read_roles
from lascaux.data.tokenizer import Tokenizer, train_tokenizer
from lascaux.errors import DataError

NAMES = ["<|im_start|>", "<|im_end|>", "<s>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    plain = train_tokenizer(iter(["user assistant hello there\n" * 20]), 300)
    inner = tokenizers.Tokenizer.from_str(plain.json)
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES])
    return Tokenizer(inner)


def ids(tokenizer: Tokenizer, *names: str) -> tuple[int, ...]:
    found = [tokenizer.token_id(name) for name in names]
    assert None not in found
    return tuple(token for token in found if token is not None)


def write(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / ROLES_FILE).write_text(text)
    return folder


def test_a_run_without_the_file_begins_with_nothing_and_ends_with_the_end_of_text(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    end = tokenizer.end_of_text_id
    wanted = TokenRoles(end_ids=(end,), end_token="<|endoftext|>")
    assert read_roles(tmp_path, tokenizer) == wanted


def test_what_hugging_face_writes_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "yes"},
        ],
    }
    roles = read_roles(write(tmp_path, content), tokenizer)
    assert roles == TokenRoles(
        begin_ids=ids(tokenizer, "<s>"),
        end_ids=ids(tokenizer, "<|endoftext|>", "<|im_end|>"),
        begin_token="<s>",
        end_token="<|im_end|>",
        chat_template="yes",
    )


def test_written_roles_are_read_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for roles in (
        TokenRoles(end_ids=ids(tokenizer, "<|endoftext|>"), end_token="<|endoftext|>"),
        TokenRoles(
            begin_ids=ids(tokenizer, "<s>"),
            end_ids=ids(tokenizer, "<|endoftext|>", "<|im_end|>", "<s>"),
            begin_token="<s>",
            end_token="<|im_end|>",
            pad_token="<|im_start|>",
            chat_template="{% for m in messages %}ü{% endfor %}",
        ),
    ):
        (tmp_path / ROLES_FILE).write_bytes(encode_roles(roles, tokenizer))
        assert read_roles(tmp_path, tokenizer) == roles


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is not valid JSON"),
    "a nest": ("[" * 100_000, "is not valid JSON"),
    "no object": ("[]", "expected a JSON object, found list"),
    "a number": ({"bos_token": 3}, "'bos_token' must be the name of a token; got 3"),
    "an empty name": ({"eos_token": ""}, "'eos_token' must be the name of a token; got ''"),
    "an unknown name": ({"eos_token": "<what>"}, "names the token '<what>', which"),
    "an unknown pad": ({"pad_token": "<what>"}, "names the token '<what>', which"),
    "an unknown end": ({"further_eos_tokens": ["<what>"]}, "names the token '<what>', which"),
    "ends that are no list": ({"further_eos_tokens": "x"}, "must be a list of names of tokens"),
    "a begin without a name": ({"add_bos_token": True}, "as add_bos_token is true; got None"),
    "a begin that is a word": ({"add_bos_token": "yes"}, "must be true or false; got 'yes'"),
    "a template that is a number": ({"chat_template": 5}, "'chat_template' must be a text"),
    "no default template": ({"chat_template": [{"name": "x"}]}, "one named 'default'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_refused(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    content, words = BAD[name]
    with pytest.raises(DataError) as caught:
        read_roles(write(tmp_path, content), tokenizer)
    message = str(caught.value)
    assert words in message and ROLES_FILE in message and "\n" not in message
    assert len(message) < 400


def test_a_folder_of_that_name_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / ROLES_FILE).mkdir()
    with pytest.raises(DataError, match="must be a file"):
        read_roles(tmp_path, tokenizer)


def test_names_of_special_tokens_are_marks_only_where_they_are_asked_for(
    tokenizer: Tokenizer,
) -> None:
    text = "<|im_start|>user\nhello<|im_end|>\n"
    start, end = ids(tokenizer, "<|im_start|>", "<|im_end|>")
    marked = tokenizer.encode_marked(text)
    middle, rest = tokenizer.encode("user\nhello"), tokenizer.encode("\n")
    assert marked == [start, *middle, end, *rest]
    plain = tokenizer.encode(text)
    assert start not in plain and end not in plain and tokenizer.decode(plain) == text
    assert tokenizer.encode_marked(text) == marked, "one does not change the other"


def test_every_token_has_a_name(tokenizer: Tokenizer) -> None:
    (end,) = ids(tokenizer, "<|im_end|>")
    assert tokenizer.token_name(end) == "<|im_end|>"
    assert [tokenizer.token_name(i) for i in tokenizer.encode(" hello")][0].startswith(" h")
    assert [tokenizer.token_name(i) for i in tokenizer.encode("€")] == [
        "<0xE2>",
        "<0x82>",
        "<0xAC>",
    ]
    assert tokenizer.token_name(99_999) == "<id 99999>" and tokenizer.token_name(-1) == "<id -1>"
