"""A conversation as token ids: by the model's template, or in plain text where it has none.

What users write never becomes a special token. The template is rendered a second time with every
character of their texts that special names are made of replaced by a stand-in; what then still
spells a special name was written by the template. A template that decides by what the texts say
comes out differently; then only what no name can do without is replaced, as a rule the |, and if
that differs too, the request is refused.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, cast

from lascaux.serve.fields import check_value, row_of
from lascaux.serve.prompts import Prompt, check_size
from lascaux.serve.refusals import Refusal, shown
from lascaux.serve.served import Served
from lascaux.serve.templates import Template

ROLES = ("system", "developer", "user", "assistant")
FORBIDDEN_PARTS = ("tool_calls", "tool_call_id", "function_call", "audio")
PLAIN_STOP = "\nUser:"
STAND_IN_PLANES = (0xF0000, 0x100000)
"""private characters that no text should have"""

Message = Mapping[str, str]


def write_conversation(value: Any, served: Served) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt of a conversation, and strings that end its answer. Raises: Refusal (400)."""
    messages = read_messages(value)
    for message in messages:
        check_size(message["content"], "messages", served)
    if served.roles.chat_template is None:
        ids = served.tokenizer.encode(plain_conversation(messages))
        return Prompt("messages", (*served.roles.begin_ids, *ids)), (PLAIN_STOP,)
    template = compiled(served.roles.chat_template)
    return Prompt("messages", tuple(_encode_by_template(template, messages, served))), ()


def read_messages(value: Any) -> list[Message]:
    """The messages of a request, contents as one text each. Raises: Refusal (400)."""
    if value is None:
        raise Refusal("'messages' is missing", field="messages")
    check_value(value, row_of("chat", "messages"))
    return [_read_message(each, f"messages[{place}]") for place, each in enumerate(value)]


def _read_message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise _wrong(place, "an object with role and content", value)
    message = cast(dict[str, Any], value)
    role = message.get("role")
    if role not in ROLES:
        raise _wrong(f"{place}.role", " or ".join(ROLES), role)
    for name in FORBIDDEN_PARTS:
        if message.get(name):
            raise Refusal(f"'{place}.{name}' is not supported here", field="messages")
    read = {"role": str(role), "content": _read_content(message.get("content"), place)}
    if message.get("name") is not None:
        if not isinstance(message["name"], str):
            raise _wrong(f"{place}.name", "a text", message["name"])
        read["name"] = message["name"]
    return read


def _read_content(value: Any, place: str) -> str:
    row = row_of("chat", "messages[].content")
    check_value(value, row, f"{place}.content")
    if isinstance(value, str):
        return value
    texts: list[str] = []
    for number, part in enumerate(value):
        where = f"{place}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _wrong(where, 'an object with type "text" and a text', part)
        texts.append(part["text"])
    return "\n".join(texts)


def _wrong(place: str, wanted: str, got: object) -> Refusal:
    return Refusal(f"'{place}' must be {wanted}; got {shown(got)}", field="messages")


def plain_conversation(messages: Sequence[Message]) -> str:
    """Turns after the names of their speakers, up to where the model goes on.

    User: …
    Assistant:
    """
    speakers = {"developer": "System"}
    turns = [f"{speakers.get(m['role'], m['role'].title())}: {m['content']}\n" for m in messages]
    return f"{''.join(turns)}Assistant:"


@lru_cache(maxsize=4)
def compiled(source: str) -> Template:
    """The template, compiled once."""
    return Template(source)


def _encode_by_template(
    template: Template, messages: Sequence[Message], served: Served
) -> list[int]:
    roles, tokenizer, names = served.roles, served.tokenizer, served.special_pattern
    given = {"bos_token": roles.begin_token, "eos_token": roles.end_token}
    tokens = {key: name or "" for key, name in (given | {"pad_token": roles.pad_token}).items()}
    now = datetime.now()
    written = template.render(messages, tokens, now)
    check_size(written, "messages", served)
    marked, original = _written_by_template(
        template, messages, tokens, now, written, served.special_names
    )
    if len(names.findall(marked)) == len(names.findall(written)):
        return tokenizer.encode_marked(written)
    ids: list[int] = []
    start = 0
    for found in names.finditer(marked):
        ids += tokenizer.encode(marked[start : found.start()].translate(original))
        token_id = tokenizer.token_id(found.group())
        assert token_id is not None  # the pattern is made of names the tokenizer has
        ids.append(token_id)
        start = found.end()
    return ids + tokenizer.encode(marked[start:].translate(original))


def _written_by_template(
    template: Template,
    messages: Sequence[Message],
    tokens: Mapping[str, str],
    now: datetime,
    written: str,
    names: Sequence[str],
) -> tuple[str, dict[int, int]]:
    """`written` with stand-ins in users' texts, and the table that takes them back."""
    texts = [text for message in messages for key, text in message.items() if key != "role"]
    letters = [{each for each in name if " " < each <= "\uffff"} for name in names]
    guards = [_guard(name) for name in names]
    used = {ord(character) & ~0xFFFF for text in texts for character in set(text)}
    plane = next((plane for plane in STAND_IN_PLANES if plane not in used), None)
    if plane is None:
        raise Refusal("'messages' has private characters of both planes", field="messages")
    for replaced in (letters, guards):
        stand_ins = {ord(each): ord(each) + plane for each in set[str]().union(*replaced)}
        original = {stand_in: character for character, stand_in in stand_ins.items()}
        given = [
            {k: v if k == "role" else v.translate(stand_ins) for k, v in message.items()}
            for message in messages
        ]
        marked = template.render(given, tokens, now)
        if marked.translate(original) == written:
            return marked, original
    raise Refusal(
        "the model's chat template decides by what the texts say, so that names of special tokens "
        "in them cannot be told from its own; leave signs like | out of the messages",
        field="messages",
        code="chat_template_failed",
    )


def _guard(name: str) -> set[str]:
    """Few characters without which nobody can write this name, rare ones if it has any."""
    rare = {each for each in name if each in "|\uff5c"}
    marks = {each for each in name if not each.isalnum() and " " < each <= "\uffff"} - set("<>/")
    return rare or marks or set(next((each for each in name if each.isalnum()), name))
