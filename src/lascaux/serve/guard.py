"""Before any route: who calls, from where, and whether the server takes requests.

Public are /health and the playground's files, which say nothing of the model.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lascaux.serve.keys import is_own_address
from lascaux.serve.refusals import Refusal
from lascaux.serve.respond import refusal_response
from lascaux.serve.state import ServerState

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
EVERYWHERE = {
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": PAGE_POLICY,
}


def is_public(path: str) -> bool:
    """Whether a path is answered without a key."""
    return path in ("/", "/health", "/favicon.ico") or path.startswith("/playground/")


class Guard:
    """Refuses strangers, counts who is being answered, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in EVERYWHERE.items():
                    headers.setdefault(name, value)
                if message["status"] >= 400:
                    self._state.metrics.failed(message["status"])
            await send(message)

        self._state.running += 1
        try:
            self._check(scope)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._state.running -= 1

    def _check(self, scope: Scope) -> None:
        """Raise Refusal for whom the server does not answer."""
        headers, settings = Headers(scope=scope), self._state.settings
        host = headers.get("host")
        open_to_all = is_own_address(settings.host) and not self._state.keys
        if open_to_all and host is not None and not is_own_address(_host_name(host)):
            raise Refusal(
                f"this server answers to this machine's own names only, not to {host[:100]!r}; "
                "call it as 127.0.0.1 or localhost",
                status=403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        own_page = origin is not None and origin.partition("://")[2] == host
        if origin is not None and not own_page and origin not in settings.allowed_origins:
            raise Refusal(
                f"pages of {origin[:100]!r} may not call this server; "
                "--serve.allowed_origins names those that may",
                status=403,
                code="origin_not_allowed",
            )
        if is_public(scope["path"]):
            return
        if not self._state.keys.accept(headers.get("authorization")):
            raise Refusal(
                "an API key is needed: Authorization: Bearer KEY"
                if headers.get("authorization") is None
                else "this API key is not known here",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[")
    return host.rpartition(":")[0] or host
