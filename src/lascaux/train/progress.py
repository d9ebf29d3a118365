"""What a person sees while a run trains: one live line in a terminal, plain lines in a log file."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from lascaux.units import format_duration, format_percent, format_rate

SECONDS_BETWEEN_LINES = 15.0


class TrainingProgress:
    """Loss, speed, MFU and time left, updated after each step."""

    def __init__(self, console: Console, step: int, num_steps: int) -> None:
        self.console = console
        self._num_steps = num_steps
        self._first_step = step
        self._started = self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            expand=True,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task(
            "training", total=num_steps, completed=step, figures=""
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._progress.stop()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show the record of the step that just ended."""
        figures = (
            f"loss {record['loss']:.3f} · {format_rate(record['tokens_per_second'], 'tokens')}"
            f" · MFU {format_percent(record['mfu'])}"
        )
        step = record["step"]
        if self.console.is_terminal:
            self._progress.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._num_steps:
            per_step = (now - self._started) / (step - self._first_step)
            left = format_duration(per_step * (self._num_steps - step))
            self.say(f"step {step}/{self._num_steps} · {figures} · {left} left")
            self._last_line = now

    def say(self, text: str) -> None:
        """A line above the live one; the text is shown as it is."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def quote(self, text: str) -> None:
        """Sampled text, set apart from messages."""
        for line in text.splitlines()[:12]:
            self.console.print(f"  [dim]│[/dim] {escape(line)}", highlight=False, soft_wrap=True)
