"""The settings of a server: those of the run, with flags over them."""

from collections.abc import Sequence
from pathlib import Path

from lascaux.checkpoint.manifest import read_manifest
from lascaux.config.check import check
from lascaux.config.load import build_config, from_tables, overlay, read_flags, to_settings
from lascaux.config.serve_schema import ServeConfig
from lascaux.errors import ConfigError
from lascaux.generate.load import find_checkpoint

HIGHEST_PORT = 65535
HEARD = ("generate.weights", "generate.draft_tokens", "generate.threads")
"""of [generate]; the rest is for each request to say"""


def split_flags(flags: Sequence[str], port: int | None) -> tuple[list[str], list[str]]:
    """`--serve.…`, with the short `--port` among them, and `--generate.…`.

    Raises: ConfigError for a setting without effect here.
    """
    if port is not None:
        flags = [*flags, f"--serve.port={port}"]
    serve: list[str] = []
    generate: list[str] = []
    for flag, key in zip(flags, read_flags(flags), strict=True):
        if key.startswith("serve."):
            serve.append(flag)
        elif key in HEARD:
            generate.append(flag)
        else:
            heard = ", ".join(f"--{name}" for name in HEARD)
            hint = "; each request says how to draw" if key.startswith("generate.") else ""
            raise ConfigError(
                f"--{key} has no effect on serving{hint}; settings here: --serve.…, {heard}"
            )
    return serve, generate


def serve_settings(source: Path, flags: Sequence[str]) -> ServeConfig:
    """The run's [serve] section with flags over it.

    Raises: CheckpointError for a folder without a checkpoint; ConfigError for a bad setting.
    """
    checkpoint = find_checkpoint(source)
    saved = read_manifest(checkpoint).state["config"]
    run = from_tables(saved, f"{checkpoint}/manifest.json")
    config = build_config(overlay(to_settings(run), read_flags(flags)))
    check(config)
    settings = config.serve
    if settings.port > HIGHEST_PORT:
        raise ConfigError(f"'serve.port' must be 0 to {HIGHEST_PORT}; got {settings.port}")
    if settings.model_name == "":
        raise ConfigError("'serve.model_name' is empty; leave it out to use the folder's name")
    for origin in settings.allowed_origins:
        if not origin.startswith(("http://", "https://")) or origin.rstrip("/") != origin:
            raise ConfigError(
                f"'serve.allowed_origins' must be like https://example.org, without a path; got "
                f"'{origin}'"
            )
    return settings
