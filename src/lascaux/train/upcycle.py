"""Sparse upcycling: a mixture that begins as the dense model it is made from.

Every expert is a copy of the feed-forward layer it replaces, routers are new, and a token's weights
add up to one: whichever experts it visits, the layer computes what it did (Komatsuzaki et al.
2022). The optimizer starts afresh.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from lascaux.checkpoint.files import write_file
from lascaux.checkpoint.load import load_tensors
from lascaux.checkpoint.manifest import read_manifest
from lascaux.checkpoint.save import save_checkpoint, whole_pieces
from lascaux.config.check import check
from lascaux.config.load import build_config, from_tables, overlay, read_flags, to_settings
from lascaux.config.schema import Config, ModelConfig, SourceConfig
from lascaux.data.loader import validation_batches
from lascaux.data.roles import ROLES_FILE, encode_roles, read_roles
from lascaux.data.shards import PreparedData, is_prepared
from lascaux.data.tokenizer import load_tokenizer
from lascaux.errors import CheckpointError, ConfigError
from lascaux.evaluate.perplexity import measure_perplexity
from lascaux.generate.load import find_checkpoint, tokenizer_path
from lascaux.model.accounting import active_parameters, count_parameters
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import zero_state_tensors
from lascaux.parallel.hardware import choose_precision
from lascaux.parallel.layout import Layout
from lascaux.parallel.runtime import this_process
from lascaux.parallel.world import World
from lascaux.train.loop import open_folder, with_precision
from lascaux.train.machine import prepare_device
from lascaux.train.precision import WorkingCopy
from lascaux.train.prepare_data import open_data
from lascaux.train.run_folder import write_config, write_environment
from lascaux.train.state import Run, build_run, check_memory, checkpoint_state
from lascaux.units import format_count

OF_MIXTURES = (
    "num_experts",
    "experts_per_token",
    "num_dense_layers",
    "moe_every",
    "capacity_factor",
    "drop_by",
    "router_score",
    "balance",
    "balance_over",
    "balance_weight",
    "balance_rate",
    "router_z_weight",
    "router_jitter",
)
"""Settings of the model that may differ between the two"""
COMPARED_TOKENS = 65_536


@dataclasses.dataclass(frozen=True, slots=True)
class Upcycled:
    """The new run and how it compares with the model it was made from, both in fp32."""

    run: str
    source: str
    dense_parameters: int
    parameters: int
    active_parameters: int
    tokens: int
    """held-out tokens both were measured on, the first of all there are"""
    dense_loss: float
    loss: float
    seed: int


def upcycle(source: Path, folder: Path, flags: Sequence[str], console: Console) -> Upcycled:
    """A run at step 0 in the new folder `folder`, from the newest intact checkpoint of a run.

    Raises: ConfigError for settings under which the mixture could not begin as the dense model.
    """
    if this_process().world_size > 1:
        raise ConfigError("a model is upcycled by one process; run it without torchrun")
    checkpoint = find_checkpoint(source)
    manifest = read_manifest(checkpoint)
    dense = from_tables(manifest.state["config"], f"{checkpoint}/manifest.json")
    config = mixture_config(dense, flags, checkpoint.resolve().parents[1])
    if (folder / "config.toml").exists():
        raise CheckpointError(f"{folder} is a run already; give --out a new folder")
    device = prepare_device(config.train)
    check_memory(config, device, Layout())
    if config.train.precision == "auto":
        config = with_precision(config, choose_precision(device))
    with ExitStack() as stack:
        open_folder(folder, stack)
        data = open_data(config, folder, console)
        check_tokenizer(data, checkpoint)
        run = build_run(config, folder, console, World(Layout(), 0, device), data)
        weights = load_tensors(checkpoint, "model")
        mixture = spread_weights(run, weights)
        dense_loss = held_out_loss(load_dense(dense.model, weights, device), run)
        loss = held_out_loss(mixture, run)
        data.tokenizer.save(folder / "tokenizer.json")
        roles = read_roles(tokenizer_path(checkpoint).parent, data.tokenizer)
        write_file(folder / ROLES_FILE, [encode_roles(roles, data.tokenizer)])
        parameters = list(run.working.named_parameters())
        tensors = {
            "model": whole_pieces({name: p.detach() for name, p in parameters}),
            "optimizer": whole_pieces(zero_state_tensors(parameters, run.optimizers)),
        }
        write_environment(folder, run.machine)
        save_checkpoint(
            run.checkpoints, step=0, tokens_seen=0, tensors=tensors, state=checkpoint_state(run)
        )
        write_config(folder, config)
        run.note("upcycled", f"from {checkpoint}")
    return Upcycled(
        run=str(folder),
        source=str(checkpoint),
        dense_parameters=count_parameters(dense.model).total,
        parameters=count_parameters(config.model).total,
        active_parameters=active_parameters(config.model),
        tokens=min(COMPARED_TOKENS, data.tokens("valid")),
        dense_loss=dense_loss,
        loss=loss,
        seed=config.train.seed,
    )


def mixture_config(dense: Config, flags: Sequence[str], run: Path) -> Config:
    """The dense run's settings with the flags, its data, and another order of the data."""
    given = read_flags(flags)
    config = build_config(overlay(to_settings(dense), given))
    if "train.seed" not in given:
        train = dataclasses.replace(config.train, seed=dense.train.seed + 1)
        config = dataclasses.replace(config, train=train)
    if "data.sources" not in given and is_prepared(run / "data"):
        data = dataclasses.replace(config.data, sources=(SourceConfig(path=str(run / "data")),))
        config = dataclasses.replace(config, data=data)
    check_begins_equal(dense.model, config.model)
    check(config)
    return config


def check_begins_equal(dense: ModelConfig, mixture: ModelConfig) -> None:
    """Refuse what would make the mixture another function than the dense model.

    Raises: ConfigError naming the setting.
    """
    if dense.num_experts:
        raise ConfigError(
            f"the model has {dense.num_experts} experts already; only dense models are upcycled"
        )
    if not mixture.num_experts:
        raise ConfigError("say how many experts: --model.num_experts=8")
    for field in dataclasses.fields(ModelConfig):
        name, value = field.name, getattr(mixture, field.name)
        if name in OF_MIXTURES or value == getattr(dense, name):
            continue
        if name == "router_normalize" and value:
            continue
        raise ConfigError(
            f"'model.{name}' {value} would make the mixture another function than the dense model, "
            f"which has {getattr(dense, name)}; leave it out"
        )
    if not mixture.normalises_weights:
        raise ConfigError(
            "with one expert for each token its weight is the router's probability, and the "
            "mixture would not begin as the dense model; use --model.experts_per_token=2, or "
            "--model.router_normalize=true, by which the router learns from its losses alone"
        )


def check_tokenizer(data: PreparedData, checkpoint: Path) -> None:
    """Refuse data in other tokens than the dense model's."""
    path = tokenizer_path(checkpoint)
    if load_tokenizer(path).sha256 != data.tokenizer.sha256:
        raise ConfigError(
            f"data.sources has another tokenizer than the model; give the text with "
            f"--tokenizer.path={path}"
        )


@torch.no_grad()
def spread_weights(run: Run, weights: Mapping[str, Tensor]) -> Transformer:
    """Give the run the dense weights: every expert its layer's; routers keep their own.

    `ffn.experts.up.weight` (E, F, D) is E times `ffn.up.weight` (F, D).
    """
    assert isinstance(run.working, WorkingCopy)
    for name, parameter in run.working.named_parameters():
        if ".router." not in name:
            parameter.copy_(weights[name.replace(".experts.", ".")])
    return run.working.model


def load_dense(
    model: ModelConfig, weights: Mapping[str, Tensor], device: torch.device
) -> Transformer:
    """The dense model."""
    with device:
        network = Transformer(model)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name])
    return network


def held_out_loss(model: Transformer, run: Run) -> float:
    """Nats per token on the first held-out tokens, in fp32; NaN where nothing is held out."""
    if run.data.tokens("valid") < 2:
        return float("nan")
    config = run.config
    batches = validation_batches(
        run.data,
        config.train.seq_len,
        config.train.microbatch_seqs,
        COMPARED_TOKENS,
        config.data.document_boundaries,
    )
    return measure_perplexity(model.eval(), batches, run.tokenizer.byte_lengths, run.device).loss


def describe_upcycled(found: Upcycled) -> str:
    """The two models side by side, and what to do next."""
    return "\n".join(
        [
            f"dense    {format_count(found.dense_parameters)} parameters: {found.dense_loss:.5f} "
            f"nats per token ({found.source})",
            f"mixture  {format_count(found.parameters)} parameters "
            f"({format_count(found.active_parameters)} active): {found.loss:.5f} nats per token, "
            f"{found.loss - found.dense_loss:+.1e}",
            f"both in fp32, on the first {found.tokens:,} held-out tokens; the mixture reads the "
            f"data in the order of train.seed {found.seed}",
            f"next: lascaux train --run {shlex.quote(found.run)}",
        ]
    )
