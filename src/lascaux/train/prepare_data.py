"""Opening or preparing data with a progress bar, for `train` and `prepare`."""

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lascaux.config.schema import Config, SourceConfig
from lascaux.data.for_run import prepare_for_run
from lascaux.data.prepare import PrepareSummary, prepare
from lascaux.data.shards import PreparedData
from lascaux.units import format_bytes, format_duration


def open_data(config: Config, run: Path, console: Console) -> PreparedData:
    """The data of a run, prepared into RUN/data the first time if it is raw text."""
    vocab_size = config.model.vocab_size
    with reading_progress(console) as on_bytes:
        data = prepare_for_run(config.data, config.tokenizer, vocab_size, run / "data", on_bytes)
    for reason, count in sorted(data.excluded.items()):
        console.print(f"left out: {count:,} x {reason}", highlight=False)
    return data


def prepare_sources(
    config: Config, sources: Sequence[SourceConfig], out: Path, console: Console
) -> PrepareSummary:
    """`lascaux prepare`: the sources into the new folder `out`."""
    data = dataclasses.replace(config.data, sources=tuple(sources))
    with reading_progress(console) as on_bytes:
        return prepare(data, config.tokenizer, config.model.vocab_size, out, progress=on_bytes)


@contextmanager
def reading_progress(console: Console) -> Iterator[Callable[[int, int | None], None]]:
    """A bar of bytes read and time left in a terminal; yields what to call with both counts."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("reading text", total=None)

        def on_bytes(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield on_bytes


def describe_preparation(summary: PrepareSummary) -> str:
    """The summary of `prepare` in words."""
    text, seconds = format_bytes(summary.text_bytes), format_duration(summary.seconds)
    speed = format_bytes(summary.text_bytes / max(summary.seconds, 1e-9))
    lines = [
        f"{summary.folder}: {text} of text from {summary.files:,} files in {seconds} ({speed}/s)",
        f"train       {summary.train_documents:,} documents, {summary.train_tokens:,} tokens",
        f"validation  {summary.valid_documents:,} documents, {summary.valid_tokens:,} tokens",
    ]
    if not summary.valid_tokens:
        lines.append(
            "            nothing is held out: give more documents or raise --data.valid_fraction"
        )
    for reason, count in sorted(summary.excluded.items()):
        lines.append(f"left out    {count:,} x {reason} (excluded.jsonl lists them)")
    lines.append(
        f"next: lascaux train --data.sources={shlex.quote(str(summary.folder))} "
        f"--model.vocab_size={summary.vocab_size}"
    )
    return "\n".join(lines)
