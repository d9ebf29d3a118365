"""A study: models that differ in a few settings, each trained with several seeds.

    [compare]
    seeds = [0, 1, 2]
    [compare.models]
    dense = {}                                    # the first is what the others are measured by
    moe-8 = { model.num_experts = 8 }

The rest of the file is a configuration that all have in common, in the words of any other.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lascaux.config.check import check
from lascaux.config.load import (
    Setting,
    build_config,
    flatten,
    overlay,
    read_flags,
    read_table,
    read_toml,
)
from lascaux.config.schema import Config
from lascaux.errors import ConfigError, suggest

STUDIES = Path(__file__).parent / "studies"
DEFAULT_STUDY = "dense-vs-moe"
DEFAULT_SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Study:
    """What is to be trained; the first model is what the others are measured by."""

    models: dict[str, Config]
    seeds: tuple[int, ...]


def read_study(target: str | None, flags: Sequence[str], num_seeds: int | None) -> Study:
    """The study of this name or file, with flags over the settings of every model.

    Raises: ConfigError naming file, key or model.
    """
    name = DEFAULT_STUDY if target is None else target
    table = read_toml(study_path(name))
    compare = table.pop("compare", None)
    if not isinstance(compare, dict):
        raise ConfigError(
            f"{name} is no study: it has no [compare] with seeds and no [compare.models]"
        )
    above, common = read_flags(flags), read_table(table, name)
    if "train.seed" in above or "train.seed" in common:
        raise ConfigError("a study trains with several seeds: give them as [compare] seeds")
    models = {
        model: _build(common, settings, above, f"{name}, model {model}")
        for model, settings in _models(compare, name).items()
    }
    return Study(models, _seeds(compare, name, num_seeds))


def study_path(name: str) -> Path:
    """The file of a study, which may be one that ships with the package."""
    known = sorted(path.stem for path in STUDIES.glob("*.toml"))
    if name in known:
        return STUDIES / f"{name}.toml"
    path = Path(name)
    if path.suffix != ".toml" and not path.exists():
        raise ConfigError(
            f"no study or file '{name}'{suggest(name, known)}\nstudies: {', '.join(known)}"
        )
    return path


def _models(compare: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    for key in compare:
        if key not in ("seeds", "models"):
            hint = suggest(key, ("seeds", "models"))
            raise ConfigError(f"{name}: unknown key 'compare.{key}'{hint}")
    models = compare.get("models")
    if not isinstance(models, dict) or len(models) < 2:
        raise ConfigError(f"{name}: [compare.models] needs two models or more")
    for model, settings in models.items():
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", model) is None:
            raise ConfigError(
                f"{name}: '{model}' names a folder and may have letters, digits, '.', '_' and '-'"
            )
        if not isinstance(settings, dict):
            raise ConfigError(
                f"{name}: model {model} must be settings, such as "
                f"{{ model.num_experts = 8 }}; got {settings!r}"
            )
    return models


def _seeds(compare: Mapping[str, Any], name: str, num_seeds: int | None) -> tuple[int, ...]:
    seeds = compare.get("seeds", list(DEFAULT_SEEDS))
    whole = isinstance(seeds, list) and all(
        isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds
    )
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{name}: 'compare.seeds' must be a list of different whole numbers from 0; "
            f"got {seeds!r}"
        )
    if num_seeds is None:
        return tuple(seeds)
    if num_seeds < 1:
        raise ConfigError(f"--seeds must be at least 1; got {num_seeds}")
    return tuple(range(num_seeds))


def _build(
    common: Mapping[str, Setting],
    settings: Mapping[str, Any],
    above: Mapping[str, Setting],
    origin: str,
) -> Config:
    config = build_config(overlay(overlay(common, flatten(settings, origin)), above))
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    return config


def with_seed(config: Config, seed: int) -> Config:
    """The config of one run."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
