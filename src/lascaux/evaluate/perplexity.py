"""How well the model predicts held-out text: nats per token and bits per byte.

Shapes: B batch, T sequence.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lascaux.data.loader import NO_TARGET, Batch


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Cross-entropy over some text."""

    loss: float
    """nats per token"""
    bits_per_byte: float
    """bits per UTF-8 byte of the predicted text; comparable between tokenizers"""
    tokens: int
    text_bytes: int


@torch.inference_mode()
def measure_perplexity(
    forward: Callable[..., Tensor],
    batches: Iterable[Batch],
    byte_lengths: np.ndarray,
    device: torch.device,
) -> Perplexity:
    """Sum the losses of every target token and divide by tokens and by bytes.

    `forward` is a network that gives the sum of losses of a batch. `byte_lengths` gives the bytes
    of text of each token id; end-of-text tokens are predicted and cost nats but add no bytes.
    """
    nats, seen = 0.0, []
    for batch in batches:
        loss = forward(
            torch.as_tensor(batch.tokens, device=device),
            torch.as_tensor(batch.targets, device=device),
            positions=_optional(batch.positions, device),
            document_ids=_optional(batch.document_ids, device),
        )
        nats += loss.item()
        seen.append(batch)
    return perplexity(nats, seen, byte_lengths)


def perplexity(nats: float, batches: Iterable[Batch], byte_lengths: np.ndarray) -> Perplexity:
    """The figures of a sum of losses over all targets of the batches."""
    tokens, text_bytes = 0, 0
    for batch in batches:
        targets = batch.targets[batch.targets != NO_TARGET]
        tokens += targets.size
        text_bytes += int(byte_lengths[targets].sum())
    return Perplexity(
        loss=nats / tokens,
        bits_per_byte=nats / math.log(2) / max(1, text_bytes),
        tokens=tokens,
        text_bytes=text_bytes,
    )


def _optional(array: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if array is None else torch.as_tensor(array, device=device)
