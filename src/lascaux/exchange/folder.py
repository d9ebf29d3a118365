"""The tensors of a Hugging Face folder: where each one lies, read one at a time.

`model.safetensors`, or the files that `model.safetensors.index.json` names. Files are mapped, not
loaded, and checked by the safetensors library: sizes, offsets and the file's length must agree.
Pickled weights (pytorch_model.bin) are refused: reading them can run what they contain.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lascaux.checkpoint.files import shown
from lascaux.checkpoint.save import free_space_problem
from lascaux.errors import CheckpointError
from lascaux.exchange.settings import read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors", re.ASCII)
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
"""bytes of an element"""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a mapped file."""

    file: Any
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """Its numbers, on the CPU."""
        try:
            return self.file.get_tensor(self.name)
        except SafetensorError as error:
            raise unreadable(self.path, error) from error


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Stored]:
    """Every tensor of a folder, by its name there; readable while the stack is open.

    Raises: CheckpointError for a file that is missing, damaged, or not what the index says.
    """
    if (folder / WHOLE).is_file():
        return open_file(folder / WHOLE, stack)
    if not (folder / INDEX).is_file():
        raise CheckpointError(describe_missing(folder))
    placed = read_index(folder / INDEX)
    file_names = sorted(set(placed.values()))
    for file_name in file_names:
        if not (folder / file_name).is_file():
            raise CheckpointError(
                f"{folder / file_name} is missing: {INDEX} names it; download it again"
            )
    found: dict[str, Stored] = {}
    for file_name in file_names:
        for name, stored in open_file(folder / file_name, stack).items():
            if placed.get(name) != file_name:
                raise CheckpointError(
                    f"{stored.path} has tensor {shown(name)}, which {INDEX} places in "
                    f"{placed.get(name, 'no file')}"
                )
            found[name] = stored
    for name, file_name in placed.items():
        if name not in found:
            raise CheckpointError(
                f"{folder / file_name} has no tensor {shown(name)}, which {INDEX} places there"
            )
    return found


def describe_missing(folder: Path) -> str:
    """Why there is nothing to read in a folder."""
    if not folder.is_dir():
        return f"there is no folder '{folder}'; give one with config.json and {WHOLE}"
    for name in PICKLED:
        if (folder / name).exists():
            return (
                f"{folder} has its weights in {name}, which is pickled and could run code; convert "
                "it where you trust it: AutoModelForCausalLM.from_pretrained(OLD)"
                ".save_pretrained(NEW) writes safetensors"
            )
    return f"{folder} has neither {WHOLE} nor {INDEX}; download the weights too"


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor; a name that could lead out of the folder is refused."""
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{path}: expected an object 'weight_map'; found {shown(placed)}")
    for name, file_name in placed.items():
        if not isinstance(file_name, str) or FILE_NAME.fullmatch(file_name) is None:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} in file {shown(file_name)}; expected the name of a "
                ".safetensors file beside the index"
            )
    return placed


def open_file(path: Path, stack: ExitStack) -> dict[str, Stored]:
    """The tensors of one file."""
    found: dict[str, Stored] = {}
    try:
        file: Any = stack.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():
            part = file.get_slice(name)
            found[name] = Stored(file, path, name, tuple(part.get_shape()), part.get_dtype())
    except SafetensorError as error:
        raise unreadable(path, error) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return found


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for what the library refuses."""
    return CheckpointError(
        f"{path} is no valid safetensors file: {shown(str(error))}; download it again"
    )


def refuse_existing(out: Path) -> None:
    """Raises: CheckpointError for what is there already, a link to nothing included."""
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; give --out a new folder")


def make_room(out: Path, num_bytes: int) -> None:
    """The folder around the new one. Raises: CheckpointError where it has no room."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        problem = free_space_problem(out.parent, num_bytes)
    except OSError as error:
        problem = f"cannot make {out.parent}: {error.strerror}; give another --out"
    if problem is not None:
        raise CheckpointError(problem)


@contextmanager
def bytes_progress(console: Console, words: str, total: int) -> Iterator[Progress]:
    """A bar of bytes in a terminal; advance its only task."""
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
        progress.add_task(words, total=total)
        yield progress
