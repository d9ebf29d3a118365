"""How well the model predicts held-out text: nats per token and bits per byte.

Shapes: B batch, T sequence.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lascaux.data.loader import NO_TARGET, Batch
from lascaux.model.transformer import Transformer


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
    model: Transformer,
    batches: Iterable[Batch],
    byte_lengths: np.ndarray,
    device: torch.device,
    precision: AbstractContextManager[object],
) -> Perplexity:
    """Sum the losses of every target token, in fp64, and divide by tokens and by bytes.

    `byte_lengths` gives the bytes of text of each token id; end-of-text tokens are predicted and
    cost nats but add no bytes.
    """
    nats, tokens, text_bytes = 0.0, 0, 0
    for batch in batches:
        with precision:
            logits = model(
                torch.as_tensor(batch.tokens, device=device),
                positions=_optional(batch.positions, device),
                document_ids=_optional(batch.document_ids, device),
            )
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(),
            torch.as_tensor(batch.targets, device=device).flatten(),
            ignore_index=NO_TARGET,
            reduction="none",
        )
        nats += losses.double().sum().item()
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
