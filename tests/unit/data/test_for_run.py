"""The data of a run: prepared once, opened afterwards, refused when settings changed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lascaux.config.schema import DataConfig, SourceConfig, TokenizerConfig
from lascaux.data.for_run import prepare_for_run
from lascaux.data.loader import SampleReader
from lascaux.data.shards import PreparedData
from lascaux.errors import ConfigError, DataError

from .conftest import make_texts

MakePrepared = Callable[..., PreparedData]


@pytest.fixture
def raw(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number, text in enumerate(make_texts(40)):
        (folder / f"{number}.txt").write_text(text)
    return DataConfig(sources=(SourceConfig(path=str(folder)),), valid_fraction=0.2)


def prepared_config(*folders: PreparedData, weights: list[float] | None = None) -> DataConfig:
    return DataConfig(
        sources=tuple(
            SourceConfig(path=str(f.folders[0]), weight=None if weights is None else weights[n])
            for n, f in enumerate(folders)
        )
    )


def test_raw_sources_are_prepared_once(tmp_path: Path, raw: DataConfig):
    calls: list[int] = []
    first = prepare_for_run(
        raw, TokenizerConfig(), 400, tmp_path / "data", lambda done, total: calls.append(done)
    )
    assert calls
    calls.clear()
    again = prepare_for_run(
        raw, TokenizerConfig(), 400, tmp_path / "data", lambda done, total: calls.append(done)
    )
    assert not calls and again.identity == first.identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_fraction": 0.5}, "was prepared with valid_fraction 0.2, the .* asks for 0.5"),
        ({"sources": (SourceConfig(),)}, "was prepared with sources"),
    ],
)
def test_changed_settings_are_refused(
    tmp_path: Path, raw: DataConfig, change: dict[str, object], message: str
):
    prepare_for_run(raw, TokenizerConfig(), 400, tmp_path / "data")
    with pytest.raises(DataError, match=message):
        prepare_for_run(replace(raw, **change), TokenizerConfig(), 400, tmp_path / "data")
    with pytest.raises(DataError, match="was prepared with tokenizer"):
        prepare_for_run(raw, TokenizerConfig(pattern="gpt2"), 400, tmp_path / "data")


def test_prepared_folder_is_opened_in_place(tmp_path: Path, make_prepared: MakePrepared):
    made = make_prepared(make_texts(40))
    opened = prepare_for_run(prepared_config(made), TokenizerConfig(), 400, tmp_path / "data")
    assert opened.identity == made.identity and opened.folders == made.folders
    assert not (tmp_path / "data").exists()


def test_prepared_folders_mix_by_weight(tmp_path: Path, make_prepared: MakePrepared):
    a = make_prepared(make_texts(40), name="a")
    b = make_prepared(make_texts(40, seed=1), name="b")
    config = prepared_config(a, b, weights=[3, 1])
    both = prepare_for_run(config, TokenizerConfig(), 400, tmp_path / "data")
    assert both.weights == (3, 1)
    assert both.tokens("train") == a.tokens("train") + b.tokens("train")
    assert both.identity not in (a.identity, b.identity) and not both.hash_problems()
    source, _ = SampleReader(both, "train", 16, seed=0).locate(np.arange(400))
    assert int((source == 0).sum()) == 300
    plain = prepare_for_run(prepared_config(a, b), TokenizerConfig(), 400, tmp_path / "data")
    assert plain.weights == (None, None) and plain.identity != both.identity


def test_weights_of_a_prepared_folder_are_its_own(tmp_path: Path, make_prepared: MakePrepared):
    made = make_prepared(make_texts(40), make_texts(40, seed=1), weights=[1, 3])
    opened = prepare_for_run(prepared_config(made), TokenizerConfig(), 400, tmp_path / "data")
    assert opened.weights == (1, 3)
    with pytest.raises(DataError, match="holds 2 sources and cannot take one weight"):
        prepare_for_run(
            prepared_config(made, weights=[1.0]), TokenizerConfig(), 400, tmp_path / "data"
        )


def test_what_cannot_be_combined_is_explained(
    tmp_path: Path, make_prepared: MakePrepared, raw: DataConfig
):
    a = make_prepared(make_texts(40), name="a")
    mixed = DataConfig(sources=(*prepared_config(a).sources, *raw.sources))
    with pytest.raises(DataError, match="data.sources mixes prepared data .* and raw text"):
        prepare_for_run(mixed, TokenizerConfig(), 400, tmp_path / "data")
    with pytest.raises(DataError, match="token ids, but model.vocab_size is 300"):
        prepare_for_run(prepared_config(a), TokenizerConfig(), 300, tmp_path / "data")
    other = prepare_for_run(raw, TokenizerConfig(pattern="gpt2"), 300, tmp_path / "other")
    with pytest.raises(DataError, match="were prepared with different tokenizers"):
        prepare_for_run(prepared_config(a, other), TokenizerConfig(), 400, tmp_path / "data")
    path = TokenizerConfig(path=str(other.folders[0] / "tokenizer.json"))
    with pytest.raises(DataError, match="was prepared with another tokenizer than"):
        prepare_for_run(prepared_config(a), path, 400, tmp_path / "data")
    with pytest.raises(ConfigError, match="'tokenizer.pattern' is 'code', but"):
        prepare_for_run(prepared_config(a), TokenizerConfig(pattern="code"), 400, tmp_path / "data")
