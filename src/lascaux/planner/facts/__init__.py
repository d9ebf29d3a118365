"""The planner's facts: TOML tables in which every row names its source."""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def read_facts(name: str) -> dict[str, Any]:
    """One table of this folder."""
    text = files("lascaux.planner.facts").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
