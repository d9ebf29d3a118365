"""From the bytes of a body to checked fields: nothing is repaired, everything has a range.

Null stands for a field's default, as in OpenAI's interface. Unknown fields are ignored; fields that
are known elsewhere and would change the answer are refused by name.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lascaux.serve.limits import Route, Row, range_words, rows_of
from lascaux.serve.refusals import Refusal, shown

Body: TypeAlias = dict[str, Any]
Fields: TypeAlias = dict[str, Any]

UNSUPPORTED = (
    "suffix prompt_logprobs use_beam_search length_penalty bad_words allowed_token_ids "
    "logits_processors guided_json guided_regex guided_choice guided_grammar structured_outputs "
    "grammar json_schema response_format tools tool_choice functions function_call modalities "
    "audio prediction web_search_options chat_template chat_template_kwargs documents "
    "continue_final_message dimensions prompt_embeds cache_salt mirostat dry_multiplier "
    "xtc_probability dynatemp_range"
).split()
"""fields that other servers know and that would change the answer"""
WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
}
_TYPES: Mapping[str, tuple[type, ...]] = {
    "whole number": (int,),
    "number": (int, float),
    "true or false": (bool,),
    "text": (str,),
    "list": (list,),
    "object": (dict,),
    "texts": (str, list),
}


def parse_body(raw: bytes, deepest: int, most_lists: int) -> Body:
    """The JSON object of a body. Raises: Refusal (400) for anything else, with its place."""
    try:
        body = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refusal(f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise Refusal(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise _too_deep(deepest) from None
    except ValueError:  # the library's own limit of digits
        raise Refusal("the body has a number with more than 4,300 digits") from None
    if not isinstance(body, dict):
        raise Refusal(f"the body must be a JSON object; got {shown(body)}")
    _check_nesting(body, deepest, most_lists)
    return body


def _too_deep(deepest: int) -> Refusal:
    return Refusal(f"the body nests lists and objects deeper than {deepest}")


def _check_nesting(body: Body, deepest: int, most_lists: int) -> None:
    """Level by level: depth, number, and texts with halves of characters, which are no text."""
    level: list[tuple[str, Any]] = list(body.items())
    lists = 1
    for _ in range(deepest):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            if isinstance(value, str):
                _check_text(name, value)
                continue
            if not isinstance(value, list | dict):
                continue
            lists += 1
            if lists > most_lists:
                raise Refusal(
                    f"the body has more than {most_lists:,} lists and objects", field=name
                )
            inside = value if isinstance(value, list) else value.values()
            below += [(name, each) for each in inside if isinstance(each, str | list | dict)]
        if not below:
            return
        level = below
    raise _too_deep(deepest)


def _check_text(name: str, text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(
            f"'{name}' is not valid text: character {error.start} is half of a surrogate pair "
            f"({shown(text[error.start])}); send whole characters",
            field=name,
        ) from None


def read_fields(body: Body, route: Route) -> Fields:
    """The fields of a route, checked, with defaults where they are absent or null.

    Raises: Refusal (400) naming the field, what it was and what is allowed.
    """
    refuse_unsupported(body)
    values: Fields = {}
    for row in rows_of(route):
        if "[]" in row.field or "." in row.field or row.field in ("prompt", "input"):
            continue  # checked with what they belong to
        value = body.get(row.field)
        values[row.field] = row.default if value is None else check_value(value, row)
    return values


def refuse_unsupported(body: Body) -> None:
    """Raise Refusal for a field with an effect we do not offer, rather than ignore it."""
    for name in UNSUPPORTED:
        value = body.get(name)
        if value is None or value in ("", [], {}) or value in WITHOUT_EFFECT.get(name, ()):
            continue
        raise Refusal(
            f"'{name}' is not supported here and would change the answer; got {shown(value)}; "
            "leave it out",
            field=name,
            code="unsupported_parameter",
        )


def row_of(route: Route, name: str) -> Row:
    """The row of a field of a route."""
    return next(row for row in rows_of(route) if row.field == name)


def check_value(value: Any, row: Row, name: str | None = None) -> Any:
    """`value` where it has the row's type and range. Raises: Refusal (400)."""
    fits = isinstance(value, _TYPES[row.kind])
    if isinstance(value, bool) and row.kind != "true or false":
        fits = False
    if fits and row.lowest is not None and row.highest is not None:
        size = value if isinstance(value, int | float) else len(value)
        if row.kind == "texts" and isinstance(value, str) and row.field == "stop":
            size = 1
        fits = row.lowest <= size <= row.highest
    if not fits:
        raise mismatch(name or row.field, value, row)
    return value


def mismatch(name: str, value: Any, row: Row) -> Refusal:
    """The refusal of a value of the wrong type or out of range."""
    kind = {"texts": "text or a list of texts"}.get(row.kind, row.kind)
    words = range_words(row)
    wanted = f"{kind} ({words})" if words and "number" not in kind else f"{kind} {words}".strip()
    article = "" if kind.startswith(("text", "true")) else "an " if kind == "object" else "a "
    got = shown(value)
    if isinstance(value, str | list | dict) and isinstance(value, _TYPES[row.kind]):
        got = f"{len(value):,}{' characters' if isinstance(value, str) else ' entries'}"
    return Refusal(f"'{name}' must be {article}{wanted}; got {got}", field=_outermost(name))


def _outermost(name: str) -> str:
    """The field of the body that a place like `stop[3]` belongs to."""
    return name.partition("[")[0].partition(".")[0]


def check_ids(value: Sequence[Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """Token ids within the vocabulary. Raises: Refusal (400) naming the first that is not."""
    for place, each in enumerate(value):
        if type(each) is not int or not 0 <= each < vocab_size:
            raise Refusal(
                f"'{name}' must have token ids, whole numbers 0 to {vocab_size - 1:,}; got "
                f"{shown(each)} at {place}",
                field=_outermost(name),
            )
    return tuple(value)


def read_bias(value: Body, route: Route, vocab_size: int) -> dict[int, float]:
    """`logit_bias`: ids as text, finite numbers. Raises: Refusal (400)."""
    row = row_of(route, "logit_bias[]")
    bias: dict[int, float] = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdigit()) or len(key) > 9 or int(key) >= vocab_size:
            raise Refusal(
                f"'logit_bias' must have token ids 0 to {vocab_size - 1:,} as keys; got "
                f"{shown(key)}",
                field="logit_bias",
            )
        bias[int(key)] = float(check_value(number, row, f"logit_bias[{key}]"))
    return bias


def read_stops(value: Any, route: Route) -> tuple[str, ...]:
    """`stop`: a text or several. Raises: Refusal (400)."""
    row = row_of(route, "stop[]")
    stops = [value] if isinstance(value, str) else value or []
    return tuple(check_value(stop, row, f"stop[{place}]") for place, stop in enumerate(stops))


def finite(number: float) -> float:
    """JSON has no infinity: what is not finite becomes -9999."""
    return number if math.isfinite(number) else -9999.0
