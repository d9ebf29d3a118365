"""API keys, and who may call without one."""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from lascaux.config.serve_schema import ServeConfig
from lascaux.errors import ConfigError


class Keys:
    """The keys that are accepted, kept as hashes; without any, everybody is."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: str | None) -> bool:
        """Whether the header is `Bearer KEY`; takes as long for every wrong key."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()


def read_keys(settings: ServeConfig) -> Keys:
    """The keys of `serve.api_keys_file`.

    Raises: ConfigError for a file without keys or one that cannot be read, and where there is no
    file although others than this machine can reach the server.
    """
    if settings.api_keys_file is None:
        if not is_own_address(settings.host):
            raise ConfigError(
                f"'serve.host' {settings.host} lets other machines call the server, so it needs "
                "API keys: write one into each line of a file and give --serve.api_keys_file=FILE; "
                "or listen on 127.0.0.1"
            )
        return Keys()
    path = Path(settings.api_keys_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"'serve.api_keys_file': cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"'serve.api_keys_file': {path} is not UTF-8 text (byte {error.start})"
        ) from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"'serve.api_keys_file': {path} has no keys; write one into each line")
    return Keys(keys)


def is_own_address(host: str) -> bool:
    """Whether only programs of this machine reach this address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
