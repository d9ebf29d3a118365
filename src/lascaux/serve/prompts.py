"""Prompts in all the forms OpenAI knows: a text, ids, a list of texts, a list of lists of ids."""

from dataclasses import dataclass
from typing import Any, Literal, cast

from lascaux.serve.fields import Body, check_ids, row_of
from lascaux.serve.limits import range_words
from lascaux.serve.refusals import Refusal, shown
from lascaux.serve.served import Served


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and where in the request they came from."""

    place: str
    ids: tuple[int, ...]


def read_prompts(
    body: Body,
    name: Literal["prompt", "input"],
    served: Served,
    *,
    begin: bool,
    any_length: bool = False,
) -> list[Prompt]:
    """The prompts of a body. Raises: Refusal (400) naming the one that is wrong.

    The names of special tokens in a text are ordinary text; ids say what they say. With `begin`, a
    text begins as the model's texts do.
    """
    row = row_of("completions" if name == "prompt" else "embeddings", name)
    if name not in body:
        raise Refusal(f"'{name}' is missing", field=name)
    value = body[name]
    if value is None and name == "prompt":
        return [Prompt(name, served.roles.begin_ids or (served.tokenizer.end_of_text_id,))]
    if isinstance(value, str):
        return [_from_text(value, name, served, begin, any_length)]
    if not isinstance(value, list) or not value:
        raise _no_prompt(name, value)
    entries = cast(list[Any], value)
    if isinstance(entries[0], int) or isinstance(entries[0], float):
        return [Prompt(name, check_ids(entries, name, served.tokenizer.vocab_size))]
    if row.highest is not None and len(entries) > row.highest:
        raise Refusal(
            f"'{name}' must have {range_words(row)}; got {len(entries):,}; send them in several "
            "requests",
            field=name,
        )
    kind = str if isinstance(entries[0], str) else list
    prompts: list[Prompt] = []
    for number, entry in enumerate(entries):
        place = f"{name}[{number}]"
        if not isinstance(entry, kind) or not entry:
            raise _no_prompt(place, entry)
        if isinstance(entry, str):
            prompts.append(_from_text(entry, place, served, begin, any_length))
        else:
            prompts.append(Prompt(place, check_ids(entry, place, served.tokenizer.vocab_size)))
    return prompts


def _no_prompt(place: str, value: object) -> Refusal:
    if value in ("", []):
        message = f"'{place}' is empty; give at least one token"
        if place == "prompt":
            message += ", or null for the beginning of a text"
    else:
        message = (
            f"'{place}' must be a text, a list of token ids, or all texts or all lists of ids in a "
            f"list; got {shown(value)}"
        )
    return Refusal(message, field=place.split("[")[0])


def _from_text(text: str, place: str, served: Served, begin: bool, any_length: bool) -> Prompt:
    if not text:
        raise _no_prompt(place, text)
    if not any_length:
        check_size(text, place, served)
    begin_ids = served.roles.begin_ids if begin else ()
    return Prompt(place, (*begin_ids, *served.tokenizer.encode(text)))


def check_size(text: str, place: str, served: Served) -> None:
    """Raise Refusal (400) for a text that cannot fit, before time goes into encoding it."""
    longest = served.max_context * served.longest_token_bytes
    if len(text) > longest:
        raise _too_long(place, f"{len(text):,} characters, more than {longest:,}", served, 0)


def check_length(prompt: Prompt, served: Served, *, draws: bool) -> None:
    """Raise Refusal (400, context_length_exceeded) for a prompt that leaves no room."""
    most = served.max_context - draws
    if len(prompt.ids) > most:
        raise _too_long(prompt.place, f"{len(prompt.ids):,} tokens", served, draws)


def _too_long(place: str, size: str, served: Served, draws: bool | int) -> Refusal:
    most = served.max_context - draws
    return Refusal(
        f"'{place}' has {size}; the model's context is {served.max_context:,} tokens, so that at "
        f"most {most:,} {'leave room for an answer' if draws else 'can be read'}; shorten it",
        field=place.split("[")[0],
        code="context_length_exceeded",
    )
