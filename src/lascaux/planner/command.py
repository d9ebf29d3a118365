"""`lascaux plan`: a plan, or the answer to one of the other questions that it can be asked."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lascaux.config.load import load_config, preset_names, to_toml
from lascaux.errors import ConfigError, suggest
from lascaux.planner.devices import device_rows, find_device
from lascaux.planner.money import price_row
from lascaux.planner.plan import Plan, make_plan

Answer = tuple[dict[str, Any], Callable[[], None]]
"""figures for --json, and what prints the same for a person"""
QUESTIONS = ("devices", "scorecard", "check", "deploy", "replicate", "capability")
SHORT = (("device", "plan.device"), ("devices", "plan.devices"), ("tokens", "train.tokens"))


def answer(options: argparse.Namespace, flags: Sequence[str]) -> Answer:
    """What `lascaux plan WORDS` prints."""
    words: list[str] = options.words
    flags = with_short_flags(options, flags)
    match words:
        case ["devices"]:
            return list_devices()
        case ["scorecard"]:
            from rich.console import Console

            from lascaux.planner.scorecard import describe_scorecard, score, scorecard_figures

            with Console(stderr=True).status("predicting every run without it, half a minute"):
                found = score()
            return scorecard_figures(found), lambda: print(describe_scorecard(found))
        case ["check", *rest]:
            return check(rest, flags)
        case ["deploy", *rest] if len(rest) < 2:
            from lascaux.planner.questions import deploy

            return deploy(load_config(rest[0] if rest else None, flags), rest)
        case ["replicate", *rest] if len(rest) < 2:
            from lascaux.planner.questions import replication

            return replication(rest[0] if rest else None, load_config(None, flags))
        case ["capability", *rest] if len(rest) < 2:
            from lascaux.planner.questions import capability

            return capability(rest[0] if rest else "gpt-3", load_config(None, flags))
        case [question, *_] if question in QUESTIONS:
            raise ConfigError(f"`lascaux plan {' '.join(words)}`: {question} takes no more words")
        case [word] if suggest(word, QUESTIONS) and not Path(word).exists() and not is_preset(word):
            raise ConfigError(f"no preset, file or question '{word}'{suggest(word, QUESTIONS)}")
        case [] | [_]:
            return plan_run(words[0] if words else None, flags, options)
        case _:
            raise ConfigError(
                f"`lascaux plan` takes one preset or file; got {' '.join(words)}"
                f"{suggest(words[0], QUESTIONS)}"
            )


def is_preset(word: str) -> bool:
    """Whether a preset has this name or one that is near."""
    return word in preset_names() or bool(suggest(word, preset_names()))


def with_short_flags(options: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """`--device ID --devices N --tokens T` as the settings they stand for."""
    values = [(key, getattr(options, name)) for name, key in SHORT]
    return [*flags, *(f"--{key}={value}" for key, value in values if value is not None)]


def plan_run(target: str | None, flags: Sequence[str], options: argparse.Namespace) -> Answer:
    """The plan of a configuration; written as a file and a picture if asked."""
    from lascaux.planner.describe import print_plan
    from lascaux.planner.figures import plan_figures

    plan = make_plan(load_config(target, flags))
    figures = plan_figures(plan)
    if options.out is not None:
        write_config_file(plan, options.out)
        figures["written"] = str(options.out)
    if options.picture is not None:
        from lascaux.planner.picture import draw_plan

        draw_plan(figures, options.picture)
        figures["picture"] = str(options.picture)

    def show() -> None:
        print_plan(plan, options.why)
        for path in (options.out, options.picture):
            if path is not None:
                print(f"written: {path}")

    return figures, show


def write_config_file(plan: Plan, path: Path) -> None:
    """The configuration of the plan, as `lascaux train FILE` reads it.

    Raises: ConfigError where it cannot be written.
    """
    try:
        path.write_text(to_toml(plan.job.config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def check(words: Sequence[str], flags: Sequence[str]) -> Answer:
    """`plan check CLAIM.toml`, `plan check RUN`, or flags `--claim.…` alone."""
    from lascaux.planner.claim_text import claim_figures, describe_claim, read_claim
    from lascaux.planner.claims import check_claim

    if len(words) > 1:
        raise ConfigError(f"`lascaux plan check` takes one claim; got {' '.join(words)}")
    claim = read_claim(words[0] if words else None, flags)
    findings = check_claim(claim)
    return claim_figures(claim, findings), lambda: print(describe_claim(claim, findings))


def list_devices() -> Answer:
    """The table of accelerators."""
    rows = device_rows()
    shown = [
        f"{row['id']:<22} {row['year']}  "
        + " ".join(
            f"{precision} {row[key]:g}"
            for precision in ("bf16", "fp16", "fp32")
            if (key := f"{precision}_tflops") in row
        )
        + f" TFLOP/s  {row['memory_gb']} GB  {row.get('bandwidth_tb_s', '?')} TB/s  "
        + (f"{price['on_demand_median']:g} $/h ({price['year']})" if price else "no price known")
        for row in rows
        for price in [price_row(find_device(row["id"]), None)]
    ]
    return {"devices": rows}, lambda: print("\n".join(shown))
