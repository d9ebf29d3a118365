"""The model of a configuration, split over a world of several processes."""

import torch

from lascaux.config.schema import Config
from lascaux.parallel.apply import Initialise, initialise_shards
from lascaux.parallel.pipeline import PipelineModel
from lascaux.parallel.split import SplitModel
from lascaux.parallel.world import World


def split_network(
    config: Config,
    world: World,
    dtype: torch.dtype,
    initialise: Initialise = initialise_shards,
) -> SplitModel | PipelineModel:
    """This process's part, with its initial weights; it computes in `dtype`."""
    if world.layout.pp == 1:
        return SplitModel(config, world, dtype, initialise)
    train = config.train
    microbatches = train.batch_tokens // (train.microbatch_seqs * train.seq_len)
    own = microbatches // world.layout.data_parallel
    return PipelineModel(config, world, dtype, own, initialise)
