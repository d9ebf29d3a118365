"""A trained model from a run or checkpoint folder, ready to generate."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lascaux.checkpoint.load import (
    check_fits,
    describe_tensors,
    newest_valid,
    stream_tensors,
)
from lascaux.checkpoint.manifest import read_manifest
from lascaux.config.load import build_config, from_tables, overlay, read_flags, to_settings
from lascaux.config.schema import Config, GenerateConfig, ModelConfig
from lascaux.data.roles import TokenRoles, read_roles
from lascaux.data.tokenizer import Tokenizer, load_tokenizer
from lascaux.errors import CheckpointError, ConfigError, LascauxError
from lascaux.generate.native import NativeWeights, suits
from lascaux.generate.quantize import quantizable, quantized
from lascaux.model.moe import Router
from lascaux.model.transformer import Transformer
from lascaux.parallel.hardware import has_bf16_products, usable_cores
from lascaux.parallel.runtime import threads_asked_for

Weights = Literal["fp32", "bf16", "int8", "int4"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in evaluation mode on its device, with its tokenizer and how to draw from it."""

    model: Transformer
    tokenizer: Tokenizer
    roles: TokenRoles
    settings: GenerateConfig
    device: torch.device
    name: str
    """of the folder"""
    precision: Weights
    weight_bytes: int
    native: NativeWeights | None = None
    """computes rows in compiled code; None: the model does"""


def load_for_generation(source: Path, flags: Sequence[str] = ()) -> LoadedModel:
    """The newest intact checkpoint of a run folder, or the checkpoint folder itself.

    `flags` are `--generate.key=value` over the run's own settings.
    Raises: CheckpointError for a folder without a checkpoint; ConfigError for other flags.
    """
    checkpoint = find_checkpoint(source)
    manifest = read_manifest(checkpoint)
    config = from_tables(manifest.state["config"], f"{checkpoint}/manifest.json")
    settings = generate_settings(config, flags)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_threads(settings.threads)
    precision = choose_weights(settings, device)
    tokenizer = load_tokenizer(tokenizer_path(checkpoint))
    if tokenizer.sha256 != manifest.state["tokenizer_sha256"]:
        raise CheckpointError(
            f"{tokenizer_path(checkpoint)} is not the tokenizer the model was trained with: "
            f"expected hash {manifest.state['tokenizer_sha256']}, found {tokenizer.sha256}"
        )
    model = load_model(checkpoint, without_capacity(config.model), device, precision)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        roles=read_roles(tokenizer_path(checkpoint).parent, tokenizer),
        settings=settings,
        device=device,
        name=source.resolve().name,
        precision=precision,
        weight_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        native=native_weights(model, device),
    )


def without_capacity(model: ModelConfig) -> ModelConfig:
    """No token is dropped: what is drawn must not depend on which tokens are computed beside it."""
    return dataclasses.replace(model, capacity_factor=None, drop_by="position")


def load_model(
    checkpoint: Path, config: ModelConfig, device: torch.device, precision: Weights
) -> Transformer:
    """The network with the weights of a checkpoint, in evaluation mode.

    Weights are rounded as they are read: memory holds the model as it will be and one file.
    Raises: CheckpointError for weights that are damaged or of another config.
    """
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: p.data for name, p in model.named_parameters()}
    check_fits(wanted, describe_tensors(checkpoint, "model"), "model")
    for name, tensor in stream_tensors(checkpoint, "model"):
        place(model, name, tensor.to(device), precision)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
    return model.eval().requires_grad_(False)


def place(model: Transformer, name: str, tensor: Tensor, precision: Weights) -> None:
    """Put a weight into the model, rounded to what it is held in.

    Routers stay in fp32, as a rounded choice is another choice.
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    few_bits = precision in ("int8", "int4") and path != "position_embed" and quantizable(module)
    wide = torch.float32 if isinstance(module, Router) else activation_dtype(precision, tensor)
    held = tensor if few_bits else tensor.to(wide, copy=True)
    setattr(module, attribute, nn.Parameter(held, requires_grad=False))
    if few_bits and not any(p.is_meta for p in module.parameters(recurse=False)):
        bits = 8 if precision == "int8" or path in ("embed", "head") else 4
        parent, _, own = path.rpartition(".")
        model.get_submodule(parent).register_module(own, quantized(module, bits, wide))


def activation_dtype(precision: Weights, tensor: Tensor) -> torch.dtype:
    """What the network computes in."""
    if precision in ("int8", "int4"):
        precision = "bf16" if has_bf16_products(tensor.device) else "fp32"
    return DTYPES[precision]


def native_weights(model: Transformer, device: torch.device) -> NativeWeights | None:
    """The weights for the compiled step; None on a GPU, and, with a warning, without a compiler."""
    if not suits(next(model.final_norm.parameters()).dtype, device):
        return None
    try:
        return NativeWeights(model, torch.get_num_threads())
    except LascauxError as error:
        logging.getLogger(__name__).warning(
            f"{error}; torch computes tokens instead, several times slower"
        )
        return None


def set_threads(threads: int | None) -> None:
    """As many CPU threads as are asked for, else one for each core, unless the user decided."""
    if threads is not None:
        torch.set_num_threads(threads)
    elif hasattr(os, "sched_getaffinity") and not threads_asked_for():
        torch.set_num_threads(usable_cores())


def choose_weights(settings: GenerateConfig, device: torch.device) -> Weights:
    """The dtype weights are held in. Raises: ConfigError for int8 and int4 on a GPU."""
    if settings.weights in ("int8", "int4") and device.type != "cpu":
        raise ConfigError(
            f"'generate.weights' {settings.weights} is for CPUs; use bf16 on this {device.type}"
        )
    if settings.weights != "auto":
        return settings.weights
    return "bf16" if has_bf16_products(device) else "fp32"


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
