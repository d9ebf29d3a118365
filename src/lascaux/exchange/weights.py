"""The weights of a checkpoint, read a few tensors ahead, in the order in which they are asked for.

A file of a checkpoint is read as a whole, as its hash covers the whole; so tensors are read in
groups of about a file. Memory holds one file, one group, and the tensors of one row.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lascaux.checkpoint.load import describe_tensors, files_with, load_slabs
from lascaux.checkpoint.parts import files_of
from lascaux.config.schema import ModelConfig
from lascaux.exchange.match import parameters_on_meta
from lascaux.exchange.rows import Row


class Weights:
    """Our tensors by rows, which must be asked for in the order given, each as often as wanted.

    What the network `model` has and the checkpoint has not, biases, is zero.
    """

    def __init__(self, checkpoint: Path, model: ModelConfig, rows: Sequence[Row]) -> None:
        self._checkpoint = checkpoint
        self._ours = parameters_on_meta(model)
        self._saved = describe_tensors(checkpoint, "model").keys()
        files = files_with(checkpoint, "model")
        largest = max(files[name].size for name in files_of("model", files))
        self._groups = self._group(list(dict.fromkeys(rows)), largest)
        self._held: dict[str, Tensor] = {}

    def _group(self, rows: Sequence[Row], num_bytes: int) -> Iterator[list[str]]:
        """Names of tensors to read together: rows of at most so many bytes, one row at least."""
        group: list[str] = []
        held = 0
        for row in rows:
            size = sum(self._ours[name].nbytes for name in row.ours)
            if group and held + size > num_bytes:
                yield group
                group, held = [], 0
            group += row.ours
            held += size
        yield group

    def of(self, row: Row) -> list[Tensor]:
        """The tensors of a row. Raises: CheckpointError for a file that is not what was saved."""
        while row.ours[0] not in self._held:
            self._held = {}  # before the next ones are read
            names = next(self._groups)
            wanted = {
                name: tuple(slice(0, size) for size in self._ours[name].shape)
                for name in names
                if name in self._saved
            }
            found = load_slabs(self._checkpoint, "model", wanted) if wanted else {}
            self._held = {
                name: found[name] if name in found else torch.zeros(self._ours[name].shape)
                for name in names
            }
        return [self._held[name] for name in row.ours]
