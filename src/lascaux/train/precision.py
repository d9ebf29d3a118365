"""The network in the dtype it computes in, beside the fp32 weights that the optimizer owns."""

import copy
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from lascaux.config.schema import TrainConfig
from lascaux.model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WorkingCopy:
    """What computes losses and gradients: the model itself in fp32, else a copy in lower precision.

    The copy is rounded once for each step, not once for each use. Its gradients are in its dtype
    and are summed over micro-batches in the model's (Micikevicius et al. 2018, section 3.1).
    """

    def __init__(self, model: Transformer, train: TrainConfig) -> None:
        dtype = DTYPES[train.precision]
        self.model = model
        self.network = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
        if train.recompute == "block":
            recompute_blocks(self.network)
        if train.compile:
            for block in self.network.blocks.values():  # alike, so only the first takes its time
                block.compile()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights as they are now."""
        if self.network is not self.model:
            torch._foreach_copy_(list(self.network.parameters()), list(self.model.parameters()))

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the copy's gradients to the model's and clear them."""
        if self.network is self.model:
            return  # they are the same tensors
        for weight, working in zip(self.model.parameters(), self.network.parameters(), strict=True):
            if working.grad is None:
                continue
            if weight.grad is None:
                weight.grad = working.grad.to(weight.dtype)
            else:
                weight.grad.add_(working.grad)
            working.grad = None


def recompute_blocks(network: Transformer) -> None:
    """Keep only each block's input for the backward pass; a cache-free forward pass alone."""
    for block in network.blocks.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
