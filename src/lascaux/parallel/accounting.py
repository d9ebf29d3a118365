"""Parameters and bytes that a process of a layout holds, from the config alone: no torch.

`model/accounting.py` counts the model; here its kinds go to pipeline stages, tp and FSDP, as
`plan.py` says. `lascaux prove --dry-run` measures the same on the real code.
"""

from lascaux.config.schema import Config, ModelConfig
from lascaux.model.accounting import (
    count_parameters,
    expert_parameters,
    norm_parameters,
    optimizer_state_bytes,
    output_bias_parameters,
)
from lascaux.parallel.layout import Layout
from lascaux.parallel.plan import stage_layers, stages_of


def held_parameters(model: ModelConfig, layout: Layout, virtual_pp: int, pp_index: int) -> float:
    """Parameters of one process, the mean over FSDP's shards, which differ by a row at most.

    A tied head in another stage than the embedding has a copy of it.
    """
    count, norm, layers = count_parameters(model), norm_parameters(model), model.num_layers
    num_stages = layout.pp * virtual_pp
    stages = stages_of(pp_index, layout.pp, virtual_pp)
    ranges = stage_layers(layers, num_stages)
    own = [layer for stage in stages for layer in ranges[stage]]
    mixtures = sum(model.is_mixture(layer) for layer in own)
    dense = len(own) - mixtures
    inner_norms = count.norm - norm * (1 + model.embedding_norm)
    whole = (inner_norms + output_bias_parameters(model)) / layers * len(own)
    whole += _of(mixtures, model.num_mixture_layers, count.router)
    shared = model.num_shared_experts * expert_parameters(model, model.expert_width)
    shared *= model.num_mixture_layers
    split = count.attention / layers * len(own) - output_bias_parameters(model) / layers * len(own)
    split += _of(dense, layers - model.num_mixture_layers, count.feed_forward - shared)
    split += _of(mixtures, model.num_mixture_layers, count.experts + shared)
    first, last = 0 in stages, num_stages - 1 in stages
    if first:
        split += count.embedding
        whole += count.position + norm * model.embedding_norm
    if last:
        split += count.head
        whole += norm
        if model.tie_embeddings and num_stages > 1:
            split += count.embedding
    return (split / layout.tp + whole) / layout.weight_shards


def _of(number: int, total: int, parameters: int) -> float:
    """The part of some of the layers that share these parameters."""
    return parameters * number / total if total else 0.0


def training_state_bytes_of_process(config: Config, layout: Layout, pp_index: int) -> int:
    """Bytes of fp32 weights, gradients and optimizer state on one process of a pipeline stage."""
    parameters = held_parameters(config.model, layout, config.parallel.virtual_pp, pp_index)
    total = count_parameters(config.model).total
    state = optimizer_state_bytes(config.model, config.optimizer.name) / total
    return round(parameters * (4 + 4 + state))


def largest_training_state_bytes(config: Config, layout: Layout) -> int:
    """Of the process that holds most."""
    return max(training_state_bytes_of_process(config, layout, i) for i in range(layout.pp))
