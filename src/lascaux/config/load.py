"""From a preset, a TOML file and flags to one frozen `Config`, and back to TOML.

Later layers win: defaults, preset, file, flags. File and flags use the same words:
`[train] steps = 100` is `--train.steps=100`. Every message names the key and where it was given.
Rules that tie settings together are in `config/check.py`.
"""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lascaux.config.check import check
from lascaux.config.schema import Config, SourceConfig
from lascaux.errors import ConfigError, suggest

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "tiny"
UNSET = "none"

TOMLValue: TypeAlias = Any
"""What `tomllib` yields: str, int, float, bool, list or dict."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value as the user wrote it and where."""

    value: TOMLValue
    origin: str


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_header(name: str) -> str:
    """The comment block at the top of a preset: source, parameters, hardware."""
    lines = (PRESETS / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    first_setting = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:first_setting])


def load_config(target: str | None, flags: Sequence[str] = ()) -> Config:
    """The resolved, checked config of a preset name or TOML file and `--section.key=value` flags.

    Raises: ConfigError naming key, origin, value and what is accepted.
    """
    config = build_config(overlay(read_target(target), read_flags(flags)))
    check(config)
    return config


def overlay(lower: Mapping[str, Setting], upper: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings of two layers; an alternative given above replaces the one below."""
    replaced = {
        other
        for key, other in (("train.steps", "train.tokens"), ("train.tokens", "train.steps"))
        if key in upper and other not in upper
    }
    return {key: value for key, value in lower.items() if key not in replaced} | dict(upper)


def read_target(target: str | None) -> dict[str, Setting]:
    """Settings of a preset or file; a file may start from a preset with `preset = "NAME"`."""
    if target is None:
        return read_preset(DEFAULT_PRESET)
    if target in preset_names():
        return read_preset(target)
    path = Path(target)
    if path.suffix != ".toml" and not path.exists():
        raise ConfigError(
            f"no preset or file '{target}'{suggest(target, preset_names())}\n"
            f"presets: {', '.join(preset_names())}"
        )
    return read_table(read_toml(path), target)


def read_table(table: Mapping[str, TOMLValue], origin: str) -> dict[str, Setting]:
    """Settings of a TOML table, over those of the preset it starts from if it names one."""
    base = table.get("preset")
    own = flatten({key: value for key, value in table.items() if key != "preset"}, origin)
    if base is None:
        return own
    if base not in preset_names():
        raise ConfigError(f"{origin}: unknown preset '{base}'{suggest(str(base), preset_names())}")
    return overlay(read_preset(str(base)), own)


def read_preset(name: str) -> dict[str, Setting]:
    """Settings of a preset that ships with the package."""
    return flatten(read_toml(PRESETS / f"{name}.toml"), f"preset {name}")


def read_toml(path: Path) -> dict[str, TOMLValue]:
    """A TOML file as a table."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def read_flags(flags: Sequence[str]) -> dict[str, Setting]:
    """Settings of `--section.key=value` flags; a value that is no TOML literal is a string."""
    settings: dict[str, Setting] = {}
    for flag in flags:
        key, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not equals:
            raise ConfigError(f"expected --section.key=value; got '{flag}'")
        if key in settings:
            raise ConfigError(f"--{key} is given twice")
        settings[key] = Setting(parse_literal(text), f"flag --{key}")
    return settings


def parse_literal(text: str) -> TOMLValue:
    """A flag's text as TOML would read it, else the text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def flatten(table: Mapping[str, TOMLValue], origin: str) -> dict[str, Setting]:
    """`{section: {key: value}}` as `{"section.key": Setting}`."""
    settings: dict[str, Setting] = {}
    for section, values in table.items():
        if not isinstance(values, dict):
            known = {key.split(".")[1]: key.split(".")[0] for key in known_keys()}
            where = f"; it belongs in [{known[section]}]" if section in known else ""
            raise ConfigError(f"{origin}: '{section}' stands outside any section{where}")
        for key, value in typing.cast(dict[str, TOMLValue], values).items():
            settings[f"{section}.{key}"] = Setting(value, origin)
    return settings


def known_keys() -> list[str]:
    """Every `section.key` there is."""
    return [
        f"{section.name}.{leaf.name}"
        for section in dataclasses.fields(Config)
        for leaf in dataclasses.fields(section_class(section.name))
    ]


@cache
def section_class(section: str) -> Any:
    """The dataclass of a section."""
    return typing.get_type_hints(Config)[section]


@cache
def leaf_hints(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass, resolved."""
    return typing.get_type_hints(kind)


def build_config(settings: Mapping[str, Setting]) -> Config:
    """The frozen tree with these settings over the defaults; relations are not checked yet."""
    keys = known_keys()
    sections: dict[str, dict[str, object]] = {}
    for key, setting in settings.items():
        if key not in keys:
            raise ConfigError(unknown_key_message(key, setting.origin, keys))
        section, leaf = key.split(".")
        hint = leaf_hints(section_class(section))[leaf]
        sections.setdefault(section, {})[leaf] = convert(setting.value, hint, key, setting.origin)
    return Config(**{name: section_class(name)(**values) for name, values in sections.items()})


def unknown_key_message(key: str, origin: str, keys: Sequence[str]) -> str:
    """Name the nearest key: by the whole path, else by the last word alone."""
    hint = suggest(key, keys)
    if not hint or key.split(".")[0] not in {known.split(".")[0] for known in keys}:
        by_leaf = [known for known in keys if known.split(".")[1] == key.split(".")[-1]]
        hint = f"; did you mean '{by_leaf[0]}'?" if by_leaf else hint
    return f"{origin}: unknown key '{key}'{hint}"


def convert(value: TOMLValue, hint: Any, key: str, origin: str) -> object:
    """`value` as the annotated type, or ConfigError with key, expectation and what was given.

    A whole float passes as int and an int as float; "none" unsets a setting that may be unset.
    """
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value == UNSET:
            return None
        (hint,) = [argument for argument in arguments if argument is not types.NoneType]
        return convert(value, hint, key, origin)
    if typing.get_origin(hint) is Literal:
        if value in arguments and isinstance(value, str):
            return value
        raise mismatch(key, origin, f"one of {', '.join(map(repr, arguments))}", value, arguments)
    if typing.get_origin(hint) is tuple:
        return convert_tuple(value, arguments[0], key, origin)
    if hint is SourceConfig:
        return convert_source(value, key, origin)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (int, float)) and origin.startswith("flag"):
        return str(value)
    if type(value) is hint:
        return value
    raise mismatch(key, origin, hint.__name__, value)


def mismatch(
    key: str, origin: str, wanted: str, value: TOMLValue, choices: Sequence[str] = ()
) -> ConfigError:
    """The error for a value of the wrong type or outside a set of choices."""
    if choices:
        hint = suggest(str(value), choices)
        return ConfigError(f"{origin}: '{key}' must be {wanted}; got {value!r}{hint}")
    return ConfigError(
        f"{origin}: '{key}' must be {wanted}; got {value!r} ({type(value).__name__})"
    )


def convert_tuple(value: TOMLValue, item: Any, key: str, origin: str) -> tuple[object, ...]:
    """A list; a single flag value stands for a list of one, sources may be joined by commas."""
    if isinstance(value, str) and item is SourceConfig:
        value = value.split(",")
    elif isinstance(value, str) and origin.startswith("flag"):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise mismatch(key, origin, f"a list of {item.__name__}", value)
    items = typing.cast(Sequence[TOMLValue], value)
    return tuple(convert(each, item, f"{key}[{i}]", origin) for i, each in enumerate(items))


def convert_source(value: TOMLValue, key: str, origin: str) -> SourceConfig:
    """A source given as its path, or as a table of SourceConfig's fields."""
    if isinstance(value, str):
        return SourceConfig(path=value)
    if not isinstance(value, dict):
        raise mismatch(key, origin, "a path or a table with path, weight, text_field", value)
    table = typing.cast(dict[str, TOMLValue], value)
    hints = leaf_hints(SourceConfig)
    unknown = [name for name in table if name not in hints]
    if unknown:
        raise ConfigError(f"{origin}: unknown key '{key}.{unknown[0]}'{suggest(unknown[0], hints)}")
    fields: dict[str, Any] = {
        name: convert(each, hints[name], f"{key}.{name}", origin) for name, each in table.items()
    }
    return SourceConfig(**fields)


def to_tables(config: Config) -> dict[str, dict[str, Any]]:
    """The tree as plain tables for JSON; unset settings are None."""
    return dataclasses.asdict(config)


def from_tables(tables: Mapping[str, Mapping[str, Any]], origin: str) -> Config:
    """The tree that `to_tables` made plain, for example in a checkpoint's manifest."""
    config = build_config(settings_of_tables(tables, origin))
    check(config)
    return config


def to_settings(config: Config) -> dict[str, Setting]:
    """The tree as settings to lay others over."""
    return settings_of_tables(to_tables(config), "config")


def settings_of_tables(tables: Mapping[str, Mapping[str, Any]], origin: str) -> dict[str, Setting]:
    """Plain tables as settings; None becomes "none" where a setting may be unset."""
    settings: dict[str, Setting] = {}
    for section, values in tables.items():
        for key, value in values.items():
            if f"{section}.{key}" == "data.sources":
                value = [{k: v for k, v in source.items() if v is not None} for source in value]
            if value is None and key_may_be_unset(section, key):
                value = UNSET
            settings[f"{section}.{key}"] = Setting(value, origin)
    return settings


def key_may_be_unset(section: str, key: str) -> bool:
    """Whether None is a value of this setting rather than a mistake."""
    hint = leaf_hints(section_class(section)).get(key)
    return types.NoneType in typing.get_args(hint)


def to_toml(config: Config) -> str:
    """The whole tree as TOML that `load_config` reads back to an equal tree."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = getattr(config, section.name)
        for leaf in dataclasses.fields(values):
            value = getattr(values, leaf.name)
            if value is not None or leaf.default is not None:
                lines.append(f"{leaf.name} = {toml_literal(value)}")
        lines.append("")
    return "\n".join(lines)


def toml_literal(value: object) -> str:
    """One value as TOML; JSON strings are valid TOML strings."""
    if value is None:
        return f'"{UNSET}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, SourceConfig):
        fields = {leaf.name: getattr(value, leaf.name) for leaf in dataclasses.fields(value)}
        pairs = [f"{k} = {toml_literal(v)}" for k, v in fields.items() if v is not None]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, tuple):
        items = typing.cast(tuple[object, ...], value)
        return "[" + ", ".join(toml_literal(item) for item in items) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
