"""A run in memory and on disk: built from its config, restored from and saved to checkpoints."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim import Optimizer

from lascaux.checkpoint.load import (
    check_fits,
    describe_tensors,
    list_checkpoints,
    load_slabs,
    newest_valid,
    verify_checkpoint,
)
from lascaux.checkpoint.manifest import read_manifest
from lascaux.checkpoint.save import free_space_problem
from lascaux.config.check import num_steps
from lascaux.config.load import to_tables
from lascaux.config.schema import Config
from lascaux.data.loader import SampleReader, ShareOfSamples
from lascaux.data.shards import PreparedData
from lascaux.data.tokenizer import Tokenizer
from lascaux.errors import CheckpointError, ConfigError
from lascaux.model.accounting import checkpoint_bytes, count_parameters
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers, load_state_tensors, state_tensors
from lascaux.parallel.accounting import largest_training_state_bytes
from lascaux.parallel.hardware import memory_bytes
from lascaux.parallel.layout import Layout
from lascaux.parallel.network import split_network
from lascaux.parallel.pipeline import PipelineModel
from lascaux.parallel.plan import TIED_COPY
from lascaux.parallel.shards import local, slab_of
from lascaux.parallel.split import SplitModel
from lascaux.parallel.world import World
from lascaux.train.machine import Machine, describe_machine
from lascaux.train.precision import DTYPES, WorkingCopy
from lascaux.train.progress import TrainingProgress
from lascaux.train.run_folder import RunLogs, append_event
from lascaux.train.saving import Save, Saver, own_pieces
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
    reader: ShareOfSamples
    world: World
    working: WorkingCopy | SplitModel | PipelineModel
    optimizers: Sequence[Optimizer]
    saver: Saver
    step: int = 0
    elapsed_seconds: float = 0.0

    @property
    def num_steps(self) -> int:
        """The step at which the run is finished."""
        return num_steps(self.config.train)

    def note(self, event: str, detail: str) -> None:
        """A line in RUN/events.jsonl, written once."""
        if self.world.is_first:
            append_event(self.folder, self.step, event, detail)

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints are."""
        return self.folder / "checkpoints"


def build_run(
    config: Config, folder: Path, console: Console, world: World, data: PreparedData
) -> Run:
    """Model and optimizers at step 0, or this process's part of them."""
    device, train = world.device, config.train
    boundaries = config.data.document_boundaries
    all_samples = SampleReader(data, "train", train.seq_len, train.seed, boundaries)
    layout = world.layout
    reader = ShareOfSamples(
        all_samples, train.microbatch_seqs, world.data_rank, layout.data_parallel
    )
    check_prompts(config, data.tokenizer)
    working: WorkingCopy | SplitModel | PipelineModel
    if world.layout.world_size == 1:
        with device:
            model = Transformer(config.model)
        initialise(model, train.seed)
        working = WorkingCopy(model, train)
    else:
        working = split_network(config, world, DTYPES[train.precision])
    machine = describe_machine(device, train)
    peak = world.add_up(machine.matmul_peak_flops_per_second)
    return Run(
        folder=folder,
        config=config,
        console=console,
        device=device,
        machine=replace(machine, matmul_peak_flops_per_second=peak),
        tokenizer=data.tokenizer,
        data=data,
        reader=reader,
        world=world,
        working=working,
        optimizers=build_optimizers(
            working.named_parameters(), config.optimizer, train.precision, train.deterministic
        ),
        saver=Saver(0),
    )


def check_memory(config: Config, device: torch.device, layout: Layout) -> None:
    """Refuse a model whose weights, gradients and optimizer state alone exceed the memory.

    Raises: ConfigError with both figures.
    """
    needed = largest_training_state_bytes(config, layout)
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
    paths = run.world.tell(list_checkpoints(run.checkpoints) if run.world.is_first else [])
    path, rejected = newest_valid(run.checkpoints, paths, partial(verify_together, run.world))
    for error in rejected:
        run.note("checkpoint rejected", str(error))
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
        run.note("start", run.machine.device_name)
        return
    manifest = read_manifest(path)
    if "imported" in manifest.state and manifest.state["data_identity"] is None:
        load_weights(run, path)
        run.note("start", f"{run.machine.device_name}, from weights imported into {path}")
        return
    if manifest.state["data_identity"] != run.data.identity:
        raise CheckpointError(
            f"the data has changed since {path} was saved: identity "
            f"{manifest.state['data_identity'][:12]} then, {run.data.identity[:12]} now; "
            "bring the old data back, or start a new run with another --run folder"
        )
    if run.world.is_first:
        run.data.check_hashes()
        set_damaged_aside(run, path)
    load_weights(run, path)
    load_state_tensors(
        run.working.named_parameters(),
        run.optimizers,
        describe_tensors(path, "optimizer"),
        partial(load_slabs, path, "optimizer"),
        part=run.world.layout.pp > 1,
    )
    if run.working.scaler.is_enabled():
        run.working.scaler.load_state_dict(dict(manifest.state["scaler"]))
    run.step = manifest.step
    run.saver = Saver(run.step)
    run.elapsed_seconds = manifest.state["elapsed_seconds"]
    run.note("continue", f"{run.machine.device_name}, {run.world.layout.describe()}")


def verify_together(world: World, path: Path) -> None:
    """Each process reads some of the files. Raises: CheckpointError, on all of them alike."""
    problem = None
    try:
        verify_checkpoint(path, world.rank, world.layout.world_size)
    except CheckpointError as error:
        problem = str(error)
    for found in world.gather(problem):
        if found is not None:
            raise CheckpointError(found)


@torch.no_grad()
def load_weights(run: Run, path: Path) -> None:
    """Give the model, or this process's part of it, the weights of a checkpoint of any layout."""
    with torch.device("meta"):
        wanted = dict(Transformer(run.config.model).named_parameters())
    check_fits(wanted, describe_tensors(path, "model"), "model")
    named = {TIED_COPY: "embed.weight"}
    parameters = [(named.get(name, name), p) for name, p in run.working.named_parameters()]
    saved = load_slabs(path, "model", {name: slab_of(p) for name, p in parameters})
    for name, parameter in parameters:
        local(parameter).copy_(saved[name])


def set_damaged_aside(run: Run, resumed: Path) -> None:
    """Rename checkpoints newer than the one resumed from, which are damaged, out of the way."""
    for path in list_checkpoints(run.checkpoints):
        if path == resumed:
            return
        path.rename(path.with_name(f"damaged_{path.name}_{time.time_ns()}"))


def _checkpoint_bytes(run: Run) -> int:
    return checkpoint_bytes(run.config.model, run.config.optimizer.name)


def checkpoint_state(run: Run) -> dict[str, Any]:
    """What a checkpoint knows beside its tensors."""
    return {
        "config": to_tables(run.config),
        "data_identity": run.data.identity,
        "tokenizer_sha256": run.tokenizer.sha256,
        "elapsed_seconds": run.elapsed_seconds,
        "scaler": run.working.scaler.state_dict(),
    }


def begin_save(run: Run, logs: RunLogs, progress: TrainingProgress) -> None:
    """Wait for the last save, copy what this process has, and start writing it."""
    finish_save(run, progress)
    logs.sync()
    parameters = list(run.working.named_parameters())
    background = run.config.checkpoint.background
    optimizer = state_tensors(parameters, run.optimizers)
    save = Save(
        checkpoints=run.checkpoints,
        step=run.step,
        tokens_seen=run.step * run.config.train.batch_tokens,
        keep=run.config.checkpoint.keep,
        pieces=own_pieces(parameters, optimizer, run.world, background),
        state=checkpoint_state(run),
        world=run.world,
        timeout_seconds=run.config.parallel.timeout_seconds,
    )
    run.saver.begin(save)
    if not background:
        finish_save(run, progress)


def finish_save(run: Run, progress: TrainingProgress) -> None:
    """Wait for the save under way, if any; a failure is told, and three in a row stop the run."""
    save = run.saver.wait()
    if save is None:
        return
    if save.warning is not None:
        progress.say(f"old checkpoints stay: {save.warning}")
    if save.problem is None:
        return
    run.note("save failed", save.problem)
    progress.say(f"checkpoint at step {save.step} failed, training goes on: {save.problem}")
    if run.saver.failed_in_a_row >= FAILED_SAVES_IN_A_ROW:
        raise CheckpointError(
            f"{FAILED_SAVES_IN_A_ROW} checkpoints in a row could not be saved; stopping after step "
            f"{run.step} so that no more work is lost. {save.problem}"
        )
