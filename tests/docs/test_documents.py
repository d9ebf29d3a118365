"""The documents and the house rules that a machine can check."""

import ast
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from lascaux.arguments import split_flags
from lascaux.cli import build_parser
from lascaux.config.load import load_config, preset_names

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_TOTAL_LINES, MAX_FILE_LINES, MAX_FUNCTION_LINES = 31_000, 400, 60
LONG_FUNCTIONS = {"train_steps"}  # the training loop reads best in one piece


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|console|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("lascaux ")]


def test_the_code_stays_within_its_budget() -> None:
    lengths = {path: path.read_text().count("\n") for path in SOURCES}
    assert sum(lengths.values()) < MAX_TOTAL_LINES
    assert {p.name: n for p, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_stay_short() -> None:
    long = {
        f"{path.name}:{node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
        and node.name not in LONG_FUNCTIONS
    }
    assert long == set()


def test_environment_variables_and_pickles_are_read_in_one_place() -> None:
    for path in SOURCES:
        text = path.read_text()
        if str(path).endswith("exchange/pickled.py"):  # other people's weights, without code
            calls = re.findall(r"torch\.load\(.*\)", text)
            assert calls and all("weights_only=True" in call for call in calls)
            assert text.count("torch.load") == len(calls) and "pickle.load" not in text
            text = text.replace("torch.load", "").replace("import pickle", "")
        for word in ("import pickle", "torch.load", "torch.save"):
            assert word not in text, f"{path}: {word}"
        if not str(path).endswith("parallel/runtime.py"):
            assert "os.environ" not in text and "getenv" not in text, path


def test_the_model_knows_no_rank_and_prints_nothing() -> None:
    package = ROOT / "src" / "lascaux"
    for path in [*(package / "model").glob("*.py"), *(package / "kernels").glob("*.py")]:
        text = path.read_text()
        for word in ("distributed", "print(", "environ", ".cuda("):
            assert word not in text, f"{path}: {word}"


def test_the_readme_has_commands() -> None:
    assert len(readme_commands()) >= 6


@pytest.mark.parametrize("command", readme_commands())
def test_every_readme_command_is_understood(command: str) -> None:
    plain, flags = split_flags(shlex.split(command)[1:])
    options = build_parser().parse_args(plain)
    assert callable(options.run_command)
    target = getattr(options, "target", None)
    if target is None or target in preset_names():
        load_config(target, flags)


def test_every_readme_toml_block_is_a_config(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.toml"
        path.write_text(block)
        load_config(str(path))


def test_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in SOURCES:
        if path.stem not in ("__init__", "__main__"):
            assert re.search(rf"\b{path.stem}\b", text), f"{path.stem} is not in the picture"


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in project["dependencies"]:
        assert re.split(r"[<>=\[]", requirement)[0] in text


def test_help_answers_without_torch_in_under_half_a_second() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lascaux", "--help"]
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - started)
    assert "train a model" in done.stdout
    assert not re.search(r"\b(torch|numpy|rich|pyarrow)\b", done.stderr)
