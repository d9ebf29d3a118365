"""A run in memory and on disk: built from its config, restored from and saved to checkpoints."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.optim import Optimizer

from lascaux.checkpoint.load import copy_into, list_checkpoints, load_tensors, newest_valid
from lascaux.checkpoint.manifest import read_manifest
from lascaux.checkpoint.save import free_space_problem, remove_old, save_checkpoint
from lascaux.config.check import num_steps
from lascaux.config.load import to_tables
from lascaux.config.schema import Config
from lascaux.data.loader import SampleReader
from lascaux.data.shards import PreparedData
from lascaux.data.tokenizer import Tokenizer
from lascaux.errors import CheckpointError, ConfigError
from lascaux.model.accounting import checkpoint_bytes, count_parameters, training_state_bytes
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers, load_state_tensors, state_tensors
from lascaux.train.machine import Machine, describe_machine, memory_bytes
from lascaux.train.precision import WorkingCopy
from lascaux.train.progress import TrainingProgress
from lascaux.train.run_folder import StepLog, append_event
from lascaux.units import format_bytes, format_count

FAILED_SAVES_IN_A_ROW = 3
ROOM_FOR_CHECKPOINTS = 2.2  # two checkpoints and some


@dataclass(kw_only=True, slots=True)
class Run:
    """Everything that is alive while a run trains."""

    folder: Path
    config: Config
    console: Console
    device: torch.device
    machine: Machine
    tokenizer: Tokenizer
    data: PreparedData
    reader: SampleReader
    model: Transformer
    working: WorkingCopy
    optimizers: Sequence[Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0
    elapsed_seconds: float = 0.0
    failed_saves: int = 0

    @property
    def num_steps(self) -> int:
        """The step at which the run is finished."""
        return num_steps(self.config.train)

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints are."""
        return self.folder / "checkpoints"


def build_run(
    config: Config, folder: Path, console: Console, device: torch.device, data: PreparedData
) -> Run:
    """Model and optimizers at step 0, on the device."""
    reader = SampleReader(
        data,
        "train",
        config.train.seq_len,
        config.train.seed,
        config.data.document_boundaries,
    )
    check_prompts(config, data.tokenizer)
    with device:
        model = Transformer(config.model)
    initialise(model, config.train.seed)
    return Run(
        folder=folder,
        config=config,
        console=console,
        device=device,
        machine=describe_machine(device, config.train),
        tokenizer=data.tokenizer,
        data=data,
        reader=reader,
        model=model,
        working=WorkingCopy(model, config.train),
        optimizers=build_optimizers(model, config.optimizer, config.train.precision),
        scaler=torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16"),
    )


def check_memory(config: Config, device: torch.device) -> None:
    """Refuse a model whose weights, gradients and optimizer state alone exceed the memory.

    Raises: ConfigError with both figures.
    """
    needed = training_state_bytes(config.model, config.optimizer.name)
    memory = memory_bytes(device)
    if needed > memory:
        parameters = format_count(count_parameters(config.model).total)
        raise ConfigError(
            f"the model has {parameters} parameters: weights, gradients and optimizer state take "
            f"{format_bytes(needed)}, this {device.type} device has {format_bytes(memory)}; choose "
            "a smaller preset, or lower model.num_layers or model.d_model"
        )


def check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Refuse a sample prompt that would stop the run at its first sample."""
    for prompt in config.evaluate.sample_prompts:
        length = len(tokenizer.encode(prompt))
        if length >= config.model.max_context:
            raise ConfigError(
                f"'evaluate.sample_prompts' has a prompt of {length} tokens; it must be shorter "
                f"than model.max_context {config.model.max_context}"
            )


def restore(run: Run) -> None:
    """Bring the run to the newest checkpoint that verifies, or leave it at step 0."""
    path, rejected = newest_valid(run.checkpoints)
    for error in rejected:
        append_event(run.folder, run.step, "checkpoint rejected", str(error))
        run.console.print(
            f"passing over a damaged checkpoint: {error}", markup=False, soft_wrap=True
        )
    if path is None:
        if rejected:
            raise CheckpointError(
                f"no checkpoint in {run.checkpoints} is intact; to start again from step 0, move "
                f"that folder away.\n{rejected[0]}"
            )
        needed = int(ROOM_FOR_CHECKPOINTS * _checkpoint_bytes(run))
        problem = free_space_problem(run.folder, needed)
        if problem is not None:
            raise CheckpointError(problem)
        append_event(run.folder, 0, "start", run.machine.device_name)
        return
    manifest = read_manifest(path)
    if manifest.state["data_identity"] != run.data.identity:
        raise CheckpointError(
            f"the data has changed since {path} was saved: identity "
            f"{manifest.state['data_identity'][:12]} then, {run.data.identity[:12]} now; "
            "bring the old data back, or start a new run with another --run folder"
        )
    run.data.check_hashes()
    set_damaged_aside(run, path)
    parameters = dict(run.model.named_parameters())
    copy_into({n: p.data for n, p in parameters.items()}, load_tensors(path, "model"), "model")
    load_state_tensors(run.model, run.optimizers, load_tensors(path, "optimizer"))
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(dict(manifest.state["scaler"]))
    run.step = manifest.step
    run.elapsed_seconds = manifest.state["elapsed_seconds"]
    append_event(run.folder, run.step, "continue", run.machine.device_name)


def set_damaged_aside(run: Run, resumed: Path) -> None:
    """Rename checkpoints newer than the one resumed from, which are damaged, out of the way."""
    for path in list_checkpoints(run.checkpoints):
        if path == resumed:
            return
        path.rename(path.with_name(f"damaged_{path.name}_{time.time_ns()}"))


def _checkpoint_bytes(run: Run) -> int:
    return checkpoint_bytes(run.config.model, run.config.optimizer.name)


def save(run: Run, metrics: StepLog, samples: StepLog, progress: TrainingProgress) -> bool:
    """Write a checkpoint; a failure is told and the run goes on, until three fail in a row."""
    state = {
        "config": to_tables(run.config),
        "data_identity": run.data.identity,
        "tokenizer_sha256": run.tokenizer.sha256,
        "elapsed_seconds": run.elapsed_seconds,
        "scaler": run.scaler.state_dict(),
    }
    tensors = {
        "model": {name: p.detach() for name, p in run.model.named_parameters()},
        "optimizer": state_tensors(run.model, run.optimizers),
    }
    metrics.sync()
    samples.sync()
    try:
        save_checkpoint(
            run.checkpoints,
            step=run.step,
            tokens_seen=run.step * run.config.train.batch_tokens,
            tensors=tensors,
            state=state,
        )
    except CheckpointError as error:
        run.failed_saves += 1
        append_event(run.folder, run.step, "save failed", str(error))
        progress.say(f"checkpoint at step {run.step} failed, training goes on: {error}")
        if run.failed_saves >= FAILED_SAVES_IN_A_ROW:
            raise CheckpointError(
                f"{run.failed_saves} checkpoints in a row could not be saved; stopping at step "
                f"{run.step} so that no more work is lost. {error}"
            ) from error
        return False
    run.failed_saves = 0
    try:
        remove_old(run.checkpoints, run.config.checkpoint.keep)
    except CheckpointError as error:
        progress.say(f"old checkpoints stay: {error}")
    return True
