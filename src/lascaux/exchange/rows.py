"""How the tensors of a Hugging Face folder and ours make up each other.

A row names the tensors that belong together on both sides and what is done with them. Every
arrangement is a permutation of numbers, so that both ways together change no bit; "unscaled" alone
multiplies, which is exact where the head width is a power of four (else to the last bit of fp32).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lascaux.config.schema import ModelConfig

Arrangement = Literal[
    "same", "transposed", "thirds", "below", "heads", "interleaved", "stacked", "unscaled"
]
"""same: as it is. transposed: theirs is (in, out), GPT-2's Conv1D. thirds: q, k and v side by side
in one (in, 3 out), GPT-2. below: q, k and v below each other, (3 out, in), GGUF. heads: q, k and v
of each head in turn, (H, 3, K) rows, GPT-NeoX and BLOOM. interleaved: rows j and K/2 + j of each
head are neighbours, Llama's q and k in GGUF. stacked: one tensor for each expert, ours has them
all. unscaled: queries of a network that does not divide scores by √K, GPT-Neo; ours are √K times
theirs."""
Names = tuple[tuple[str, str, Arrangement], ...]
"""ours, theirs, arrangement, without .weight and .bias; ours may be several words"""


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors of ours, the same numbers in theirs."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    arrangement: Arrangement


def same(**names: str) -> Names:
    """Rows of equal tensors: ours, with _ for a dot after attn and ffn, = theirs."""
    return tuple(
        (ours.replace("attn_", "attn.").replace("ffn_", "ffn."), theirs, "same")
        for ours, theirs in names.items()
    )


def each(parts: str, ours: str, theirs: str, arrangement: Arrangement = "same") -> Names:
    """A row for each part, by names that differ in it alone, where {part} stands for it."""
    return tuple(
        (ours.replace("{part}", part), theirs.replace("{part}", part), arrangement)
        for part in parts.split()
    )


def expand(names: Names, ours: str, theirs: str, experts: int, present: set[str]) -> list[Row]:
    """The rows of a table that concern tensors we have, with prefixes; {} stands for an expert."""
    rows: list[Row] = []
    for left, right, arrangement in names:
        for kind in ("weight", "bias"):
            mine = tuple(f"{ours}{name}.{kind}" for name in left.split())
            if any(name not in present for name in mine):
                continue
            numbers = range(experts) if arrangement == "stacked" else range(1)
            other = tuple(f"{theirs}{right}.{kind}".replace("{}", str(n)) for n in numbers)
            rows.append(Row(mine, other, arrangement))
    return rows


def to_ours(row: Row, tensors: Sequence[Tensor], model: ModelConfig) -> list[Tensor]:
    """Our tensors of a row from theirs."""
    first = tensors[0]
    match row.arrangement:
        case "same":
            return [first]
        case "transposed":
            return [first.t()]  # a bias stays
        case "thirds":
            return list(first.t().chunk(3))
        case "below":
            return list(first.chunk(3))
        case "heads":  # (H 3 K) D -> 3 x (H K) D
            split = first.unflatten(0, (model.num_heads, 3, model.head_width))
            return [part.flatten(0, 1) for part in split.unbind(1)]
        case "interleaved":  # (H K/2 2) D -> (H 2 K/2) D
            return [_swapped(first, (-1, model.head_width // 2, 2))]
        case "stacked":
            return [torch.stack(list(tensors))]
        case "unscaled":
            return [first.float() * math.sqrt(model.head_width)]


def to_theirs(row: Row, tensors: Sequence[Tensor], model: ModelConfig) -> list[Tensor]:
    """Their tensors of a row from ours; on the meta device their shapes."""
    first = tensors[0]
    match row.arrangement:
        case "same":
            return [first]
        case "transposed":
            return [first.t()]
        case "thirds":
            return [torch.cat(list(tensors)).t()]
        case "below":
            return [torch.cat(list(tensors))]
        case "heads":
            heads = [part.unflatten(0, (model.num_heads, model.head_width)) for part in tensors]
            return [torch.stack(heads, 1).flatten(0, 2)]
        case "interleaved":
            return [_swapped(first, (-1, 2, model.head_width // 2))]
        case "stacked":
            return list(first.unbind())
        case "unscaled":
            return [first / math.sqrt(model.head_width)]


def _swapped(tensor: Tensor, split: tuple[int, int, int]) -> Tensor:
    """Rows as heads of two dims, and those the other way round."""
    return tensor.unflatten(0, split).transpose(1, 2).flatten(0, 2)
