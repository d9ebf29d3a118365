"""What is done to each block before a network runs: recomputation and compilation."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from lascaux.config.schema import TrainConfig
from lascaux.model.transformer import Transformer


def prepare_blocks(network: Transformer, train: TrainConfig) -> None:
    """As `train.recompute` and `train.compile` say; then no cache can be handed in."""
    for block in network.blocks.values():
        if train.recompute == "block":  # only each block's input is kept for the backward pass
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if train.compile:  # blocks are alike, so only the first takes its time
            block.compile()
