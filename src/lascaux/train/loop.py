"""The training run, from a config to a finished folder; the same call again continues it.

Step s (1-based) trains on samples [(s-1)·B, s·B), B sequences to a batch, so the loader's state is
the step. Weights, order and learning rate are functions of (config, step): a run that was stopped
anywhere and continued ends with the same bits. What a run folder holds: docs/architecture.md.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim import Optimizer

from lascaux.checkpoint.load import copy_into, load_tensors, newest_valid
from lascaux.checkpoint.lock import RunLock
from lascaux.checkpoint.manifest import read_manifest
from lascaux.checkpoint.save import free_space_problem, remove_old, save_checkpoint
from lascaux.config.check import num_steps
from lascaux.config.load import to_tables
from lascaux.config.schema import Config
from lascaux.data.loader import Prefetcher, SampleReader, validation_batches
from lascaux.data.shards import PreparedData
from lascaux.data.tokenizer import Tokenizer
from lascaux.errors import CheckpointError, TrainingStopped
from lascaux.evaluate.perplexity import Perplexity, measure_perplexity
from lascaux.generate.engine import generate_text
from lascaux.model.accounting import checkpoint_bytes, count_parameters, flops_per_token
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers, load_state_tensors, set_lr, state_tensors
from lascaux.optim.schedule import lr_fraction
from lascaux.train.machine import Machine, choose_device, describe_machine
from lascaux.train.prepare_data import open_data
from lascaux.train.progress import TrainingProgress
from lascaux.train.run_folder import (
    StepLog,
    append_event,
    settle_config,
    write_config,
    write_environment,
)
from lascaux.train.signals import StopRequest
from lascaux.train.step import (
    NonFiniteError,
    precision_context,
    recompute_blocks,
    split_batch,
    train_step,
)
from lascaux.train.tracking import make_tracker
from lascaux.units import format_bytes, format_count, format_duration, format_flops_per_second

FAILED_SAVES_IN_A_ROW = 3
ROOM_FOR_CHECKPOINTS = 2.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a finished run ended; what `lascaux train --json` prints."""

    run: str
    parameters: int
    steps: int
    tokens_seen: int
    loss: float
    valid_loss: float | None
    bits_per_byte: float | None
    elapsed_seconds: float
    tokens_per_second: float
    mfu: float


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
    model: Transformer
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


def train(config: Config, folder: Path, console: Console) -> Outcome:
    """Train to the end of the config, from the newest checkpoint in `folder` if there is one.

    Raises: TrainingStopped on SIGINT or SIGTERM, after saving; LascauxError for what the user can
    mend.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the run folder {folder}: {error.strerror}") from error
        stack.enter_context(RunLock(folder))
        changes = settle_config(folder, config)
        device = choose_device(config.train)
        data = open_data(config, folder, console)
        run = build_run(config, folder, console, device, data)
        restore(run)
        write_config(folder, config)
        write_environment(folder, run.machine)
        for change in changes:
            append_event(folder, run.step, "setting changed", change)
            console.print(f"changed at step {run.step}: {change}", markup=False)
        introduce(run)
        if run.step < run.num_steps:
            train_steps(run)
        return summarise(run)


def build_run(
    config: Config, folder: Path, console: Console, device: torch.device, data: PreparedData
) -> Run:
    """Model and optimizers at step 0, on the device."""
    with device:
        model = Transformer(config.model)
    initialise(model, config.train.seed)
    if config.train.recompute == "block":
        recompute_blocks(model)
    return Run(
        folder=folder,
        config=config,
        console=console,
        device=device,
        machine=describe_machine(device, config.train.precision),
        tokenizer=data.tokenizer,
        data=data,
        model=model,
        optimizers=build_optimizers(model, config.optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16"),
    )


def restore(run: Run) -> None:
    """Bring the run to the newest checkpoint that verifies, or leave it at step 0."""
    path, rejected = newest_valid(run.checkpoints)
    for error in rejected:
        append_event(run.folder, run.step, "checkpoint rejected", str(error))
        run.console.print(f"passing over a damaged checkpoint: {error}", markup=False)
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
    parameters = dict(run.model.named_parameters())
    copy_into({n: p.data for n, p in parameters.items()}, load_tensors(path, "model"), "model")
    load_state_tensors(run.model, run.optimizers, load_tensors(path, "optimizer"))
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(dict(manifest.state["scaler"]))
    run.step = manifest.step
    run.elapsed_seconds = manifest.state["elapsed_seconds"]
    append_event(run.folder, run.step, "continue", run.machine.device_name)


def _checkpoint_bytes(run: Run) -> int:
    return checkpoint_bytes(run.config.model, run.config.optimizer.name)


def introduce(run: Run) -> None:
    """Say in three lines what is about to happen."""
    config, machine, data = run.config, run.machine, run.data
    parameters = format_count(count_parameters(config.model).total)
    peak = format_flops_per_second(machine.matmul_peak_flops_per_second)
    lines = [
        f"model    {parameters} parameters: {config.model.num_layers} layers, width "
        f"{config.model.d_model}, vocabulary {config.model.vocab_size:,}",
        f"data     {data.num_tokens('train'):,} tokens to train on, "
        f"{data.num_tokens('valid'):,} held out",
        f"machine  {machine.device_name}, {machine.threads} threads, {machine.precision}, measured "
        f"matrix-multiply peak {peak}",
    ]
    if run.step >= run.num_steps:
        lines.append(f"run      {run.folder} has finished all {run.num_steps:,} steps")
    elif run.step:
        lines.append(f"run      {run.folder}, continued at step {run.step:,} of {run.num_steps:,}")
    else:
        lines.append(
            f"run      {run.folder}, {run.num_steps:,} steps of {config.train.batch_tokens:,} tokens"
        )
    for line in lines:
        run.console.print(line, markup=False, highlight=False, soft_wrap=True)


def train_steps(run: Run) -> None:
    """Every remaining step: batch, update, now and then validation, samples and a checkpoint."""
    config, train_config = run.config, run.config.train
    batch_seqs = train_config.batch_tokens // train_config.seq_len
    reader = SampleReader(
        run.data,
        "train",
        train_config.seq_len,
        train_config.seed,
        config.data.document_boundaries,
        [source.weight for source in config.data.sources],
    )
    forward = torch.compile(run.model) if train_config.compile else run.model
    with ExitStack() as stack:
        metrics = StepLog(run.folder / "metrics.jsonl", run.step)
        stack.callback(metrics.close)
        samples = StepLog(run.folder / "samples.jsonl", run.step)
        stack.callback(samples.close)
        tracker = make_tracker(config, run.folder, run.step)
        stack.callback(tracker.close)
        prefetcher = Prefetcher(reader, run.step * batch_seqs, batch_seqs)
        stack.callback(prefetcher.close)
        stop = stack.enter_context(StopRequest())
        progress = stack.enter_context(TrainingProgress(run.console, run.step, run.num_steps))
        saved_step = run.step
        while run.step < run.num_steps and not stop.requested:
            started = time.perf_counter()
            fraction = lr_fraction(config.schedule, run.step + 1, run.num_steps)
            lr = set_lr(run.optimizers, fraction)
            batch = prefetcher.next()
            try:
                result = train_step(
                    run.model,
                    forward,
                    run.optimizers,
                    split_batch(batch, train_config.microbatch_seqs),
                    device=run.device,
                    precision=train_config.precision,
                    grad_clip=config.optimizer.grad_clip,
                    scaler=run.scaler,
                )
            except NonFiniteError as error:
                raise explain_non_finite(run, error, batch_seqs) from error
            seconds = time.perf_counter() - started
            run.step += 1
            record = step_record(run, result.loss, lr, result.grad_norm, seconds)
            if is_due(run.step, config.evaluate.every_steps, run.num_steps):
                record |= look(run, samples, progress)
            run.elapsed_seconds += time.perf_counter() - started
            record["elapsed_seconds"] = run.elapsed_seconds
            metrics.append(record)
            tracker.log(record)
            progress.step(record)
            if is_due(run.step, config.checkpoint.every_steps, run.num_steps):
                if save(run, metrics, samples, progress):
                    saved_step = run.step
        if run.step > saved_step and not save(run, metrics, samples, progress):
            raise CheckpointError(
                f"the last checkpoint could not be saved; {run.folder} continues from step "
                f"{saved_step} once there is room"
            )
    if run.step < run.num_steps:
        append_event(run.folder, run.step, "stopped", "on request")
        raise TrainingStopped(
            f"stopped after step {run.step:,} of {run.num_steps:,}; nothing is lost. "
            f"Continue with the same command, or: lascaux train --run {run.folder}"
        )


def is_due(step: int, every_steps: int, last_step: int) -> bool:
    """Whether something periodic happens after this step; it always does after the last."""
    return step == last_step or (every_steps > 0 and step % every_steps == 0)


def step_record(
    run: Run, loss: float, lr: float, grad_norm: float, seconds: float
) -> dict[str, Any]:
    """The line of metrics.jsonl for the step that just ended."""
    tokens = run.config.train.batch_tokens
    tokens_per_second = tokens / seconds
    work = flops_per_token(run.config.model, run.config.train.seq_len) * tokens_per_second
    return {
        "step": run.step,
        "tokens_seen": run.step * tokens,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_second": tokens_per_second,
        "mfu": work / run.machine.matmul_peak_flops_per_second,
        "seconds": seconds,
    }


def look(run: Run, samples: StepLog, progress: TrainingProgress) -> dict[str, float]:
    """Validate and sample; returns what to add to the step's record."""
    evaluate = run.config.evaluate
    run.model.eval()
    last = run.step == run.num_steps
    found: dict[str, float] = {}
    if run.data.num_tokens("valid") > 1:
        result = validate(run, evaluate.final_max_tokens if last else evaluate.max_tokens)
        found = {"valid_loss": result.loss, "bits_per_byte": result.bits_per_byte}
        progress.say(
            f"step {run.step:,} · validation {result.bits_per_byte:.3f} bits per byte "
            f"({result.loss:.3f} nats per token, {result.tokens:,} tokens)"
        )
    settings = dataclasses.replace(run.config.generate, max_tokens=evaluate.sample_tokens)
    for prompt in evaluate.sample_prompts:
        text = generate_text(run.model, run.tokenizer, prompt, settings, device=run.device)
        samples.append({"step": run.step, "prompt": prompt, "text": text})
        progress.quote(prompt + text)
    run.model.train()
    return found


def validate(run: Run, max_tokens: int | None) -> Perplexity:
    """Perplexity over the first `max_tokens` held-out tokens, or all of them."""
    train_config = run.config.train
    batches = validation_batches(
        run.data,
        train_config.seq_len,
        train_config.microbatch_seqs,
        max_tokens,
        run.config.data.document_boundaries,
    )
    precision = precision_context(run.device, train_config.precision)
    return measure_perplexity(
        run.model, batches, run.tokenizer.byte_lengths, run.device, precision
    )


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
        remove_old(run.checkpoints, run.config.checkpoint.keep)
    except CheckpointError as error:
        run.failed_saves += 1
        progress.say(f"checkpoint at step {run.step} failed, training goes on: {error}")
        if run.failed_saves >= FAILED_SAVES_IN_A_ROW:
            raise CheckpointError(
                f"{run.failed_saves} checkpoints in a row could not be saved; stopping at step "
                f"{run.step} so that no more work is lost. {error}"
            ) from error
        return False
    run.failed_saves = 0
    return True


def explain_non_finite(run: Run, error: NonFiniteError, batch_seqs: int) -> NonFiniteError:
    """The same error with step, samples and what to try."""
    first = run.step * batch_seqs
    append_event(run.folder, run.step, "not finite", str(error))
    return NonFiniteError(
        f"step {run.step + 1} was not taken: {error}. Samples {first} to {first + batch_seqs - 1}, "
        f"learning rate {run.optimizers[0].param_groups[0]['lr']:.3g}. Weights and optimizer are "
        f"as after step {run.step}; the checkpoints in {run.checkpoints} are untouched. Try a lower "
        "--optimizer.lr, a longer --schedule.warmup_steps or --train.precision=fp32"
    )


def summarise(run: Run) -> Outcome:
    """The figures of a finished run, from its own records."""
    from lascaux.train.run_folder import read_records

    records = read_records(run.folder / "metrics.jsonl")
    last = records[-1]
    speeds = sorted(record["tokens_per_second"] for record in records)
    tokens_per_second = speeds[len(speeds) // 2]
    work = flops_per_token(run.config.model, run.config.train.seq_len) * tokens_per_second
    return Outcome(
        run=str(run.folder),
        parameters=count_parameters(run.config.model).total,
        steps=run.step,
        tokens_seen=last["tokens_seen"],
        loss=last["loss"],
        valid_loss=last.get("valid_loss"),
        bits_per_byte=last.get("bits_per_byte"),
        elapsed_seconds=last["elapsed_seconds"],
        tokens_per_second=tokens_per_second,
        mfu=work / run.machine.matmul_peak_flops_per_second,
    )
