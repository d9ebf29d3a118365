"""`lascaux export`: a run becomes a folder that transformers loads as it is.

The weights are read a few tensors at a time, hashes checked (`weights.py`); the folder appears
whole or not at all. Files beyond 5 GB are split, with an index, as transformers does.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from lascaux.checkpoint.commit import commit_locked_folder
from lascaux.checkpoint.files import write_file
from lascaux.checkpoint.load import check_fits, describe_tensors
from lascaux.checkpoint.manifest import read_manifest
from lascaux.checkpoint.tensor_file import ALIGNMENT, CHUNK_BYTES, DTYPE_NAMES
from lascaux.config.load import from_tables
from lascaux.config.schema import ModelConfig
from lascaux.data.roles import TokenRoles, read_roles
from lascaux.data.tokenizer import Tokenizer, load_tokenizer
from lascaux.errors import CheckpointError
from lascaux.exchange.choose import choose_family, write_config
from lascaux.exchange.families import Family
from lascaux.exchange.folder import INDEX, WHOLE, bytes_progress, make_room, refuse_existing
from lascaux.exchange.match import parameters_on_meta, table_rows
from lascaux.exchange.rows import Row, to_theirs
from lascaux.exchange.token_files import token_ids, token_settings
from lascaux.exchange.weights import Weights
from lascaux.generate.load import find_checkpoint, tokenizer_path
from lascaux.units import format_bytes, format_count

LARGEST_FILE_BYTES = 5_000_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """The new folder; what `lascaux export --json` prints."""

    folder: str
    source: str
    family: str
    architecture: str
    parameters: int
    dtype: str
    files: tuple[str, ...]
    zero_biases: tuple[str, ...]
    """settings whose biases the family has and the model has not: written as zeros"""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of theirs: the row it comes from, its number there, its shape."""

    name: str
    row: Row
    number: int
    shape: tuple[int, ...]


def export_folder(run: Path, out: Path, console: Console, dtype: str = "fp32") -> Exported:
    """Write the new folder `out` of a run's newest intact checkpoint, or of a checkpoint folder.

    Raises: ConfigError naming the setting that no family has; CheckpointError for damage, or a
    folder that is there already. Nothing is then written.
    """
    refuse_existing(out)
    checkpoint = find_checkpoint(run)
    manifest = read_manifest(checkpoint)
    model = from_tables(manifest.state["config"], f"{checkpoint}/manifest.json").model
    family, target, zeros = choose_family(model)
    tokenizer = load_tokenizer(tokenizer_path(checkpoint))
    if tokenizer.sha256 != manifest.state["tokenizer_sha256"]:
        raise CheckpointError(
            f"{tokenizer.origin} is not the tokenizer the model was trained with; restore it"
        )
    roles = read_roles(tokenizer_path(checkpoint).parent, tokenizer)
    check_fits(parameters_on_meta(model), describe_tensors(checkpoint, "model"), "model")
    entries = list_entries(family, target)
    weights = Weights(checkpoint, target, [entry.row for entry in entries])
    num_bytes = sum(_bytes(entry, DTYPES[dtype]) for entry in entries)
    files = name_files(entries, DTYPES[dtype])
    make_room(out, num_bytes)

    def write(folder: Path) -> None:
        for name, content in describe_files(family, target, tokenizer, roles, dtype).items():
            write_file(folder / name, [content])
        if len(files) > 1:
            write_file(folder / INDEX, [encode_index(files, num_bytes)])
        with bytes_progress(console, "exporting", num_bytes) as progress:
            for name, part in files.items():
                chunks = encode(part, weights, target, DTYPES[dtype])
                write_file(folder / name, progress_of(chunks, progress))
        refuse_existing(out)  # committing would put aside what came in the meantime

    try:
        commit_locked_folder(out, write)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror}; it needs {format_bytes(num_bytes)}"
        ) from error
    return Exported(
        folder=str(out),
        source=str(checkpoint),
        family=family.name,
        architecture=family.architecture,
        parameters=num_bytes // DTYPES[dtype].itemsize,
        dtype=dtype,
        files=tuple(files),
        zero_biases=tuple(zeros),
    )


def list_entries(family: Family, model: ModelConfig) -> list[Entry]:
    """The tensors of the folder, in the order they are written."""
    ours = parameters_on_meta(model)
    return [
        Entry(name, row, number, tuple(tensor.shape))
        for row in table_rows(family, model, ours)
        for number, (name, tensor) in enumerate(
            zip(row.theirs, to_theirs(row, [ours[n] for n in row.ours], model), strict=True)
        )
    ]


def _bytes(entry: Entry, dtype: torch.dtype) -> int:
    return math.prod(entry.shape) * dtype.itemsize


def name_files(entries: list[Entry], dtype: torch.dtype) -> dict[str, list[Entry]]:
    """The tensors of each file: one, or several of at most 5 GB or a tensor."""
    groups: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if groups[-1] and held + _bytes(entry, dtype) > LARGEST_FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += _bytes(entry, dtype)
    if len(groups) == 1:
        return {WHOLE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def encode(
    part: list[Entry], weights: Weights, model: ModelConfig, dtype: torch.dtype
) -> Iterator[bytes | memoryview]:
    """A safetensors file in chunks.

    `tensor_file.py` writes no "format", which transformers wants in the header's metadata.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in part:
        begin, end = end, end + _bytes(entry, dtype)
        header[entry.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": entry.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for entry in part:
        yield from encode_tensor(entry, weights, model, dtype)


def encode_tensor(
    entry: Entry, weights: Weights, model: ModelConfig, dtype: torch.dtype
) -> Iterator[memoryview]:
    """A tensor's bytes in chunks; nothing of it is held when they are through."""
    exact = to_theirs(entry.row, weights.of(entry.row), model)[entry.number]
    for numbers in exact.reshape(-1).split(CHUNK_BYTES // dtype.itemsize):
        chunk = numbers.to(dtype)
        if dtype == torch.float16 and not torch.equal(chunk.isfinite(), numbers.isfinite()):
            raise CheckpointError(f"'{entry.name}' is beyond the range of fp16; use --dtype bf16")
        yield chunk.view(torch.uint8).numpy().data


def progress_of(
    chunks: Iterator[bytes | memoryview], progress: Progress
) -> Iterator[bytes | memoryview]:
    """The chunks, counted as they go by."""
    for chunk in chunks:
        yield chunk
        progress.advance(progress.task_ids[0], len(chunk))


def encode_index(files: Mapping[str, list[Entry]], num_bytes: int) -> bytes:
    """Which tensor is in which file."""
    placed = {entry.name: name for name, part in files.items() for entry in part}
    return _json({"metadata": {"total_size": num_bytes}, "weight_map": placed})


def describe_files(
    family: Family, model: ModelConfig, tokenizer: Tokenizer, roles: TokenRoles, dtype: str
) -> dict[str, bytes]:
    """Everything but the weights, by file name."""
    name = str(DTYPES[dtype]).removeprefix("torch.")
    special = token_ids(roles, tokenizer)
    config = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **write_config(family, model),
        **special,
        "dtype": name,
        "torch_dtype": name,
    }
    return {
        "config.json": _json(config),
        "generation_config.json": _json(special),
        "tokenizer.json": tokenizer.json.encode("utf-8"),
        "tokenizer_config.json": _json(token_settings(roles, model.max_context)),
    }


def _json(content: object) -> bytes:
    return json.dumps(content, indent=2).encode("ascii") + b"\n"


def describe_export(found: Exported) -> str:
    """What was written, and how to load it."""
    lines = [
        f"{found.folder}: {format_count(found.parameters)} parameters as {found.architecture}, "
        f"{found.dtype}, from {found.source}"
    ]
    if found.zero_biases:
        lines.append(
            f"zeros for {', '.join(found.zero_biases)}, which {found.family} has and the model has "
            "not: it computes the same"
        )
    return "\n".join([*lines, f"load it: AutoModelForCausalLM.from_pretrained({found.folder!r})"])
