"""What each command does: one function for each, heavy imports inside it.

Figures and text go to stdout, everything else to stderr; the number returned is the exit code.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lascaux.config.load import (
    DEFAULT_PRESET,
    load_config,
    preset_header,
    preset_names,
    read_flags,
    to_tables,
    to_toml,
)
from lascaux.config.schema import SourceConfig
from lascaux.errors import ConfigError, LascauxError
from lascaux.parallel.runtime import this_process

if TYPE_CHECKING:
    from rich.console import Console

EXIT_MEND = 2


def stderr_console() -> "Console":
    """Where progress and messages go; training goes on when nobody reads them any more."""
    from rich.console import Console

    class EnduringConsole(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True

    return EnduringConsole(stderr=True, emoji=False)


def print_json(value: object) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, default=str))


def train_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux train`."""
    from lascaux.train.describe import describe_outcome
    from lascaux.train.loop import train

    name = Path(options.target or DEFAULT_PRESET).name.removesuffix(".toml")
    folder: Path = options.run or Path("runs") / name
    saved = folder / "config.toml"
    continues = options.target is None and saved.exists()
    config = load_config(str(saved) if continues else options.target, flags)
    outcome = train(config, folder, stderr_console())
    if this_process().rank > 0:
        return 0
    if options.json:
        print_json(dataclasses.asdict(outcome))
        return 0
    print(describe_outcome(outcome, config, folder))
    return 0


def prepare_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux prepare`."""
    from lascaux.train.prepare_data import describe_preparation, prepare_sources

    for key in read_flags(flags):
        if key == "data.sources":
            raise ConfigError("give the sources as arguments: lascaux prepare SOURCE… --out DIR")
        if key != "model.vocab_size" and not key.startswith(("data.", "tokenizer.")):
            raise ConfigError(
                f"--{key} has no effect on preparing; settings here: --data.…, --tokenizer.…, "
                "--model.vocab_size"
            )
    config = load_config(None, flags)
    sources = [SourceConfig(path=path, text_field=options.text_field) for path in options.sources]
    summary = prepare_sources(config, sources, options.out, stderr_console())
    if options.json:
        print_json(dataclasses.asdict(summary))
    else:
        print(describe_preparation(summary))
    return 0


def generate_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux generate`: text to stdout as it is made."""
    from lascaux.generate.continuation import generate
    from lascaux.generate.load import load_for_generation

    loaded = load_for_generation(options.source, flags)
    pieces = []
    stream = generate(loaded, options.prompt, loaded.settings)
    if not options.json:
        print(options.prompt, end="", flush=True)
    for piece in stream:
        pieces.append(piece)
        if not options.json:
            print(piece.text, end="", flush=True)
    outcome = pieces[-1].outcome
    if outcome.error is not None:
        raise LascauxError(outcome.error)
    if options.json:
        seconds = outcome.prompt_seconds + outcome.drawing_seconds
        figures = {
            "prompt": options.prompt,
            "text": "".join(piece.text for piece in pieces),
            "finish_reason": outcome.finish_reason,
            "prompt_tokens": outcome.prompt_tokens,
            "tokens": outcome.drawn_tokens,
            "tokens_per_second": outcome.drawn_tokens / seconds,
            "weights": loaded.precision,
            "drafted_tokens": outcome.drafted_tokens,
            "accepted_tokens": outcome.accepted_tokens,
        }
        print_json(figures)
    else:
        print()
    return 0


def serve_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux serve`; with --json the figures of the start go to stdout once it is ready."""
    from lascaux.serve.run import serve

    def report(figures: dict[str, object]) -> None:
        print(json.dumps(figures), flush=True)

    if options.json:
        serve(options.source, flags, stderr_console(), port=options.port, report=report)
    else:
        serve(options.source, flags, stderr_console(), port=options.port)
    return 0


def bench_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux bench`: speeds to stdout, progress to stderr."""
    from lascaux.bench.command import bench_figures, check_bench_flags, describe_bench
    from lascaux.bench.run import run_bench

    if options.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1; got {options.rounds}")
    check_bench_flags(options.what, flags)
    config = load_config(options.target, flags)
    speed = run_bench(options.what, config, options.rounds, stderr_console())
    print_json(bench_figures(speed)) if options.json else print(describe_bench(speed))
    return 0


def prove_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux prove`; exits 1 when the layout trains another model."""
    from lascaux.prove.command import run_dry, run_prove

    config = load_config(options.target, flags)
    if options.dry_run:
        found = run_dry(config, options.processes, stderr_console(), options.json)
        agrees = True
    else:
        found, agrees = run_prove(config, options.processes, stderr_console(), options.json)
    if found is not None:
        print_json(found) if options.json else print(found)
    return 0 if agrees else 1


def plan_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux plan`."""
    from lascaux.planner.command import answer, with_short_flags

    if options.probe:
        from lascaux.bench.probe import probe

        target = options.words[0] if options.words else None
        probe(load_config(target, with_short_flags(options, flags)), stderr_console())
    figures, show = answer(options, flags)
    print_json(figures) if options.json else show()
    return 0


def compare_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux compare`."""
    from lascaux.compare.command import run_compare

    table, figures = run_compare(
        options.target,
        flags,
        options.run,
        options.seeds,
        options.runs_at_once,
        stderr_console(),
    )
    if options.json:
        print_json(figures)
    else:
        print(table)
        print(f"picture: {figures['picture']}")
    return 0


def upcycle_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux upcycle`."""
    from lascaux.train.upcycle import describe_upcycled, upcycle

    found = upcycle(options.source, options.out, flags, stderr_console())
    print_json(dataclasses.asdict(found)) if options.json else print(describe_upcycled(found))
    return 0


def import_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux import`."""
    from lascaux.exchange.importing import describe_import, import_folder

    found = import_folder(options.source, options.out, stderr_console(), flags)
    print_json(dataclasses.asdict(found)) if options.json else print(describe_import(found))
    return 0


def export_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux export`."""
    from lascaux.exchange.exporting import describe_export, export_folder

    refuse_flags(flags, "export")
    found = export_folder(options.source, options.out, stderr_console(), options.dtype)
    print_json(dataclasses.asdict(found)) if options.json else print(describe_export(found))
    return 0


def report_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux report`."""
    from lascaux.report.html import write_report

    refuse_flags(flags, "report")
    path = write_report(options.source)
    if options.json:
        print_json({"report": str(path)})
    else:
        print(path)
    return 0


def verify_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux verify`; exits 2 when anything is damaged."""
    from lascaux.train.verify import verify_all

    refuse_flags(flags, "verify")
    findings = verify_all(options.source)
    damaged = [finding for finding in findings if not finding.ok]
    if options.json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'DAMAGED'}  {finding.path}  {finding.detail}")
        print(f"{len(findings) - len(damaged)} of {len(findings)} intact")
    return EXIT_MEND if damaged else 0


def config_command(options: argparse.Namespace, flags: list[str]) -> int:
    """`lascaux config`."""
    if options.list:
        for name in preset_names():
            print(f"{preset_header(name)}\n")
        return 0
    config = load_config(options.target, flags)
    if options.json:
        print_json(to_tables(config))
    else:
        print(to_toml(config), end="")
    return 0


def refuse_flags(flags: Sequence[str], command: str) -> None:
    """Settings on a command that reads none are an error."""
    if flags:
        raise ConfigError(f"`lascaux {command}` takes no settings; got {flags[0]}")
