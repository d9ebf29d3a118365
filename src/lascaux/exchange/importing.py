"""`lascaux import`: a Hugging Face folder or a GGUF file becomes a run at step 0.

Everything is checked before anything is written, and the run folder appears whole or not at all.
Weights are rearranged tensor by tensor and kept in fp32, as in every checkpoint; memory holds one
file of the checkpoint (256 MiB) or the largest tensor of ours.
"""

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from lascaux.checkpoint.commit import commit_locked_folder, sync_folder
from lascaux.checkpoint.files import FileRecord, write_file
from lascaux.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    encode_manifest,
    step_folder_name,
)
from lascaux.checkpoint.parts import Piece, write_part
from lascaux.config.check import check
from lascaux.config.load import build_config, overlay, read_flags, to_settings, to_tables, to_toml
from lascaux.config.schema import (
    Config,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from lascaux.data.roles import ROLES_FILE, encode_roles
from lascaux.errors import CheckpointError, ConfigError
from lascaux.exchange.folder import bytes_progress, make_room, refuse_existing
from lascaux.exchange.match import Matched
from lascaux.exchange.rows import to_ours
from lascaux.exchange.source import open_source
from lascaux.units import format_bytes, format_count

FILE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """The new run and where it came from; what `lascaux import --json` prints."""

    run: str
    source: str
    family: str
    parameters: int
    source_dtypes: tuple[str, ...]
    ignored_tensors: tuple[str, ...]
    ignored_settings: tuple[str, ...]
    """of the model and its tokens, not known to be without effect"""


def import_folder(source: Path, out: Path, console: Console, flags: Sequence[str] = ()) -> Imported:
    """Make the new run folder `out` of a Hugging Face folder or a GGUF file.

    `flags` are settings for training.

    Raises: CheckpointError for files that are damaged or not what they say of themselves;
    ConfigError for settings our network has not; DataError for a tokenizer it cannot use. Nothing
    is then written.
    """
    refuse_existing(out)
    with ExitStack() as stack:
        found = open_source(source, stack)
        matched, tokenizer = found.matched, found.tokenizer
        config = run_config(found.model, out, flags)
        dtypes = tuple(sorted({tensor.dtype for tensor in matched.stored.values()}))
        origin = {"source": str(source.absolute()), "family": found.family, "dtypes": dtypes}
        make_room(out, matched.num_bytes)

        def write(folder: Path) -> None:
            write_file(folder / "tokenizer.json", [tokenizer.json.encode("utf-8")])
            write_file(folder / ROLES_FILE, [encode_roles(found.roles, tokenizer)])
            write_file(folder / "config.toml", [to_toml(config).encode("utf-8")])
            checkpoint = folder / "checkpoints" / step_folder_name(0)
            checkpoint.mkdir(parents=True)
            files = write_weights(checkpoint, matched, found.model, console)
            state = {
                "config": to_tables(config),
                "data_identity": None,
                "tokenizer_sha256": tokenizer.sha256,
                "elapsed_seconds": 0.0,
                "scaler": {},
                "imported": origin,
            }
            manifest = Manifest(step=0, tokens_seen=0, state=state, files=files)
            write_file(checkpoint / MANIFEST_NAME, [encode_manifest(manifest)])
            sync_folder(checkpoint)
            sync_folder(checkpoint.parent)
            refuse_existing(out)  # committing would put aside what came in the meantime

        try:
            commit_locked_folder(out, write)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {out}: {error.strerror}; it needs {format_bytes(matched.num_bytes)}"
            ) from error
    return Imported(
        run=str(out),
        source=str(source),
        family=found.family,
        parameters=matched.num_bytes // 4,
        source_dtypes=dtypes,
        ignored_tensors=matched.ignored,
        ignored_settings=found.ignored_settings,
    )


def run_config(model: ModelConfig, out: Path, flags: Sequence[str]) -> Config:
    """The settings of the new run: a careful fine-tuning, with the flags over it.

    Raises: ConfigError for flags about what the folder has decided.
    """
    given = read_flags(flags)
    for key in given:
        if key.startswith(("model.", "tokenizer.")):
            raise ConfigError(f"--{key} has no effect on an import: the folder brings its own")
    seq_len = min(model.max_context, 1024)
    base = Config(
        model=model,
        tokenizer=TokenizerConfig(path=str(out.absolute() / "tokenizer.json")),
        train=TrainConfig(
            steps=1000,
            seq_len=seq_len,
            microbatch_seqs=1,
            batch_tokens=16 * seq_len,
            precision="fp32",
        ),
        optimizer=OptimizerConfig(lr=2e-5),
    )
    config = build_config(overlay(to_settings(base), given))
    check(config)
    return config


def our_tensors(matched: Matched, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors in fp32, made one row at a time."""
    for row in matched.rows:
        theirs = [matched.stored[name] for name in row.theirs]
        if row.arrangement == "stacked":  # never all experts twice
            stacked = torch.empty(len(theirs), *theirs[0].shape)
            for number, expert in enumerate(theirs):
                stacked[number] = expert.read()
            yield row.ours[0], stacked
            continue
        made = to_ours(row, [tensor.read() for tensor in theirs], model)
        for name in row.ours:
            yield name, made.pop(0).to(torch.float32).contiguous()


def write_weights(
    checkpoint: Path, matched: Matched, model: ModelConfig, console: Console
) -> dict[str, FileRecord]:
    """The files of the checkpoint, one in memory at a time. Raises: OSError."""
    files: dict[str, FileRecord] = {}
    pieces: list[Piece] = []
    number = None if matched.num_bytes <= FILE_BYTES else 0
    with bytes_progress(console, "importing", matched.num_bytes) as progress:
        for name, tensor in our_tensors(matched, model):
            held = sum(piece.tensor.nbytes for piece in pieces)
            if number is not None and pieces and held + tensor.nbytes > FILE_BYTES:
                files |= write_part(checkpoint, "model", pieces, number)
                pieces, number = [], number + 1
            pieces.append(Piece(name, tensor))
            progress.advance(progress.task_ids[0], tensor.nbytes)
        return files | write_part(checkpoint, "model", pieces, number)


def describe_import(found: Imported) -> str:
    """What was imported, what was left out, and what to do next."""
    lines = [
        f"{found.run}: {format_count(found.parameters)} parameters of {found.source} "
        f"({found.family}, {' and '.join(found.source_dtypes)})"
    ]
    if found.ignored_tensors:
        lines.append(
            f"left out: {len(found.ignored_tensors)} tensors that follow from others, such as "
            f"{found.ignored_tensors[0]}"
        )
    if found.ignored_settings:
        lines.append(f"left out, as Lascaux does not know it: {', '.join(found.ignored_settings)}")
    lines.append(f"next: lascaux generate {shlex.quote(found.run)} --prompt TEXT")
    return "\n".join(lines)
