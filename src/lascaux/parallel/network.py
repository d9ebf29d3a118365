"""The model of a configuration, split over a world of several processes."""

import torch

from lascaux.config.schema import Config
from lascaux.parallel.pipeline import PipelineModel
from lascaux.parallel.split import SplitModel
from lascaux.parallel.world import World


def split_network(config: Config, world: World, dtype: torch.dtype) -> SplitModel | PipelineModel:
    """This process's part, with its initial weights; it computes in `dtype`."""
    if world.layout.pp == 1:
        return SplitModel(config, world, dtype)
    train = config.train
    microbatches = train.batch_tokens // (train.microbatch_seqs * train.seq_len)
    return PipelineModel(config, world, dtype, microbatches // world.layout.data_parallel)
