"""The command line: words in, exit code out; what a command does stands in `commands.py`.

Exit codes: 0 done, 2 the user can mend it, 75 stopped before the end and resumable, 1 our bug.
Figures and text go to stdout, everything else to stderr.
"""

import argparse
import dataclasses
import errno
import io
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lascaux import commands
from lascaux.arguments import Parser, add_command, read_count, split_flags
from lascaux.config.schema import Config
from lascaux.errors import LascauxError, ProcessLost, TrainingStopped
from lascaux.parallel.runtime import let_waiting_threads_sleep, this_process

EXIT_MEND, EXIT_RESUMABLE = commands.EXIT_MEND, 75
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
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")

    add = partial(add_command, subparsers)
    add_making_commands(add)
    add_weighing_commands(add)
    add_reading_commands(add)
    return parser


def add_making_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Those that start from a configuration."""
    train = add("train", commands.train_command, "train a model; again: continue", ALL_SECTIONS)
    train.add_argument("target", nargs="?", metavar="PRESET|FILE", help="default: tiny")
    train.add_argument("--run", type=Path, metavar="DIR", help="default: runs/PRESET or runs/FILE")

    prepare = add(
        "prepare",
        commands.prepare_command,
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
        commands.bench_command,
        "measure speed on this machine and the fraction of its peak",
        ("model", "train", "optimizer"),
    )
    bench.add_argument("what", nargs="?", choices=("train", "generate", "moe"), default="train")
    bench.add_argument("target", nargs="?", metavar="PRESET|FILE", help="default: tiny")
    bench.add_argument("--rounds", type=int, default=9, metavar="N", help="default: 9")

    prove = add(
        "prove",
        commands.prove_command,
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

    config = add(
        "config", commands.config_command, "print the resolved settings as TOML", ALL_SECTIONS
    )
    config.add_argument("target", nargs="?", metavar="PRESET|FILE", help="default: tiny")
    config.add_argument("--list", action="store_true", help="list the presets")


def add_weighing_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Those that weigh before one decides: a plan, a study."""
    plan = add(
        "plan",
        commands.plan_command,
        "say what a run will take before it starts: memory, time, energy, dollars",
        ALL_SECTIONS,
    )
    plan.add_argument(
        "words",
        nargs="*",
        metavar="PRESET|FILE",
        help="default: tiny; or: devices, scorecard, check CLAIM.toml|RUN, deploy PRESET, "
        "replicate SYSTEM, capability",
    )
    plan.add_argument("--device", metavar="ID", help="as `lascaux plan devices` lists them")
    plan.add_argument("--devices", type=read_count, metavar="N", help="how many; axes are chosen")
    plan.add_argument("--tokens", type=read_count, metavar="T", help="tokens to train on")
    plan.add_argument("--why", action="store_true", help="the parts and sources of every figure")
    plan.add_argument("--probe", action="store_true", help="measure this machine first")
    plan.add_argument("--out", type=Path, metavar="FILE.toml", help="write what `train` runs")
    plan.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the plan")

    compare = add(
        "compare",
        commands.compare_command,
        "train models that differ in a few settings, several seeds each; again: continue",
        ALL_SECTIONS,
    )
    compare.add_argument("target", nargs="?", metavar="STUDY|FILE", help="default: dense-vs-moe")
    compare.add_argument("--run", type=Path, metavar="DIR", help="default: runs/STUDY")
    compare.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1")
    compare.add_argument(
        "--runs-at-once", type=int, metavar="N", help="default: one for each core, at most 4"
    )


def add_reading_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Those that start from a run."""
    upcycle = add(
        "upcycle", commands.upcycle_command, "begin a mixture from a dense model", ALL_SECTIONS
    )
    upcycle.add_argument("source", type=Path, metavar="RUN", help="a run or checkpoint folder")
    upcycle.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new run")

    importing = add(
        "import",
        commands.import_command,
        "make a run of a Hugging Face folder or a GGUF file",
        [section for section in ALL_SECTIONS if section not in ("model", "tokenizer")],
    )
    importing.add_argument(
        "source", type=Path, metavar="SOURCE", help="a Hugging Face folder, or a .gguf file"
    )
    importing.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new run")

    exporting = add("export", commands.export_command, "write a run as a Hugging Face folder")
    exporting.add_argument("source", type=Path, metavar="RUN", help="a run or checkpoint folder")
    exporting.add_argument("--out", type=Path, required=True, metavar="HF_DIR", help="a new folder")
    exporting.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")

    generate = add("generate", commands.generate_command, "continue a prompt", ("generate",))
    generate.add_argument("source", type=Path, metavar="RUN", help="a run or checkpoint folder")
    generate.add_argument("--prompt", default="", metavar="TEXT")

    serve = add(
        "serve",
        commands.serve_command,
        "answer requests in OpenAI's wire format, with a playground",
        ("serve",),
    )
    serve.add_argument("source", type=Path, metavar="RUN", help="a run or checkpoint folder")
    serve.epilog = (
        f"{serve.epilog}\n\n  and --generate.weights, --generate.draft_tokens, --generate.threads "
        "as of `lascaux generate`"
    )
    serve.add_argument("--port", type=int, metavar="P", help="default: 8000; 0: any free one")

    report = add("report", commands.report_command, "write RUN/report.html")
    report.add_argument("source", type=Path, metavar="RUN")

    verify = add("verify", commands.verify_command, "check every hash of a run")
    verify.add_argument("source", type=Path, metavar="RUN")
