"""Weights that torch pickled (pytorch_model.bin), read without running what a pickle asks for.

The one place that reads pickles, and only with `weights_only`: torch then makes tensors and plain
containers, and refuses everything else by name.
"""

import pickle
import re
import warnings
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lascaux.checkpoint.files import shown
from lascaux.checkpoint.tensor_file import DTYPE_NAMES
from lascaux.errors import CheckpointError
from lascaux.exchange.stored import Stored

CODE = re.compile(r"GLOBAL (\S+)")
"""what torch's message names when a pickle asks for more than tensors"""


def open_pickle(path: Path, stack: ExitStack) -> dict[str, Stored]:
    """The tensors of one file, mapped into memory and read when they are needed.

    Files of the format before torch 1.6 cannot be mapped: one such file is in memory as a whole.

    Raises: CheckpointError for a file that is damaged, asks for code, or holds something else.
    """
    content = load(path)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, found {type(content).__name__}"
        )
    found: dict[str, Stored] = {}
    for name, tensor in content.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not plain or tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{path}: expected names and plain tensors, found {shown(name)} with "
                f"{getattr(tensor, 'dtype', type(tensor).__name__)}"
            )
        found[name] = Stored(
            path=path,
            name=name,
            shape=tuple(tensor.shape),
            dtype=DTYPE_NAMES[tensor.dtype],
            load=tensor.detach,
        )
    stack.callback(found.clear)
    return found


def load(path: Path) -> Any:
    """The object in a file. Raises: CheckpointError for whatever torch does not read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols; they are refused below
            return _load(path)
    except pickle.UnpicklingError as error:
        asked = CODE.search(str(error))
        what = f"asks for '{asked[1]:.80}' while it is read" if asked else "has more than tensors"
        raise CheckpointError(
            f"{path} {what}: a pickle that could run code; nothing of it was run. Take the model's "
            "safetensors instead"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a malformed file may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} is no file of weights that torch reads: {shown(reason)}"
        ) from None


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # a small file could otherwise fill the memory
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed, which torch never writes")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used with files saved with" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)
