"""What is imported: a Hugging Face folder or a GGUF file, checked and ready to be read.

Nothing is written here, and of the weights nothing is read: names, shapes and types come first.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from lascaux.config.schema import ModelConfig
from lascaux.data.roles import TokenRoles
from lascaux.data.tokenizer import Tokenizer, load_tokenizer
from lascaux.errors import CheckpointError
from lascaux.exchange.choose import find_family, read_model
from lascaux.exchange.folder import WEIGHTS, open_tensors
from lascaux.exchange.gguf_families import read_gguf_model
from lascaux.exchange.gguf_file import open_gguf
from lascaux.exchange.gguf_tokenizer import read_tokenizer
from lascaux.exchange.match import Matched, match_tensors
from lascaux.exchange.settings import Settings, read_json
from lascaux.exchange.token_files import read_token_files


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model from elsewhere beside ours."""

    family: str
    model: ModelConfig
    matched: Matched
    tokenizer: Tokenizer
    roles: TokenRoles
    ignored_settings: tuple[str, ...]
    """those not known to be without effect"""


def open_source(path: Path, stack: ExitStack) -> Source:
    """A folder with config.json, a GGUF file, or a folder with one; readable while the stack is.

    Raises: CheckpointError for files that are damaged or not what they say; ConfigError for
    settings our network has not; DataError for a tokenizer it cannot use.
    """
    found = find_gguf(path)
    source = open_folder(path, stack) if found is None else open_gguf_file(found, stack)
    return replace(source, model=with_tokenizer(source.model, source.tokenizer))


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that is meant; None for a folder with other weights, or none."""
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if not files or any((path / name).exists() for name in WEIGHTS):
        return None
    if len(files) > 1:
        raise CheckpointError(
            f"{path} has {len(files)} GGUF files, such as {files[0].name} and {files[1].name}; "
            "give one of them"
        )
    return files[0]


def open_folder(folder: Path, stack: ExitStack) -> Source:
    """A Hugging Face folder."""
    settings = Settings(read_json(folder / "config.json"), folder / "config.json")
    family = find_family(settings.content, settings.path)
    model = read_model(family, settings)
    matched = match_tensors(family, model, open_tensors(folder, stack), folder)
    tokenizer = load_tokenizer(folder)
    tokenizer, roles, ignored = read_token_files(folder, tokenizer, settings)
    return Source(
        family=family.name,
        model=model,
        matched=matched,
        tokenizer=tokenizer,
        roles=roles,
        ignored_settings=(*settings.unread(), *ignored),
    )


def open_gguf_file(path: Path, stack: ExitStack) -> Source:
    """A GGUF file."""
    file = open_gguf(path, stack)
    family, settings, model = read_gguf_model(file)
    kinds = sorted({tensor.dtype for tensor in file.tensors.values()})
    matched = match_tensors(family, model, file.tensors, path, "its metadata", kinds)
    tokenizer, roles = read_tokenizer(file.metadata, path)
    return Source(
        family=f"{family.name} (GGUF)",
        model=model,
        matched=matched,
        tokenizer=tokenizer,
        roles=roles,
        ignored_settings=tuple(settings.unread()),
    )


def with_tokenizer(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The same network, rows beyond the tokenizer's ids set apart as padding.

    Raises: CheckpointError where the tokenizer has ids without a row.
    """
    rows = model.vocab_size
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{tokenizer.origin} has {tokenizer.vocab_size:,} ids, the embedding only {rows:,} "
            "rows: tokenizer and weights are of different models"
        )
    padded = rows if tokenizer.vocab_size < rows else None
    return replace(model, vocab_size=tokenizer.vocab_size, padded_vocab_size=padded)
