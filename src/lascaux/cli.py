"""The command line: one function for each command, heavy imports inside it.

Exit codes: 0 done, 2 the user can mend it, 75 stopped before the end and resumable, 1 our bug.
Figures and text go to stdout, everything else to stderr.
"""

import argparse
import dataclasses
import errno
import io
import json
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from lascaux.arguments import Parser, add_command, split_flags
from lascaux.config.load import (
    DEFAULT_PRESET,
    load_config,
    preset_header,
    preset_names,
    read_flags,
    to_tables,
    to_toml,
)
from lascaux.config.schema import Config, SourceConfig
from lascaux.errors import ConfigError, LascauxError, ProcessLost, TrainingStopped
from lascaux.parallel.runtime import let_waiting_threads_sleep, this_process

if TYPE_CHECKING:
    from rich.console import Console

EXIT_MEND, EXIT_RESUMABLE = 2, 75
MENDABLE_ERRNOS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
)
ALL_SECTIONS = [field.name for field in dataclasses.fields(Config)]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command in `arguments` (default: the process's) and exit."""
    signal.signal(signal.SIGTERM, _interrupt)
    let_waiting_threads_sleep()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))
    except TrainingStopped as stopped:
        if this_process().rank == 0:
            print(f"lascaux: {stopped}", file=sys.stderr)
        sys.exit(EXIT_RESUMABLE)
    except ProcessLost as error:
        print(f"lascaux: {error}", file=sys.stderr)
        sys.exit(EXIT_RESUMABLE)
    except LascauxError as error:
        if this_process().rank == 0:
            print(f"lascaux: {error}", file=sys.stderr)
        sys.exit(EXIT_MEND)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, as with `| head`
        sys.exit(0)
    except OSError as error:
        if error.errno not in MENDABLE_ERRNOS:
            raise
        where = f" '{error.filename}'" if error.filename else ""
        print(
            f"lascaux: {error.strerror}{where}; what was saved before is intact: once that is "
            "mended, run the same command again",
            file=sys.stderr,
        )
        sys.exit(EXIT_MEND)
    except KeyboardInterrupt:
        print("lascaux: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_RESUMABLE)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def run_command(arguments: Sequence[str]) -> int:
    """Parse and carry out one command; returns the exit code."""
    parser = build_parser()
    plain, flags = split_flags(arguments)
    options = parser.parse_args(plain)
    if options.command is None:
        parser.print_help()
        return 0
    command: Callable[[argparse.Namespace, list[str]], int] = options.run_command
    return command(options, flags)


def build_parser() -> Parser:
    """The commands, their arguments and help."""
    parser = Parser(
        prog="lascaux",
        description="Train, check, sample and report GPT-class language models.",
        epilog="`lascaux COMMAND --help` lists every setting of a command with its unit.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    add = partial(add_command, commands)
    add_making_commands(add)
    add_reading_commands(add)
    return parser


def add_making_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Those that start from a configuration."""
    train = add("train", train_command, "train a model; again: continue", ALL_SECTIONS)
    train.add_argument("target", nargs="?", metavar="PRESET|FILE", help="default: tiny")
    train.add_argument("--run", type=Path, metavar="DIR", help="default: runs/PRESET or runs/FILE")

    prepare = add(
        "prepare",
        prepare_command,
        "turn text into token shards (vocabulary: --model.vocab_size)",
        ("data", "tokenizer"),
    )
    prepare.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder or 'stdlib'")
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR")
    prepare.add_argument(
        "--text-field", default="text", metavar="NAME", help="field with the text; default: text"
    )

    bench = add(
        "bench",
        bench_command,
        "measure speed on this machine and the fraction of its peak",
        ("model", "train", "optimizer"),
    )
    bench.add_argument("what", nargs="?", choices=("train", "generate", "moe"), default="train")
    bench.add_argument("target", nargs="?", metavar="PRESET|FILE", help="default: tiny")
    bench.add_argument("--rounds", type=int, default=9, metavar="N", help="default: 9")

    prove = add(
        "prove",
        prove_command,
        "train a shrunken copy on a layout and on one process, and compare",
        ("parallel", "model", "train", "optimizer"),
    )
    prove.add_argument("target", nargs="?", metavar="PRESET|FILE", help="default: tiny")
    prove.add_argument(
        "--processes", type=int, metavar="N", help="default: as many as the axes need"
    )
    prove.add_argument(
        "--dry-run",
        action="store_true",
        help="build the full size for one of N processes instead: what it holds and says",
    )

    compare = add(
        "compare",
        compare_command,
        "train models that differ in a few settings, several seeds each; again: continue",
        ALL_SECTIONS,
    )
    compare.add_argument("target", nargs="?", metavar="STUDY|FILE", help="default: dense-vs-moe")
    compare.add_argument("--run", type=Path, metavar="DIR", help="default: runs/STUDY")
    compare.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1")
    compare.add_argument(
        "--runs-at-once", type=int, metavar="N", help="default: one for each core, at most 4"
    )

    config = add("config", config_command, "print the resolved settings as TOML", ALL_SECTIONS)
    config.add_argument("target", nargs="?", metavar="PRESET|FILE", help="default: tiny")
    config.add_argument("--list", action="store_true", help="list the presets")


def add_reading_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Those that start from a run."""
    upcycle = add("upcycle", upcycle_command, "begin a mixture from a dense model", ALL_SECTIONS)
    upcycle.add_argument("source", type=Path, metavar="RUN", help="a run or checkpoint folder")
    upcycle.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new run")

    generate = add("generate", generate_command, "continue a prompt", ("generate",))
    generate.add_argument("source", type=Path, metavar="RUN", help="a run or checkpoint folder")
    generate.add_argument("--prompt", default="", metavar="TEXT")

    report = add("report", report_command, "write RUN/report.html")
    report.add_argument("source", type=Path, metavar="RUN")

    verify = add("verify", verify_command, "check every hash of a run")
    verify.add_argument("source", type=Path, metavar="RUN")


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
    from lascaux.generate.engine import generate
    from lascaux.generate.load import load_for_generation

    loaded = load_for_generation(options.source, flags)
    stream = generate(
        loaded.model, loaded.tokenizer, options.prompt, loaded.settings, device=loaded.device
    )
    pieces = []
    if not options.json:
        print(options.prompt, end="", flush=True)
    for piece in stream:
        pieces.append(piece)
        if not options.json:
            print(piece.text, end="", flush=True)
    last = pieces[-1]
    if options.json:
        text = "".join(piece.text for piece in pieces)
        figures = {
            "prompt": options.prompt,
            "text": text,
            "finish_reason": last.finish_reason,
            "tokens": last.num_tokens,
            "tokens_per_second": last.tokens_per_second,
        }
        print_json(figures)
    else:
        print()
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
