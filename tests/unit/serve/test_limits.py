"""Every row of the table: what is within is accepted, what is not is named and refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lascaux.serve.fields import parse_body, read_bias, read_fields, read_stops
from lascaux.serve.limits import TABLE, Row, ServerLimits, range_words
from lascaux.serve.refusals import Refusal

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
ROWS = [pytest.param(row, id=f"{row.routes[0]}-{row.field}") for row in TABLE]
NUMBERS = [p for p in ROWS if p.values[0].kind in ("number", "whole number")]  # type: ignore[union-attr]
PLAIN = [p for p in ROWS if not set("[.") & set(p.values[0].field)]  # type: ignore[union-attr]


def read(row: Row, value: Any) -> Any:
    """What the value becomes as the only field of a body."""
    if row.field == "logit_bias[]":
        return read_bias({"3": value}, row.routes[0], 100)[3]
    if row.field == "stop[]":
        return read_stops([value], row.routes[0])[0]
    return read_fields({row.field: value}, row.routes[0])[row.field]


def refused(row: Row, value: Any) -> str:
    with pytest.raises(Refusal) as caught:
        read(row, value)
    assert caught.value.status == 400
    assert caught.value.field == row.field.removesuffix("[]")
    return str(caught.value)


@pytest.mark.parametrize("row", NUMBERS)
def test_both_bounds_of_a_number_are_accepted_and_beyond_them_it_is_refused(row: Row) -> None:
    assert row.lowest is not None and row.highest is not None
    assert read(row, row.lowest) == row.lowest
    assert read(row, row.highest) == row.highest
    whole = row.kind == "whole number"
    below = row.lowest - 1 if whole else math.nextafter(row.lowest, -math.inf)
    above = row.highest + 1 if whole else math.nextafter(row.highest, math.inf)
    for value in (below, above):
        message = refused(row, value)
        assert range_words(row) in message and str(value) in message, message


@pytest.mark.parametrize("row", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "1", [1], {}])
def test_a_number_is_a_finite_number(row: Row, value: Any) -> None:
    message = refused(row, value)
    assert f"'{row.field[:4]}" in message and "got" in message


@pytest.mark.parametrize("row", [p for p in NUMBERS if p.values[0].kind == "whole number"])  # type: ignore[union-attr]
def test_a_whole_number_has_no_fraction(row: Row) -> None:
    assert "got 1.5" in refused(row, 1.5)


@pytest.mark.parametrize("row", PLAIN)
def test_null_and_absence_give_the_default(row: Row) -> None:
    if row.field in ("prompt", "input"):
        return  # what null means there is tested with prompts
    assert read(row, None) == row.default
    assert read_fields({}, row.routes[0])[row.field] == row.default


@pytest.mark.parametrize("row", [p for p in PLAIN if p.values[0].kind == "true or false"])  # type: ignore[union-attr]
@pytest.mark.parametrize("value", [0, 1, "true", [], math.nan])
def test_a_switch_is_true_or_false(row: Row, value: Any) -> None:
    assert read(row, True) is True and read(row, False) is False
    assert "true or false" in refused(row, value)


@pytest.mark.parametrize("row", [p for p in ROWS if p.values[0].kind == "text"])  # type: ignore[union-attr]
def test_a_text_has_its_length(row: Row) -> None:
    if row.field.startswith(("messages", "prompt")):
        return  # tested with conversations and with /tokenize
    assert row.lowest is not None and row.highest is not None
    assert read(row, "x" * int(row.highest)) == "x" * int(row.highest)
    assert range_words(row) in refused(row, "x" * (int(row.highest) + 1))
    if row.lowest:
        assert range_words(row) in refused(row, "x" * (int(row.lowest) - 1))
    refused(row, 7)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("stop", ["x"] * 32),
        ("stop_token_ids", [1] * 256),
        ("logit_bias", {str(i): 1 for i in range(1024)}),
    ],
)
def test_lists_have_their_number_of_entries(name: str, entries: Any) -> None:
    row = next(row for row in TABLE if row.field == name)
    assert len(read(row, entries)) == row.highest
    more = entries | {"5000": 1} if isinstance(entries, dict) else [*entries, entries[0]]
    assert range_words(row) in refused(row, more)


@pytest.mark.parametrize("key", ["-1", "100", "1.0", "x", "", "²", "1" * 40])
def test_the_keys_of_logit_bias_are_ids_of_the_vocabulary(key: str) -> None:
    with pytest.raises(Refusal, match="'logit_bias' must have token ids 0 to 99"):
        read_bias({key: 1}, "completions", 100)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"a": 1} x', "not JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "deeper than 32"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "deeper than 32"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "deeper than 32"),
        (b'{"a": [' + b"{}," * 999 + b"{}]}", "more than 1,000 lists"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": ["x", "\\ud800"]}', "'a' is not valid text: character 0"),
        (b'{"a": {"b": "ab\\udfff"}}', "'a' is not valid text: character 2"),
    ],
)
def test_a_body_that_is_no_plain_json_object_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        parse_body(raw, 32, 1000)
    assert caught.value.status == 400


def test_nesting_up_to_the_limit_is_read() -> None:
    assert parse_body(b'{"a": ' + b"[" * 31 + b"]" * 31 + b"}", 32, 33)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "x"),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("guided_regex", "a+"),
        ("use_beam_search", True),
        ("dimensions", 8),
        ("prompt_logprobs", 1),
    ],
)
def test_fields_known_elsewhere_are_refused_by_name_where_they_have_an_effect(
    name: str, value: Any
) -> None:
    with pytest.raises(Refusal, match=f"'{name}' is not supported") as caught:
        read_fields({name: value}, "completions")
    assert (caught.value.status, caught.value.field) == (400, name)
    read_fields({name: None}, "completions")


def test_unknown_fields_and_fields_without_effect_are_ignored() -> None:
    body = {"user": "u", "whatever": {"a": [1]}, "response_format": {"type": "text"}, "tools": []}
    assert read_fields(body, "chat") == read_fields({}, "chat")


def fields_table() -> str:
    """The table of fields as docs/serving.md has it."""
    lines = ["| field | where | type and range | default | |", "|---|---|---|---|---|"]
    for row in TABLE:
        kind = {"texts": "text or list of texts"}.get(row.kind, row.kind)
        words = range_words(row)
        default = "" if row.default is None else f"{json.dumps(row.default)}"
        where = ", ".join(row.routes)
        limits = f"{kind}, {words}" if words else kind
        lines.append(f"| `{row.field}` | {where} | {limits} | {default} | {row.words} |")
    return "\n".join(lines)


def server_table() -> str:
    """The table of the server's own limits as docs/serving.md has it."""
    lines = ["| limit | value | |", "|---|---|---|"]
    for leaf in dataclasses.fields(ServerLimits):
        lines.append(f"| `{leaf.name}` | {leaf.default:,} | {leaf.metadata['words']} |")
    return "\n".join(lines)


@pytest.mark.parametrize("table", [fields_table(), server_table()], ids=["fields", "server"])
def test_the_page_has_the_table(table: str) -> None:
    assert table in PAGE.read_text(), f"docs/serving.md needs this table:\n{table}"
