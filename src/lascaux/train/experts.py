"""What the routers of a mixture did in a step: figures for the records, and the balance bias."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lascaux.config.schema import ModelConfig
from lascaux.model.moe import Router
from lascaux.parallel.shards import local, slab_of
from lascaux.parallel.world import World

DEFAULT_BALANCE_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class ExpertFigures:
    """Of one step, over all its tokens."""

    load: list[list[float]]
    """for each mixture layer each expert's share of the pairs, 1 being an even one"""
    dropped_fraction: float
    """pairs that no expert had room for"""
    router_entropy: float
    """nats, the mean over tokens and layers; log(experts) where a router has no opinion"""
    aux_loss: float
    """balance and z loss with their weights, summed over layers, for each token"""

    @property
    def largest_load(self) -> float:
        """The busiest expert of all layers, 1 being an even share."""
        return max(map(max, self.load))

    def record(self) -> dict[str, float]:
        """What goes into the line of a step."""
        return {
            "aux_loss": self.aux_loss,
            "largest_load": self.largest_load,
            "dropped_fraction": self.dropped_fraction,
            "router_entropy": self.router_entropy,
        }


@torch.no_grad()
def settle_experts(
    model: ModelConfig,
    routers: Mapping[int, Router],
    parameters: Iterable[tuple[str, Tensor]],
    world: World,
) -> ExpertFigures:
    """Add up what the routers of all processes did since the last step, and move the biases.

    A bias goes up where an expert had less than an even share and down where it had more, by the
    same step for all, and stays centred (Wang et al. 2024).
    """
    layers = [layer for layer in range(model.num_layers) if model.is_mixture(layer)]
    columns = model.num_experts + 5
    sums = torch.zeros(len(layers), columns, dtype=torch.float64, device=world.device)
    for row, layer in enumerate(layers):
        if layer in routers:
            report = routers[layer].report.sums
            sums[row] = report
            report.zero_()
    world.sum_over(sums, ("pp", "dp_replicate", "fsdp"))
    pairs = sums[:, : model.num_experts]
    of_layer = dict(zip(layers, pairs, strict=True))
    if model.balance == "bias":
        move_biases(model, of_layer, parameters)
    if model.balances_batches:
        remember_loads(of_layer, parameters)
    dropped, tokens, entropy, balance, z = sums[:, model.num_experts :].unbind(1)
    even = pairs.mean(1, keepdim=True).clamp(min=1e-9)
    return ExpertFigures(
        load=(pairs / even).tolist(),
        dropped_fraction=(dropped.sum() / (dropped.sum() + pairs.sum())).item(),
        router_entropy=(entropy / tokens).mean().item(),
        aux_loss=((balance + z) / tokens).sum().item(),
    )


def remember_loads(pairs: Mapping[int, Tensor], parameters: Iterable[tuple[str, Tensor]]) -> None:
    """What the next step's balance loss goes by: pairs beside an even share."""
    for name, parameter in parameters:
        if name.endswith("router.last_load"):
            load = pairs[int(name.split(".")[1])]
            local(parameter).copy_((load / load.mean())[slab_of(parameter)])


def move_biases(
    model: ModelConfig, pairs: Mapping[int, Tensor], parameters: Iterable[tuple[str, Tensor]]
) -> None:
    """One step of every balance bias, from the pairs that chose each expert."""
    rate = DEFAULT_BALANCE_RATE if model.balance_rate is None else model.balance_rate
    for name, parameter in parameters:
        if name.endswith("router.bias"):
            load = pairs[int(name.split(".")[1])]
            step = rate * (load.mean() - load).sign()
            local(parameter).add_((step - step.mean())[slab_of(parameter)])
