"""The data of a run: prepared folders opened in place, or raw sources prepared into the run."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lascaux.config.schema import DataConfig, TokenizerConfig
from lascaux.data import shards
from lascaux.data.order import check_weights
from lascaux.data.prepare import Progress, check_vocab_size, prepare, request_of
from lascaux.data.shards import PreparedData, is_prepared, open_prepared
from lascaux.data.sources import STDLIB
from lascaux.data.tokenizer import load_tokenizer
from lascaux.errors import ConfigError, DataError


def prepare_for_run(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    vocab_size: int,
    folder: Path,
    progress: Progress | None = None,
) -> PreparedData:
    """Everything a run needs to read tokens; `folder` is where raw sources are prepared into.

    Sources that are prepared folders are opened where they are. Raw sources are prepared into
    `folder` at the first call and opened from there afterwards.

    Raises: DataError when prepared and raw sources are mixed, when `folder` was made from other
        settings, when tokenizer and model.vocab_size disagree.
    """
    paths = [Path(source.path).expanduser() for source in data.sources]
    ready = [
        source.path != STDLIB and is_prepared(path)
        for source, path in zip(data.sources, paths, strict=True)
    ]
    if all(ready) and paths:
        prepared = join_prepared(
            [open_prepared(path) for path in paths], [source.weight for source in data.sources]
        )
        _check_tokenizer_setting(tokenizer_config, prepared)
    elif any(ready):
        raise DataError(
            f"data.sources mixes prepared data ('{paths[ready.index(True)]}') and raw text "
            f"('{paths[ready.index(False)]}'); run `lascaux prepare` on the raw text with the same "
            f"tokenizer and give both folders"
        )
    else:
        if not is_prepared(folder):
            prepare(data, tokenizer_config, vocab_size, folder, progress=progress)
        prepared = open_prepared(folder)
        _check_request(request_of(data, tokenizer_config, vocab_size), prepared)
    check_vocab_size(prepared.tokenizer, vocab_size)
    return prepared


def join_prepared(folders: Sequence[PreparedData], weights: Sequence[float | None]) -> PreparedData:
    """Several prepared folders as one; with weights, each folder is one source of a mixture.

    Raises: DataError for different tokenizers or weights that do not fit what a folder holds;
        ConfigError when only some folders have a weight.
    """
    weighted = check_weights(weights) is not None
    first = folders[0]
    for other in folders[1:]:
        if other.tokenizer.sha256 != first.tokenizer.sha256:
            raise DataError(
                f"'{first.folders[0]}' and '{other.folders[0]}' were prepared with different "
                f"tokenizers; prepare one of them again with the tokenizer.json of the other"
            )
    if len(folders) == 1 and not weighted:
        return first
    sources = []
    for prepared, weight in zip(folders, weights, strict=True):
        if weighted and len(prepared.sources) > 1:
            raise DataError(
                f"'{prepared.folders[0]}' holds {len(prepared.sources)} sources and cannot take "
                f"one weight; prepare each source into a folder of its own"
            )
        if not weighted and any(each is not None for each in prepared.weights):
            raise DataError(
                f"'{prepared.folders[0]}' was prepared with weights for its sources and cannot be "
                f"mixed with other folders; give it alone, or give every folder a weight"
            )
        sources += [replace(source, weight=weight) for source in prepared.sources]
    content = [[prepared.identity for prepared in folders], list(weights)]
    return replace(
        first,
        folders=tuple(prepared.folders[0] for prepared in folders),
        sources=tuple(sources),
        identity=hashlib.sha256(shards.canonical_json(content)).hexdigest(),
        files=tuple(record for prepared in folders for record in prepared.files),
    )


def _check_tokenizer_setting(tokenizer_config: TokenizerConfig, prepared: PreparedData) -> None:
    """Prepared data brings its tokenizer; a setting that asks for another one is an error."""
    if tokenizer_config.path is not None:
        path = Path(tokenizer_config.path).expanduser()
        if load_tokenizer(path).sha256 != prepared.tokenizer.sha256:
            raise DataError(
                f"'{prepared.folders[0]}' was prepared with another tokenizer than '{path}'; "
                f"leave tokenizer.path unset or prepare the text again"
            )
    made_with = prepared.options.get("pattern")
    if tokenizer_config.pattern not in (None, made_with):
        raise ConfigError(
            f"'tokenizer.pattern' is '{tokenizer_config.pattern}', but '{prepared.folders[0]}' was "
            f"prepared with '{made_with}'; leave it unset for prepared data"
        )


def _check_request(wanted: dict[str, object], prepared: PreparedData) -> None:
    for name, value in wanted.items():
        found = prepared.request.get(name)
        if shards.canonical_json(found) != shards.canonical_json(value):
            raise DataError(
                f"'{prepared.folders[0]}' was prepared with {name} {found}, the configuration now "
                f"asks for {value}; start another run, or delete that folder to prepare it again"
            )
