"""The tensors of a Hugging Face folder: where each one lies, read one at a time.

`model.safetensors`, or the files that `model.safetensors.index.json` names; without either, pickled
weights (`pickled.py`). Files are checked by the safetensors library before a tensor is read: sizes,
offsets and the file's length must agree.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lascaux.checkpoint.commit import remove_abandoned
from lascaux.checkpoint.files import shown
from lascaux.checkpoint.save import free_space_problem
from lascaux.checkpoint.tensor_file import DTYPES
from lascaux.errors import CheckpointError
from lascaux.exchange.pickled import open_pickle
from lascaux.exchange.settings import read_json
from lascaux.exchange.stored import Stored, open_for_reading, read_bytes

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHTS = (WHOLE, INDEX, PICKLED, PICKLED_INDEX)
SLAB_BYTES = 8 << 20
FILE_NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Stored]:
    """Every tensor of a folder, by its name there; readable while the stack is open.

    Raises: CheckpointError for a file that is missing, damaged, or not what the index says.
    """
    if (folder / WHOLE).is_file():
        return open_file(folder / WHOLE, stack)
    if (folder / INDEX).is_file():
        return open_indexed(folder / INDEX, ".safetensors", open_file, stack)
    if (folder / PICKLED).is_file():
        return open_pickle(folder / PICKLED, stack)
    if (folder / PICKLED_INDEX).is_file():
        return open_indexed(folder / PICKLED_INDEX, ".bin", open_pickle, stack)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder '{folder}'; give one with config.json and {WHOLE}, or a .gguf file"
        )
    raise CheckpointError(
        f"{folder} has none of {WHOLE}, {INDEX}, {PICKLED} and {PICKLED_INDEX}; download the "
        "weights too"
    )


def open_indexed(
    index: Path,
    ending: str,
    open_one: Callable[[Path, ExitStack], dict[str, Stored]],
    stack: ExitStack,
) -> dict[str, Stored]:
    """The tensors of all files that an index names."""
    folder = index.parent
    placed = read_index(index, ending)
    file_names = sorted(set(placed.values()))
    for file_name in file_names:
        if not (folder / file_name).is_file():
            raise CheckpointError(
                f"{folder / file_name} is missing: {index.name} names it; download it again"
            )
    found: dict[str, Stored] = {}
    for file_name in file_names:
        for name, stored in open_one(folder / file_name, stack).items():
            if placed.get(name) != file_name:
                raise CheckpointError(
                    f"{stored.path} has tensor {shown(name)}, which {index.name} places in "
                    f"{placed.get(name, 'no file')}"
                )
            found[name] = stored
    for name, file_name in placed.items():
        if name not in found:
            raise CheckpointError(
                f"{folder / file_name} has no tensor {shown(name)}, which {index.name} places there"
            )
    return found


def read_index(path: Path, ending: str) -> dict[str, str]:
    """The file of each tensor; a name that could lead out of the folder is refused."""
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{path}: expected an object 'weight_map'; found {shown(placed)}")
    allowed = re.compile(FILE_NAME + re.escape(ending), re.ASCII)
    for name, file_name in placed.items():
        if not isinstance(file_name, str) or allowed.fullmatch(file_name) is None:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} in file {shown(file_name)}; expected the name of a "
                f"{ending} file beside the index"
            )
    return placed


def open_file(path: Path, stack: ExitStack) -> dict[str, Stored]:
    """The tensors of one safetensors file."""
    descriptor = open_for_reading(path, stack)
    try:
        with safe_open(path, framework="pt") as checked:
            names: list[str] = list(checked.keys())
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is no valid safetensors file: {shown(str(error))}; download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    length = int.from_bytes(read_bytes(path, descriptor, 0, 8).numpy().tobytes(), "little")
    header = json.loads(read_bytes(path, descriptor, 8, length).numpy().tobytes())
    return {
        name: Stored(
            path=path,
            name=name,
            shape=tuple(header[name]["shape"]),
            dtype=header[name]["dtype"],
            load=lambda entry=header[name]: load_tensor(path, descriptor, 8 + length, entry),
        )
        for name in names
    }


def load_tensor(path: Path, descriptor: int, data_start: int, entry: dict[str, Any]) -> Tensor:
    """A tensor in fp32, by its entry in a header that the library has checked.

    Of its bytes in the file a few are in memory at a time.
    """
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path} has a tensor of {entry['dtype']}, which Lascaux cannot read")
    dtype = DTYPES[entry["dtype"]]
    numbers = torch.empty(entry["shape"], dtype=torch.float32)
    position = data_start + entry["data_offsets"][0]
    for part in numbers.view(-1).split(SLAB_BYTES // dtype.itemsize):
        num_bytes = len(part) * dtype.itemsize
        part.copy_(read_bytes(path, descriptor, position, num_bytes).view(dtype))
        position += num_bytes
    return numbers


def refuse_existing(out: Path) -> None:
    """Raises: CheckpointError for what is there already, a link to nothing included."""
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; give --out a new folder")


def make_room(out: Path, num_bytes: int) -> None:
    """The folder around the new one, without what an attempt that was killed left there.

    Raises: CheckpointError where it has no room.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        problem = free_space_problem(out.parent, num_bytes)
    except OSError as error:
        problem = f"cannot make room in {out.parent}: {error.strerror}; give another --out"
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
