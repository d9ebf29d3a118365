"""Help for every setting, read from the strings below the fields of the schema."""

import ast
import dataclasses
from functools import cache
from pathlib import Path

from lascaux.config import plan_schema, schema, serve_schema
from lascaux.config.load import section_class, toml_literal

COLUMN = 42


@cache
def field_help() -> dict[tuple[str, str], str]:
    """Help text of each (dataclass, field)."""
    files = (schema.__file__, plan_schema.__file__, serve_schema.__file__)
    source = "\n".join(Path(file).read_text(encoding="utf-8") for file in files)
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    found[node.name, name] = words
                case _:
                    pass
    return found


def describe_section(section: str) -> str:
    """One line for each setting of a section: key, default, meaning with its unit."""
    kind = section_class(section)
    lines: list[str] = []
    for field in dataclasses.fields(kind):
        default = "unset" if field.default is None else toml_literal(field.default)
        key = f"  --{section}.{field.name}={default}"
        gap = " " * (COLUMN - len(key)) if len(key) < COLUMN else "\n" + " " * COLUMN
        lines.append(key + gap + field_help()[kind.__name__, field.name])
    return "\n".join(lines)
