"""Context parallelism: a process has two pieces of every sequence, and gathers keys and values.

A sequence is cut into 2·cp pieces; process i has pieces i and 2·cp - 1 - i, so that all see equally
many keys. Keys and values are gathered over the axis, as in Llama 3's training (Grattafiori et al.
2024, section 3.3.2); everything else works on the process's own tokens.
Shapes: B batch, T tokens here, S tokens of the whole sequence, H heads, G kv heads, K head width.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from lascaux.data.loader import Batch
from lascaux.kernels.attention import attention
from lascaux.model.attention import Attend
from lascaux.model.moe import Load
from lascaux.model.transformer import Transformer
from lascaux.parallel.collectives import all_gather, gather

Mask = Tensor | None


def cut_sequences(batch: Batch, index: int, cp: int) -> Batch:
    """The columns of one process, with the positions that say where they stand."""
    num_seqs, seq_len = batch.tokens.shape
    positions = batch.positions
    if positions is None:
        positions = np.broadcast_to(np.arange(seq_len), (num_seqs, seq_len))
    columns = np.concatenate(np.split(np.arange(seq_len), 2 * cp)).reshape(2 * cp, -1)
    columns = columns[[index, 2 * cp - 1 - index]].ravel()
    ids = batch.document_ids
    return Batch(
        batch.tokens[:, columns],
        batch.targets[:, columns],
        None if ids is None else ids[:, columns],
        positions[:, columns],
    )


def split_context(model: Transformer, group: ProcessGroup) -> None:
    """Have every attention layer and the mask look at the whole sequence."""
    context = Context(group)
    model.mask.forward = context.mask_from(model.mask.forward)
    for attend in (m for m in model.modules() if isinstance(m, Attend)):
        attend.forward = context.attend
    for load in (m for m in model.modules() if isinstance(m, Load)):
        load.forward = context.add_up


class Context:
    """The pieces of the processes of one group."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        size, rank = group.size(), group.rank()
        self.num_pieces = 2 * size
        self.own = (rank, self.num_pieces - 1 - rank)
        gathered = [piece for r in range(size) for piece in (r, self.num_pieces - 1 - r)]
        self.order = sorted(range(self.num_pieces), key=gathered.__getitem__)

    def whole(self, gathered: Tensor, dim: int) -> Tensor:
        """What was gathered, in the order of the sequence."""
        pieces = gathered.chunk(self.num_pieces, dim)
        return torch.cat([pieces[place] for place in self.order], dim)

    def mask_from(self, whole_mask: Callable[..., Mask]) -> Callable[..., Mask]:
        """The mask of this process's queries to all keys."""

        def mask(
            num_queries: int,
            num_keys: int,
            document_ids: Int[Tensor, "B T"] | None,
            device: torch.device,
        ) -> Mask:
            seq_len = num_queries * self.group.size()
            if document_ids is not None:
                document_ids = self.whole(all_gather(document_ids, 1, self.group), 1)
            found = whole_mask(seq_len, seq_len, document_ids, device)
            if found is None:
                return None
            rows = found.chunk(self.num_pieces, 2)
            return torch.cat([rows[piece] for piece in self.own], 2)

        return mask

    def add_up(self, counts: Tensor, tokens: int) -> tuple[Tensor, int]:
        """The pairs of each expert over all pieces of the sequences."""
        dist.all_reduce(counts, group=self.group)
        return counts, tokens * self.group.size()

    def attend(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B G T K"],
        v: Float[Tensor, "B G T K"],
        mask: Mask,
    ) -> Float[Tensor, "B H T K"]:
        """Each of the two pieces of queries to all keys up to its own last."""
        k, v = (self.whole(gather(t, 2, self.group), 2) for t in (k, v))
        masks = (None, None) if mask is None else mask.chunk(2, 2)
        outputs = []
        for piece, queries, own_mask in zip(self.own, q.chunk(2, 2), masks, strict=True):
            end = (piece + 1) * queries.shape[2]
            if own_mask is not None:
                own_mask = own_mask[..., :end]
            outputs.append(attention(queries, k[:, :, :end], v[:, :, :end], own_mask))
        return torch.cat(outputs, 2)
