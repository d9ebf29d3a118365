"""A model's own template for conversations: Jinja from whoever made it, in a sandbox.

Templates are written for Hugging Face's renderer, so the names and switches here are its own. What
is bounded: attributes and calls (jinja2's sandbox, nothing can be changed), the time, looked at
before every line of the template; the length of every text that is put together by an operator, a
call, a block or the end; numbers in calls. What is not: the memory of one built-in step between two
looks, for example of replacing a letter by a long text. Nothing a user writes is ever a template.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from lascaux.serve.refusals import Refusal

LONGEST_CHARS = 32 << 20
LARGEST_NUMBER = 100_000
SECONDS = 2.0
UNBOUNDED_FILTERS = ("center", "format", "batch", "slice", "wordwrap", "random", "urlize", "pprint")


class _TooMuch(Exception):
    """A template took too long or made too much; not one that templates could catch."""


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**"):
            for one, other in ((left, right), (right, left)):
                size = len(one) if isinstance(one, str | list | tuple) else 1
                if isinstance(other, int) and abs(other) * size > LARGEST_NUMBER:
                    raise SecurityError(f"the operator {operator} makes too much")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("texts are not formatted by %")
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
                raise SecurityError(f"a call with the number {value}")
        if getattr(obj, "__name__", None) in ("format", "format_map"):
            raise SecurityError("texts are not formatted by calls")
        return _bounded(super().call(context, obj, *args, **kwargs))


class _JoinByPlus(NodeTransformer):
    """`a ~ b` as `a|string + b|string`, which the sandbox sees."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        texts = [self._as_text(self.visit(each), node.lineno) for each in node.nodes]
        joined = texts[0]
        for text in texts[1:]:
            joined = nodes.Add(joined, text, lineno=node.lineno)
        return joined

    @staticmethod
    def _as_text(value: nodes.Expr, line: int) -> nodes.Expr:
        return nodes.Filter(value, "string", [], [], None, None, lineno=line)


class _Generation(Extension):
    """`{% generation %}` marks what a model wrote, for training; here it is what it encloses."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Template:
    """A compiled template. Raises: Refusal (400) for one that is not Jinja, when it is made."""

    def __init__(self, source: str) -> None:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.concat = _concat  # type: ignore[assignment]
        environment.filters["tojson"] = _to_json
        for name in UNBOUNDED_FILTERS:
            del environment.filters[name]
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(_JoinByPlus().visit(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise _failed(error) from None

    def render(
        self, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], now: datetime
    ) -> str:
        """The conversation up to where the model goes on; `names` has bos_token and its like.

        Raises: Refusal (400) with the template's own message, or where it takes too long.
        """
        values = {
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "strftime_now": now.strftime,
            **names,
        }
        try:
            return _within(SECONDS, lambda: self._template.render(values))
        except (jinja2.TemplateError, _TooMuch) as error:
            raise _failed(error) from None
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise _failed(error) from None
        except (MemoryError, RecursionError) as error:
            raise _failed(_TooMuch(type(error).__name__)) from None


def _failed(error: Exception) -> Refusal:
    return Refusal(
        f"the model's chat template refuses or fails: {str(error)[:300]}",
        field="messages",
        code="chat_template_failed",
    )


def _within(seconds: float, work: Callable[[], str]) -> str:
    """Do the work in this thread; lines of Python that begin too late raise _TooMuch."""
    ends_at = time.monotonic() + seconds

    def look(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > ends_at:
            raise _TooMuch(f"it takes longer than {seconds:g} seconds")
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        return work()
    finally:
        sys.settrace(before)


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > LONGEST_CHARS:
        raise SecurityError(f"it makes a text longer than {LONGEST_CHARS:,} characters")
    return value


def _concat(parts: Iterable[str]) -> str:
    """Joined texts, counted before they are joined."""
    texts = list(parts)
    if sum(map(len, texts)) > LONGEST_CHARS:
        raise SecurityError(f"it makes a text longer than {LONGEST_CHARS:,} characters")
    return "".join(texts)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=min(indent or 0, 16) or None)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
