"""A trained model from a run or checkpoint folder, ready to generate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lascaux.checkpoint.load import copy_into, load_tensors, newest_valid
from lascaux.checkpoint.manifest import read_manifest
from lascaux.config.load import build_config, from_tables, overlay, read_flags, to_settings
from lascaux.config.schema import Config, GenerateConfig
from lascaux.data.tokenizer import Tokenizer, load_tokenizer
from lascaux.errors import CheckpointError, ConfigError
from lascaux.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in evaluation mode on its device, with its tokenizer and how to draw from it."""

    model: Transformer
    tokenizer: Tokenizer
    settings: GenerateConfig
    device: torch.device


def load_for_generation(source: Path, flags: Sequence[str] = ()) -> LoadedModel:
    """The newest intact checkpoint of a run folder, or the checkpoint folder itself.

    `flags` are `--generate.key=value` over the run's own settings.
    Raises: CheckpointError for a folder without a checkpoint; ConfigError for other flags.
    """
    checkpoint = find_checkpoint(source)
    manifest = read_manifest(checkpoint)
    config = from_tables(manifest.state["config"], f"{checkpoint}/manifest.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = Transformer(config.model)
    parameters = {name: p.data for name, p in model.named_parameters()}
    copy_into(parameters, load_tensors(checkpoint, "model"), "model")
    tokenizer = load_tokenizer(tokenizer_path(checkpoint))
    if tokenizer.sha256 != manifest.state["tokenizer_sha256"]:
        raise CheckpointError(
            f"{tokenizer_path(checkpoint)} is not the tokenizer the model was trained with: "
            f"expected hash {manifest.state['tokenizer_sha256']}, found {tokenizer.sha256}"
        )
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        settings=generate_settings(config, flags),
        device=device,
    )


def find_checkpoint(source: Path) -> Path:
    """The folder to load: `source` if it is a checkpoint, else the newest intact one of the run."""
    if (source / "manifest.json").exists():
        return source
    if not source.is_dir():
        raise CheckpointError(f"there is no run or checkpoint folder '{source}'")
    path, rejected = newest_valid(source / "checkpoints")
    if path is None:
        reason = f": {rejected[0]}" if rejected else ""
        raise CheckpointError(
            f"'{source}' has no intact checkpoint{reason}; `lascaux train --run {source}` makes one"
        )
    return path


def tokenizer_path(checkpoint: Path) -> Path:
    """RUN/tokenizer.json of the run that the checkpoint belongs to."""
    path = checkpoint.resolve().parents[1] / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"no tokenizer beside checkpoint '{checkpoint}': expected {path}; keep the checkpoint "
            "in its run folder"
        )
    return path


def generate_settings(config: Config, flags: Sequence[str]) -> GenerateConfig:
    """The run's [generate] section with flags over it."""
    given = read_flags(flags)
    for key in given:
        if not key.startswith("generate."):
            raise ConfigError(f"--{key} has no effect on generation; settings here: --generate.…")
    return build_config(overlay(to_settings(config), given)).generate
