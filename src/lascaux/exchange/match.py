"""The tensors of a Hugging Face folder beside ours: names and shapes, before a number is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lascaux.checkpoint.files import shown
from lascaux.config.schema import ModelConfig
from lascaux.errors import CheckpointError
from lascaux.exchange.families import Family
from lascaux.exchange.rows import Row, expand, to_theirs
from lascaux.exchange.stored import Stored
from lascaux.model.transformer import Transformer

MASKS = re.compile(r"(.*\.)?((attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq)")
"""buffers that old versions saved with the weights"""
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Matched:
    """The source's tensors beside ours, names and shapes checked."""

    rows: list[Row]
    stored: Mapping[str, Stored]
    """by the names of the rows"""
    ignored: tuple[str, ...]
    num_bytes: int
    """of our tensors"""


def match_tensors(
    family: Family,
    model: ModelConfig,
    stored: Mapping[str, Stored],
    source: Path,
    says: str = "config.json",
    dtypes: Sequence[str] = FLOATS,
) -> Matched:
    """Every tensor of the source and of ours beside each other; `says` is what describes the model.

    Raises: CheckpointError naming a tensor that is missing, too many, or of another shape or type.
    """
    for name in ("num_layers", "num_experts"):  # before a huge number costs anything
        if getattr(model, name) > len(stored):
            raise CheckpointError(
                f"{source}: {says} has {name} {getattr(model, name):,}, but there are only "
                f"{len(stored):,} tensors"
            )
    ours = parameters_on_meta(model)
    rows = table_rows(family, model, ours)
    shapes = {
        name: tuple(tensor.shape)
        for row in rows
        for name, tensor in zip(
            row.theirs, to_theirs(row, [ours[n] for n in row.ours], model), strict=True
        )
    }
    found, ignored, surplus = name_tensors(family, stored, shapes)
    if model.tie_embeddings and (head := head_name(family)) in surplus:
        check_tied(surplus.pop(head), found.get(rows[0].theirs[0]), source, says)
        ignored.append(head)
    if missing := sorted(shapes.keys() - found.keys()):
        raise CheckpointError(
            f"{source} lacks tensor '{missing[0]}'{_and_more(missing)} of the {family.name} model "
            f"in {says}; there are files missing or {says} is of another model"
        )
    if surplus:
        names = sorted(surplus)
        raise CheckpointError(
            f"{source} has tensor {shown(names[0])}{_and_more(names)}, which the {family.name} "
            f"model in {says} has no place for; {says} is of another model"
        )
    for name, tensor in found.items():
        if tensor.shape != shapes[name] or tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{tensor.path}: tensor '{tensor.name}' is {tensor.dtype} {tensor.shape}; "
                f"{says} wants {' or '.join(dtypes)} {shapes[name]}"
            )
    num_bytes = sum(tensor.nbytes for tensor in ours.values())
    return Matched(rows, found, tuple(sorted(ignored)), num_bytes)


def parameters_on_meta(model: ModelConfig) -> dict[str, Tensor]:
    """Name, shape and dtype of every parameter, without memory."""
    with torch.device("meta"):
        return {name: p.data for name, p in Transformer(model).named_parameters()}


def table_rows(family: Family, model: ModelConfig, ours: Mapping[str, Tensor]) -> list[Row]:
    """The family's table for this model: every tensor of ours once, the embedding first."""
    present = set(ours)
    rows = expand(family.ends, "", "", 0, present)
    for i in range(model.num_layers):
        prefix = family.layer.replace("{}", str(i))
        rows += expand(family.block, f"blocks.{i}.", prefix, model.num_experts, present)
    assert sorted(name for row in rows for name in row.ours) == sorted(present)
    return rows


def head_name(family: Family) -> str:
    """Their name of the output head's weight."""
    return next(theirs for ours, theirs, _ in family.ends if ours == "head") + ".weight"


def name_tensors(
    family: Family, stored: Mapping[str, Stored], wanted: Mapping[str, object]
) -> tuple[dict[str, Stored], list[str], dict[str, Stored]]:
    """Tensors by the names of the table; names of masks that are left out; what is too many.

    Files of old versions leave the prefix out: what is known with it is meant.
    """
    found: dict[str, Stored] = {}
    surplus: dict[str, Stored] = {}
    ignored: list[str] = []
    for name, tensor in stored.items():
        known = name if name in wanted else family.prefix + name
        if known in wanted and known not in found:
            found[known] = tensor
        elif MASKS.fullmatch(name) and (len(tensor.shape) != 1 or name.endswith("inv_freq")):
            ignored.append(name)
        else:
            surplus[name] = tensor
    return found, ignored, surplus


def check_tied(head: Stored, embedding: Stored | None, source: Path, says: str) -> None:
    """A head that is saved although it is the embedding must be equal to it."""
    if embedding is None or not torch.equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{source}: '{head.name}' differs from the embedding, but {says} ties them; set "
            '"tie_word_embeddings": false there if the model has a head of its own'
        )


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
