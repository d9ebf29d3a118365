"""The training run, from a config to a finished folder; the same call again continues it.

Step s (1-based) trains on samples [(s-1)·B, s·B), B sequences to a batch, so the loader's state is
the step. Weights, order and learning rate are functions of (config, step): a run that was stopped
anywhere and continued ends with the same bits. What a run folder holds: docs/architecture.md.
"""

import dataclasses
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lascaux.checkpoint.lock import RunLock
from lascaux.config.schema import Config
from lascaux.data.loader import Prefetcher, validation_batches
from lascaux.errors import CheckpointError, ConfigError, TrainingStopped
from lascaux.evaluate.perplexity import Perplexity, measure_perplexity, perplexity
from lascaux.generate.continuation import generate_text
from lascaux.model.accounting import active_parameters, count_parameters, flops_per_token
from lascaux.optim.optimizer import set_lr
from lascaux.optim.schedule import lr_fraction
from lascaux.parallel.hardware import Precision, choose_precision
from lascaux.parallel.held_out import sum_over_batches
from lascaux.parallel.layout import resolve_layout
from lascaux.parallel.runtime import this_process
from lascaux.parallel.world import World, connect, is_lost_connection
from lascaux.train.machine import describe_choices, prepare_device
from lascaux.train.plan_file import note_end, write_plan
from lascaux.train.precision import WorkingCopy
from lascaux.train.prepare_data import open_data
from lascaux.train.progress import TrainingProgress
from lascaux.train.run_folder import (
    EXPERT_RECORDS,
    RunLogs,
    StepLog,
    open_logs,
    read_records,
    saved_config,
    settle_config,
    write_config,
    write_environment,
)
from lascaux.train.signals import StopRequest
from lascaux.train.state import Run, begin_save, build_run, check_memory, finish_save, restore
from lascaux.train.step import NonFiniteError, StepResult, is_out_of_memory, split_batch, train_step
from lascaux.train.tracking import NoTracker, make_tracker
from lascaux.units import format_count


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


def train(config: Config, folder: Path, console: Console) -> Outcome:
    """Train to the end of the config, from the newest checkpoint in `folder` if there is one.

    Raises: TrainingStopped on SIGINT or SIGTERM, after saving; LascauxError for what the user can
    mend.
    """
    process = this_process()
    layout = resolve_layout(config, process.world_size)
    device = prepare_device(config.train, process)
    check_memory(config, device, layout)
    if process.world_size > 1:
        connect(device, process, config.parallel.timeout_seconds)
    world = World(layout, process.rank, device)
    if not world.is_first:
        console.quiet = True
    with ExitStack() as stack:
        if world.is_first:
            open_folder(folder, stack)
        world.wait_for_all()
        if config.train.precision == "auto" and (folder / "config.toml").exists():
            config = with_precision(config, saved_config(folder).train.precision)
        if config.train.precision == "auto":
            config = with_precision(config, world.tell(choose_precision(device)))
        elif config.train.precision == "bf16" and choose_precision(device) != "bf16":
            console.print("bf16 gains little or nothing on this device; fp32 may be faster")
        changes = settle_config(folder, config)
        if not world.is_first:
            world.wait_for_all()  # the first process prepares the data
        data = open_data(config, folder, console)
        if world.is_first:
            data.tokenizer.save(folder / "tokenizer.json")
            world.wait_for_all()
        run = build_run(config, folder, console, world, data)
        restore(run)
        if run.step > run.num_steps:
            raise ConfigError(
                f"{folder} has trained {run.step:,} steps, more than the {run.num_steps:,} asked "
                "for now; raise train.steps, or start a new run with another --run folder"
            )
        if world.is_first:
            write_config(folder, config)
            write_environment(folder, run.machine)
        for change in changes:
            run.note("setting changed", change)
            console.print(f"changed at step {run.step}: {change}", markup=False)
        introduce(run)
        begins = run.step == 0 and world.is_first
        tell_plan(run, write_plan(folder, config, run.machine, layout) if begins else None)
        if run.step < run.num_steps:
            try:
                train_steps(run)
            except RuntimeError as error:  # of any collective, in a step or between two
                if is_lost_connection(error):
                    raise world.describe_lost(run.step + 1, error) from error
                raise
            tell_plan(run, note_end(folder, device, run.machine) if world.is_first else None)
        return summarise(run)


def open_folder(folder: Path, stack: ExitStack) -> None:
    """Make the run folder and lock it for as long as the stack is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the run folder {folder}: {error.strerror}") from error
    stack.enter_context(RunLock(folder))


def with_precision(config: Config, precision: Precision) -> Config:
    """The config, computing in this precision."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def introduce(run: Run) -> None:
    """Say in a few lines what is about to happen."""
    config, machine, data = run.config, run.machine, run.data
    parameters = f"{format_count(count_parameters(config.model).total)} parameters"
    if config.model.num_experts:
        parameters += f" ({format_count(active_parameters(config.model))} active)"
    held_out = f"{data.tokens('valid'):,} held out"
    if not data.tokens("valid"):
        held_out = "nothing held out: no validation (more documents, or a larger valid_fraction)"
    lines = [
        f"model    {parameters}: {config.model.num_layers} layers, width "
        f"{config.model.d_model}, vocabulary {config.model.vocab_size:,}",
        f"data     {data.tokens('train'):,} tokens to train on, {held_out}",
        f"machine  {describe_choices(machine)}",
        *layout_lines(run),
    ]
    if run.step >= run.num_steps:
        lines.append(f"run      {run.folder} has finished all {run.num_steps:,} steps")
    elif run.step:
        lines.append(f"run      {run.folder}, continued at step {run.step:,} of {run.num_steps:,}")
    else:
        batch = f"{config.train.batch_tokens:,} tokens"
        lines.append(f"run      {run.folder}, {run.num_steps:,} steps of {batch}")
    for line in lines:
        run.console.print(line, markup=False, highlight=False, soft_wrap=True)


def tell_plan(run: Run, words: str | None) -> None:
    """A line about the plan of the run, or how it turned out."""
    if words is not None:
        run.console.print(f"plan     {words}", markup=False, highlight=False, soft_wrap=True)


def layout_lines(run: Run) -> list[str]:
    """What is split how, where anything is."""
    layout = run.world.layout
    if layout.world_size == 1:
        return []
    return [
        f"layout   {layout.describe()}: {layout.world_size} processes; the peak is that of all of "
        "them; no samples during training"
    ]


def train_steps(run: Run) -> None:
    """Every remaining step: batch, update, now and then validation, samples and a checkpoint."""
    config, train_config = run.config, run.config.train
    batch_seqs = train_config.batch_tokens // train_config.seq_len
    with ExitStack() as stack:
        writes = run.world.is_first
        logs = open_logs(run.folder, run.step, config, writes)
        stack.callback(logs.close)
        tracker = make_tracker(config, run.folder, run.step) if writes else NoTracker()
        stack.callback(tracker.close)
        prefetcher = Prefetcher(run.reader, run.step * batch_seqs, batch_seqs)
        stack.callback(prefetcher.close)
        stack.push(run.saver.wait_unless_cut_off)
        stop = stack.enter_context(StopRequest())
        progress = stack.enter_context(TrainingProgress(run.console, run.step, run.num_steps))
        while run.step < run.num_steps and not run.world.agree(stop.requested):
            run.world.note_step(run.step + 1)
            started = time.perf_counter()
            fraction = lr_fraction(config.schedule, run.step + 1, run.num_steps)
            lr = set_lr(run.optimizers, fraction)
            batch = prefetcher.next()
            try:
                result = train_step(
                    run.working,
                    run.optimizers,
                    split_batch(batch, train_config.microbatch_seqs),
                    world=run.world,
                    grad_clip=config.optimizer.grad_clip,
                    seed=train_config.seed,
                    step=run.step + 1,
                )
            except NonFiniteError as error:
                raise explain_non_finite(run, error, batch_seqs) from error
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise ConfigError(
                    f"out of memory in step {run.step + 1}; try, in this order, half of "
                    "--train.microbatch_seqs, --train.recompute=block, --train.precision=bf16"
                ) from error
            seconds = time.perf_counter() - started
            run.step += 1
            record = step_record(run, result, lr, seconds)
            if is_due(run.step, config.evaluate.every_steps, run.num_steps):
                record |= look(run, logs.samples, progress)
            run.elapsed_seconds += time.perf_counter() - started
            record["elapsed_seconds"] = run.elapsed_seconds
            logs.metrics.append(record)
            note_experts(run, result, logs)
            tracker.log(record)
            progress.step(record)
            if is_due(run.step, config.checkpoint.every_steps, run.num_steps):
                begin_save(run, logs, progress)
        if run.step > run.saver.begun_step:
            begin_save(run, logs, progress)
        finish_save(run, progress)
        run.world.wait_for_all()  # the first process keeps the store by which the others know
        if run.step > run.saver.saved_step:
            raise CheckpointError(
                f"the last checkpoint could not be saved; {run.folder} continues from step "
                f"{run.saver.saved_step} once there is room"
            )
    if run.step < run.num_steps:
        run.note("stopped", "on request")
        raise TrainingStopped(
            f"stopped after step {run.step:,} of {run.num_steps:,}; nothing is lost. "
            f"Continue with the same command, or: lascaux train --run {run.folder}"
        )


def is_due(step: int, every_steps: int, last_step: int) -> bool:
    """Whether something periodic happens after this step; it always does after the last."""
    return step == last_step or (every_steps > 0 and step % every_steps == 0)


def step_record(run: Run, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
    """The line of metrics.jsonl for the step that just ended."""
    tokens = run.config.train.batch_tokens
    tokens_per_second = tokens / seconds
    work = flops_per_token(run.config.model, run.config.train.seq_len) * tokens_per_second
    return {
        "step": run.step,
        "tokens_seen": run.step * tokens,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_second": tokens_per_second,
        "mfu": work / run.machine.matmul_peak_flops_per_second,
        "seconds": seconds,
    } | (result.experts.record() if result.experts is not None else {})


def note_experts(run: Run, result: StepResult, logs: RunLogs) -> None:
    """The load of each expert, now and then."""
    if result.experts is not None and is_due(
        run.step, max(1, run.num_steps // EXPERT_RECORDS), run.num_steps
    ):
        load = [[round(share, 3) for share in layer] for layer in result.experts.load]
        logs.experts.append({"step": run.step, "load": load})


def look(run: Run, samples: StepLog, progress: TrainingProgress) -> dict[str, float]:
    """Validate and sample; returns what to add to the step's record."""
    evaluate = run.config.evaluate
    last = run.step == run.num_steps
    found: dict[str, float] = {}
    if run.data.tokens("valid") > 1:
        result = validate(run, evaluate.final_max_tokens if last else evaluate.max_tokens)
        found = {"valid_loss": result.loss, "bits_per_byte": result.bits_per_byte}
        progress.say(
            f"step {run.step:,} · validation {result.bits_per_byte:.3f} bits per byte "
            f"({result.loss:.3f} nats per token, {result.tokens:,} tokens)"
        )
    if isinstance(run.working, WorkingCopy):  # a split model is sampled with `lascaux generate`
        settings = dataclasses.replace(run.config.generate, max_tokens=evaluate.sample_tokens)
        for prompt in evaluate.sample_prompts:
            model = run.working.model
            text = generate_text(model, run.tokenizer, prompt, settings, device=run.device)
            samples.append({"step": run.step, "prompt": prompt, "text": text})
            progress.quote(prompt + text)
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
    byte_lengths = run.tokenizer.byte_lengths
    if not isinstance(run.working, WorkingCopy):
        listed = list(batches)
        nats = sum_over_batches(run.working, run.world, listed, train_config.microbatch_seqs)
        return perplexity(nats, listed, byte_lengths)
    run.working.refresh()
    return measure_perplexity(run.working.network, batches, byte_lengths, run.device)


def explain_non_finite(run: Run, error: NonFiniteError, batch_seqs: int) -> NonFiniteError:
    """The same error with step, samples and what to try."""
    first = run.step * batch_seqs
    last = first + batch_seqs - 1
    run.note("not finite", str(error))
    return NonFiniteError(
        f"step {run.step + 1} was not taken: {error}. Samples {first} to {last}, learning rate "
        f"{run.optimizers[0].param_groups[0]['lr']:.3g}. Weights and optimizer are "
        f"as after step {run.step}; the checkpoints are untouched. Try a lower "
        "--optimizer.lr, a longer --schedule.warmup_steps or --train.precision=fp32"
    )


def summarise(run: Run) -> Outcome:
    """The figures of a finished run, from its own records."""
    records = read_records(run.folder / "metrics.jsonl")
    if not records:
        raise CheckpointError(
            f"{run.folder} is trained, but its metrics.jsonl is gone; the model in "
            f"{run.checkpoints} is intact"
        )
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
