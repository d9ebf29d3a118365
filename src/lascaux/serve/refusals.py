"""What a client is told when a request is not answered: a status and OpenAI's error object."""

import json
from collections.abc import Mapping

from lascaux.errors import RequestError

SHOWN_CHARS = 60


class Refusal(RequestError):
    """A request that is not carried out, with the status and the field it failed by."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        field: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.field, self.code = message, status, field, code
        self.headers = dict(headers or {})


KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}


def error_object(refusal: Refusal) -> dict[str, object]:
    """The body that OpenAI's clients read."""
    kind = KINDS.get(refusal.status, "invalid_request_error")
    error = {"message": refusal.message, "type": kind, "param": refusal.field, "code": refusal.code}
    return {"error": error}


def shown(value: object) -> str:
    """A value of a request as JSON, cut to what fits in a message."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def encode_json(value: object) -> bytes:
    """JSON in UTF-8; halves of characters, which a client may have sent, are escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="backslashreplace")
