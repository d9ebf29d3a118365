"""Small checkpoints whose content follows from their step."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lascaux.checkpoint.load import load_tensors
from lascaux.checkpoint.manifest import read_manifest
from lascaux.checkpoint.parts import Piece
from lascaux.checkpoint.save import save_checkpoint, whole_pieces


def tensors_of(step: int, size: int = 24) -> dict[str, dict[str, Tensor]]:
    """Model and optimizer tensors, other bits at every step."""
    values = torch.arange(size * size, dtype=torch.float32).reshape(size, size) + step
    return {
        "model": {"embed.weight": values, "norm.weight": values[0].to(torch.bfloat16)},
        "optimizer": {
            "embed.weight.exp_avg": values.T / 3,
            "embed.weight.step": torch.tensor(float(step)),
        },
    }


def state_of(step: int) -> dict[str, Any]:
    """JSON with what a trainer hands over."""
    return {"config": {"model": {"d_model": 24}}, "elapsed_seconds": step / 3, "note": "é ☃"}


def pieces(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[Piece]]:
    """As the only process saves them."""
    return {stem: whole_pieces(group) for stem, group in tensors.items()}


def save(checkpoints: Path, step: int, size: int = 24) -> Path:
    """The checkpoint of a step."""
    return save_checkpoint(
        checkpoints,
        step=step,
        tokens_seen=step * 1000,
        tensors=pieces(tensors_of(step, size)),
        state=state_of(step),
    )


def same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bits are the same."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype
        and found[name].shape == wanted[name].shape
        and bits(found[name]) == bits(wanted[name])
        for name in wanted
    )


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor, NaNs and signs of zero included."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def is_checkpoint_of(path: Path, step: int, size: int = 24) -> bool:
    """Whether a folder holds exactly what `save` wrote for a step."""
    manifest = read_manifest(path)
    return (
        (manifest.step, manifest.tokens_seen, manifest.state) == (step, step * 1000, state_of(step))
        and manifest.files.keys() == {"model.safetensors", "optimizer.safetensors"}
        and all(
            same_bits(load_tensors(path, stem), wanted)
            for stem, wanted in tensors_of(step, size).items()
        )
    )


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder for tests that sync thousands of times."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.path.isdir(shared) else None) as folder:
        yield Path(folder)
