"""What is done to each block before a network runs: recomputation and compilation."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from lascaux.config.schema import TrainConfig
from lascaux.model.moe import MixtureOfExperts
from lascaux.model.transformer import Block, Transformer


def prepare_blocks(network: Transformer, train: TrainConfig) -> None:
    """As `train.recompute` and `train.compile` say; then no cache can be handed in."""
    for block in network.blocks.values():
        assert isinstance(block, Block)
        if train.recompute == "block":  # only the input is kept for the backward pass
            for module in recomputed(block):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        if train.compile:  # blocks are alike, so only the first takes its time
            block.compile()


def recomputed(block: Block) -> list[nn.Module]:
    """The block; with experts its parts, since a router may choose otherwise a second time."""
    ffn = block.ffn
    if not isinstance(ffn, MixtureOfExperts):
        return [block]
    return [block.attn, ffn.experts, *([ffn.shared] if ffn.shared is not None else [])]
