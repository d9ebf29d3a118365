"""The weights of a checkpoint, read a few tensors ahead, in the order they are asked for.

A file of a checkpoint is read as a whole, as its hash covers the whole; so the tensors of a file
are read together. Memory holds one file and one group of at most a file's bytes, or one row. Where
many processes saved parts of every tensor, their files are read anew for each group.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lascaux.checkpoint.load import describe_tensors, files_with, load_slabs
from lascaux.checkpoint.parts import tensors_by_file
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
        self._groups = self._group(list(dict.fromkeys(rows)))
        self._held: dict[str, Tensor] = {}

    def _group(self, rows: Sequence[Row]) -> Iterator[list[str]]:
        """Names of tensors to read together: those of a file, or of a few small ones."""
        files = files_with(self._checkpoint, "model")
        inside = tensors_by_file(self._checkpoint, files, "model")
        sizes = [files[name].size for name in inside]
        group: list[str] = []
        held, opened = 0, set[str]()
        for row in rows:
            size = sum(self._ours[name].nbytes for name in row.ours)
            needed = {name for name in inside if not inside[name].isdisjoint(row.ours)}
            limit = max(sizes) if needed <= opened else sum(sizes) // len(sizes)
            if group and held + size > limit:
                yield group
                group, held, opened = [], 0, set[str]()
            group += row.ours
            held += size
            opened |= needed
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
