"""A small corpus, a run that trains in a second, and the command line in this process."""

import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lascaux.cli import main
from lascaux.parallel import hardware

SMALL_RUN = """
[model]
num_layers = 2
d_model = 32
num_heads = 2
vocab_size = 300
max_context = 64
[data]
sources = ["{corpus}"]
valid_fraction = 0.2
[train]
steps = 8
batch_tokens = 256
microbatch_seqs = 4
seq_len = 32
device = "cpu"
precision = "fp32"
threads = 1
[optimizer]
lr = 1e-2
[schedule]
warmup_steps = 2
[checkpoint]
every_steps = 3
[evaluate]
every_steps = 4
max_tokens = 128
sample_tokens = 8
[generate]
max_tokens = 12
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-cases", action="store_true", help="every case on every layout, not a third of them"
    )


@pytest.fixture(scope="session")
def all_cases(pytestconfig: pytest.Config) -> bool:
    """Whether a campaign is asked for instead of the usual suite."""
    return bool(pytestconfig.getoption("--all-cases"))


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def quick_and_repeatable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, the machine's peak measured in a moment, and a cache of the tests' own."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(hardware, "PEAK_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files of sums and their results: text any model learns something from."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for number in range(40):
        pairs = [(draw.randrange(20), draw.randrange(20)) for _ in range(30)]
        lines = [f"add({a}, {b}) = {a + b}\n" for a, b in pairs]
        (folder / f"{number:02}.txt").write_text(f"# file {number}\n" + "".join(lines))
    return folder


@pytest.fixture
def config_file(tmp_path: Path, corpus: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL_RUN.format(corpus=corpus))
    return path


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """`cli("train", …)` as a user would call it: exit code, stdout, stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        code = caught.value.code
        assert isinstance(code, int | None)
        return Result(code or 0, out, err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def metrics(run: Path) -> list[dict[str, Any]]:
    """RUN/metrics.jsonl without what a clock measured."""
    clock = {"seconds", "elapsed_seconds", "tokens_per_second", "mfu"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def last_weights(run: Path) -> dict[str, bytes]:
    """The files of the newest checkpoint, byte for byte; the manifest holds times."""
    newest = sorted(os.listdir(run / "checkpoints"))[-1]
    folder = run / "checkpoints" / newest
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
