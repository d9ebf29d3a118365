"""How a finished run ended, in words."""

import shlex
from pathlib import Path

from lascaux.config.schema import Config
from lascaux.train.loop import Outcome
from lascaux.units import format_duration, format_percent, format_rate


def describe_outcome(outcome: Outcome, config: Config, folder: Path) -> str:
    """Its validation and speed, and what to do next."""
    lines = []
    if outcome.bits_per_byte is not None:
        lines.append(
            f"validation: {outcome.bits_per_byte:.3f} bits per byte, "
            f"{outcome.valid_loss:.3f} nats per token"
        )
    lines.append(
        f"trained {outcome.tokens_seen:,} tokens in {format_duration(outcome.elapsed_seconds)}: "
        f"{format_rate(outcome.tokens_per_second, 'tokens')}, "
        f"MFU {format_percent(outcome.mfu)} of the measured peak (6N + 12LdT FLOPs per token)"
    )
    prompt = next(iter(config.evaluate.sample_prompts), "")
    quoted = shlex.quote(str(folder))
    lines.append(f"next: lascaux generate {quoted} --prompt {shlex.quote(prompt)}")
    lines.append(f"      lascaux report {quoted}")
    return "\n".join(lines)
