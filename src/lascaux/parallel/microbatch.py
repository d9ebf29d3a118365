"""The loss of one micro-batch, and sums over micro-batches in a fixed order.

Shapes: B batch, T sequence.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lascaux.data.loader import Batch
from lascaux.parallel.world import World


def network_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor | None]:
    """The arguments of `Transformer.forward` by their names."""
    arrays = {
        "tokens": batch.tokens,
        "targets": batch.targets,
        "positions": batch.positions,
        "document_ids": batch.document_ids,
    }
    return {
        name: None if array is None else torch.as_tensor(array, device=device)
        for name, array in arrays.items()
    }


def loss_sum(forward: Callable[..., Tensor], batch: Batch, device: torch.device) -> Tensor:
    """Sum of the token losses of one micro-batch, nats, in fp32."""
    return forward(**network_inputs(batch, device))


def loss_scale(microbatches: Sequence[Batch], world: World) -> float:
    """What a token's loss of a router counts: one over the tokens of the whole batch.

    `microbatches` are those of this process; every process of tp sees all of a micro-batch.
    """
    own = sum(batch.tokens.size for batch in microbatches)
    return 1 / (own * world.layout.data_parallel * world.layout.tp)


class TreeSum:
    """A sum of lists of tensors along a binary tree over the order in which they come.

    Like a binary counter: two partial sums of equally many terms become one. A process that adds up
    every R-th term, R a power of two, adds the upper part of the tree of all of them.
    """

    def __init__(self) -> None:
        self._partial: list[tuple[int, list[Tensor]]] = []

    def add(self, terms: list[Tensor]) -> None:
        """One more term of the sum, in every list position."""
        count = 1
        while self._partial and self._partial[-1][0] == count:
            terms = [a + b for a, b in zip(self._partial.pop()[1], terms, strict=True)]
            count *= 2
        self._partial.append((count, terms))

    def result(self) -> list[Tensor]:
        """The sums; their number of terms must be a power of two."""
        ((_, sums),) = self._partial
        return sums


def add_pairs(parts: list[Tensor]) -> Tensor:
    """The sum of a power of two of tensors, neighbours first."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
