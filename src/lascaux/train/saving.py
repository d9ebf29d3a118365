"""Checkpoints of a run: every process writes its part in the background, the first publishes.

A save begins with a copy of the process's part of weights and optimizer state, taken between two
steps; a thread writes it while training goes on. The threads find each other through the store that
torchrun's processes share, since two threads must not take turns in collectives:

    first     a temporary folder ─▶ its part ─ waits for all ─ manifest, rename ─▶ how it ended
    others    wait for it ────────▶ their part, with sizes and hashes ─ wait for ─▶ that

One save at a time: the next one, and the end of the run, wait for it first.
"""

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lascaux.checkpoint.files import FileRecord
from lascaux.checkpoint.parts import Piece, part_bytes
from lascaux.checkpoint.save import Others, remove_old, save_checkpoint, write_tensors
from lascaux.checkpoint.tensor_file import Place
from lascaux.errors import CheckpointError, LascauxError, ProcessLost
from lascaux.parallel.plan import TIED_COPY
from lascaux.parallel.shards import is_first_holder, local, slab_of
from lascaux.parallel.world import World

SLOWEST_DISK_BYTES_PER_SECOND = 10e6

Pieces = Mapping[str, Sequence[Piece]]
"""by their stem: model, optimizer"""


@dataclass(kw_only=True, slots=True)
class Save:
    """One save of one process."""

    checkpoints: Path
    step: int
    tokens_seen: int
    keep: int
    pieces: Pieces
    state: Mapping[str, Any]
    world: World
    timeout_seconds: float
    """how long to wait for other processes, beyond the time of a slow disk"""
    abandoned: threading.Event = field(default_factory=threading.Event)
    problem: str | None = None
    """why there is no checkpoint"""
    warning: str | None = None
    """why old ones are still there"""
    crash: Exception | None = None

    def run(self) -> None:
        """Write this process's part; in the first, also wait for the others and publish."""
        try:
            self._write_and_publish() if self.world.is_first else self._write_part()
        except (CheckpointError, ProcessLost) as error:
            self.problem = str(error)
        except Exception as error:  # our bug; told where the run waits for this save
            self.crash = error

    def _write_and_publish(self) -> None:
        several = self.world.layout.world_size > 1
        others = Others(self._announce, self._collect) if several else None
        try:
            save_checkpoint(
                self.checkpoints,
                step=self.step,
                tokens_seen=self.tokens_seen,
                tensors=self.pieces,
                state=self.state,
                others=others,
            )
        except (CheckpointError, ProcessLost) as error:
            self.problem = str(error)
        if several:
            self._post("folder", "")  # for those who still wait for one
            self._post("end", self.problem or "")
        if self.problem is None:
            try:
                remove_old(self.checkpoints, self.keep)
            except CheckpointError as error:
                self.warning = str(error)

    def _announce(self, folder: Path) -> None:
        self._post("folder", str(folder))

    def _collect(self) -> dict[str, FileRecord]:
        files: dict[str, FileRecord] = {}
        for rank in range(1, self.world.layout.world_size):
            answer = json.loads(self._wait_for(f"part/{rank}", f"process {rank}"))
            self.world.forget(f"save/{self.step}/part/{rank}")
            if "problem" in answer:
                raise CheckpointError(answer["problem"])
            files |= {name: FileRecord(*record) for name, record in answer["files"].items()}
        return files

    def _write_part(self) -> None:
        rank = self.world.rank
        folder = self._wait_for("folder", "the first process")
        if folder:
            try:
                files = write_tensors(Path(folder), self.pieces, rank)
                answer: dict[str, Any] = {
                    "files": {name: (record.size, record.sha256) for name, record in files.items()}
                }
            except OSError as error:
                answer = {
                    "problem": f"process {rank} cannot write its part of step {self.step} to "
                    f"{folder}: {error.strerror}; make room there or mend that"
                }
            self._post(f"part/{rank}", json.dumps(answer))
        self.problem = self._wait_for("end", "the first process", 3.0) or None

    def _post(self, key: str, text: str) -> None:
        self.world.post(f"save/{self.step}/{key}", text)

    def _wait_for(self, key: str, who: str, patience: float = 1.0) -> str:
        size = sum(part_bytes(pieces) for pieces in self.pieces.values())
        seconds = patience * (self.timeout_seconds + size / SLOWEST_DISK_BYTES_PER_SECOND)
        text = self.world.wait_for(f"save/{self.step}/{key}", seconds, self.abandoned)
        if text is None:
            raise ProcessLost(f"{who} has not finished its part of the save of step {self.step}")
        return text


class Saver:
    """The save that is under way, and how the ones before ended."""

    def __init__(self, step: int) -> None:
        self.begun_step = self.saved_step = step
        self.failed_in_a_row = 0
        self._save: Save | None = None
        self._thread: threading.Thread | None = None

    def begin(self, save: Save) -> None:
        """Start writing; the one before must have been waited for."""
        assert self._thread is None
        self.begun_step = save.step
        self._save = save
        self._thread = threading.Thread(target=save.run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> Save | None:
        """The save that was under way, ended now; None if there was none."""
        if self._thread is None or self._save is None:
            return None
        self._thread.join()
        save, self._thread, self._save = self._save, None, None
        if save.crash is not None:
            raise save.crash
        if save.problem is None:
            self.saved_step, self.failed_in_a_row = save.step, 0
        else:
            self.failed_in_a_row += 1
        return save

    def wait_unless_cut_off(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """On the way out: let a save end, but not after a second Ctrl-C or without the others."""
        if error is None or isinstance(error, LascauxError):
            self.wait()
        elif self._save is not None:
            self._save.abandoned.set()


def own_pieces(
    parameters: Iterable[tuple[str, Tensor]],
    optimizer_state: Mapping[str, Tensor],
    world: World,
    copied: bool,
) -> dict[str, list[Piece]]:
    """What this process writes of a checkpoint: its parts, unless another one has the same.

    `copied` gives tensors that training does not change. A scalar of an optimizer's state goes with
    the beginning of its parameter.
    """
    named = {n: p.detach() for n, p in parameters if n != TIED_COPY and _writes(p, world)}
    pieces: dict[str, list[Piece]] = {"model": [], "optimizer": []}
    for name, tensor in named.items():
        pieces["model"] += _piece(name, tensor, copied)
    for name, tensor in optimizer_state.items():
        owner = named.get(name.rpartition(".")[0])
        if owner is None or (tensor.ndim == 0 and any(s.start for s in slab_of(owner))):
            continue
        pieces["optimizer"] += _piece(name, tensor.detach(), copied)
    return pieces


def _writes(parameter: Tensor, world: World) -> bool:
    return world.place["dp_replicate"] == 0 and is_first_holder(parameter)


def _piece(name: str, tensor: Tensor, copied: bool) -> list[Piece]:
    own, slab = local(tensor), slab_of(tensor)
    if tensor.numel() > 0 and own.numel() == 0:
        return []
    place = None
    if own.shape != tensor.shape:
        place = Place(tuple(s.start for s in slab), tuple(tensor.shape))
    return [Piece(name, own.to("cpu", copy=True) if copied else own, place)]
