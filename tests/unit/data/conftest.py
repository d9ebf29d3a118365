"""Small corpora and prepared folders for the data tests."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lascaux.config.schema import DataConfig, SourceConfig, TokenizerConfig
from lascaux.data.prepare import prepare
from lascaux.data.shards import PreparedData, open_prepared
from lascaux.data.tokenizer import Tokenizer, train_tokenizer

WORDS = "def return self value index token for in range print list of the a cave wall hand".split()


def make_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) + f"\n    # {number} é\n"
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(make_texts(200)), 400, "code")


@pytest.fixture
def make_prepared(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., PreparedData]:
    """Prepare one folder of text files for each list of texts."""

    def make(
        *sources: list[str],
        weights: list[float] | None = None,
        valid_fraction: float = 0.2,
        name: str = "out",
    ) -> PreparedData:
        configs = []
        for number, texts in enumerate(sources):
            folder = tmp_path / f"{name}-source{number}"
            folder.mkdir()
            for place, text in enumerate(texts):
                (folder / f"{place:05d}.txt").write_bytes(text.encode())
            weight = None if weights is None else weights[number]
            configs.append(SourceConfig(path=str(folder), weight=weight))
        data = DataConfig(sources=tuple(configs), valid_fraction=valid_fraction)
        prepare(data, TokenizerConfig(), 400, tmp_path / name, tokenizer=tokenizer)
        return open_prepared(tmp_path / name)

    return make
