"""Mixture of experts: a feed-forward layer of which each token visits a few parts.

    p = softmax(x W)  or sigmoid              the router, in fp32 at least
    experts of a token: the k largest of p + bias; weights: their p, perhaps divided by their sum
    y = Σ weight · expert(x)  +  shared experts(x)

Switch (Fedus et al. 2021) is k = 1 with the weight p itself, which is what gives the router a
gradient, and a capacity; GShard (Lepikhin et al. 2020) k = 2; OLMoE and Mixtral drop nothing.
Every loss here is for each token and is added to the sum of token losses, so that sums stay sums.
Shapes: B batch, T sequence, N tokens, D d_model, E experts, K experts of a token, P pairs of a
token and an expert that are computed, H expert width.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lascaux.config.schema import ModelConfig
from lascaux.kernels.activation import activate
from lascaux.kernels.grouped import (
    add_rows,
    grouped_linear,
    leave_out_rows,
    pad_groups,
    pads_groups,
    sum_pairs,
    take_rows,
)


class Routing(NamedTuple):
    """Who goes where."""

    experts: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]
    pairs: Int[Tensor, " P"]
    """numbers n · K + j of the pairs that are computed, in order of their experts"""
    counts: Int[Tensor, " E"]
    """of those pairs"""


class Draws:
    """Random numbers of a router that follow from a key and the number of the micro-batch alone.

    This process's micro-batches are `first`, `first + stride` and so on.
    """

    def __init__(self, key: str, first: int, stride: int) -> None:
        self.key, self.microbatch, self.stride = key, first, stride

    def factors(self, x: Float[Tensor, "N D"], reach: float) -> Float[Tensor, "N D"]:
        """For the next micro-batch: even between 1 - reach and 1 + reach."""
        digest = hashlib.blake2b(f"{self.key}/{self.microbatch}".encode(), digest_size=8).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "big") >> 1)
        self.microbatch += self.stride
        return torch.empty_like(x).uniform_(1 - reach, 1 + reach, generator=generator)


class Load(nn.Module):
    """Pairs that chose each expert; a module, so that a plan may add up a sequence's pieces."""

    def forward(self, counts: Float[Tensor, " E"], tokens: int) -> tuple[Tensor, int]:
        """Those of all tokens of a micro-batch, and how many tokens it has."""
        return counts, tokens


class Router(nn.Module):
    """Chooses experts and weighs them; also the losses that keep its choices even and small.

    `bias` chooses but never weighs (Wang et al. 2024); the trainer moves it, not a gradient, and
    writes each expert's load in the last whole batch into `last_load`, where the loss goes by that.
    `loss_scale` is what a token's loss counts in the loss that is differentiated: one over the
    tokens of the batch; 0 leaves the losses out.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        if config.balance == "bias":
            self.bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
        if config.balances_batches:
            self.last_load = nn.Parameter(torch.ones(config.num_experts), requires_grad=False)
        self.load = Load()
        self.draws = Draws("", 0, 1)
        self.loss_scale = 0.0
        self.report = Report(config.num_experts)

    def forward(self, x: Float[Tensor, "N D"]) -> Routing:
        """The routing; the gradient of the losses leaves beside that of the weights."""
        config = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        if config.router_jitter and self.training and torch.is_grad_enabled():
            x = x * self.draws.factors(x, config.router_jitter)
        logits = F.linear(x, self.weight.to(wide))
        p = logits.softmax(-1) if config.router_score == "softmax" else logits.sigmoid()
        chosen_by = p.detach() + self.bias.to(wide) if config.balance == "bias" else p.detach()
        experts = chosen_by.topk(config.experts_per_token).indices
        weights = p.gather(-1, experts)
        if config.normalises_weights:
            weights = weights / weights.sum(-1, keepdim=True)
        pairs, counts = order_pairs(experts, weights.detach(), config)
        losses = self.losses(logits, p, experts)
        if self.training and torch.is_grad_enabled():
            self.report.add(p, counts, experts.numel(), losses)
        weights = AddLoss.apply(weights * config.router_scale, losses.sum(), self.loss_scale)
        return Routing(experts, weights, pairs, counts)

    def losses(
        self, logits: Float[Tensor, "N E"], p: Float[Tensor, "N E"], experts: Int[Tensor, "N K"]
    ) -> Float[Tensor, " 2"]:
        """Balance and z loss, each the sum over these tokens.

        Balance is E Σ (share of pairs) (mean p), 1 where all is even, for any K; z is the mean
        squared logsumexp of the logits (Zoph et al. 2022).
        """
        config, losses = self.config, logits.new_zeros(2)
        if config.balance == "loss" and config.balance_weight:
            shares = p / p.sum(-1, keepdim=True)  # as they are for softmax
            losses[0] = config.balance_weight * self.relative_load(p, experts) @ shares.sum(0)
        if config.router_z_weight:
            losses[1] = config.router_z_weight * logits.logsumexp(-1).square().sum()
        return losses

    def relative_load(
        self, p: Float[Tensor, "N E"], experts: Int[Tensor, "N K"]
    ) -> Float[Tensor, " E"]:
        """Pairs of each expert beside an even share: in this micro-batch, or in the last batch."""
        config = self.config
        if config.balances_batches:
            return self.last_load.detach().to(p.dtype)
        chosen = count(experts.flatten(), config.num_experts).to(p.dtype)
        chosen, tokens = self.load(chosen, len(p))
        return chosen * (config.num_experts / (config.experts_per_token * tokens))


def count(experts: Int[Tensor, " P"], num_experts: int) -> Int[Tensor, " E"]:
    """How often each occurs; of a size that is known beforehand, as bincount's is not."""
    return experts.new_zeros(num_experts).scatter_add_(0, experts, torch.ones_like(experts))


def order_pairs(
    experts: Int[Tensor, "N K"], weights: Float[Tensor, "N K"], config: ModelConfig
) -> tuple[Int[Tensor, " P"], Int[Tensor, " E"]]:
    """The pairs that are computed in order of their experts, and how many each expert has.

    With a capacity an expert takes the pairs that come first, first choices before second ones, or
    the likeliest ones, and drops the rest before anything is computed.
    """
    flat = experts.flatten()
    if config.capacity_factor is None:
        return flat.argsort(stable=True), count(flat, config.num_experts)
    num_tokens, per_token = experts.shape
    room = math.ceil(config.capacity_factor * len(flat) / config.num_experts)
    if config.drop_by == "probability":
        precedence = weights.flatten().argsort(descending=True, stable=True)
    else:
        numbers = torch.arange(len(flat), device=flat.device).view(num_tokens, per_token)
        precedence = numbers.T.flatten()
    pairs = precedence[flat[precedence].argsort(stable=True)]
    counts = count(flat, config.num_experts)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(flat), device=flat.device) - starts[flat[pairs]]
    return pairs[place < room], counts.clamp(max=room)


class AddLoss(torch.autograd.Function):
    """x; backwards its gradient, and that of a loss with this scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        """x as it is, but no view, which FSDP would have to warn of."""
        ctx.scale, ctx.dtype, ctx.device = scale, loss.dtype, loss.device
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """The gradient of x, and `scale`."""
        return grad, torch.tensor(ctx.scale, dtype=ctx.dtype, device=ctx.device), None


class Report(nn.Module):
    """What a router did since it was last asked: one row of sums.

    Pairs of each expert, then pairs that were dropped, tokens, the entropy of p in nats, balance
    loss, z loss (both with their weights).
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        sums = torch.zeros(num_experts + 5, dtype=torch.float64)  # exact for any number of tokens
        self.register_buffer("sums", sums, persistent=False)
        self.sums: Tensor

    @torch.no_grad()
    def add(self, p: Tensor, counts: Tensor, num_pairs: int, losses: Tensor) -> None:
        """The tokens of one pass."""
        entropy = -(p * p.clamp(min=1e-30).log()).sum()
        rest = torch.stack(
            [num_pairs - counts.sum(), counts.new_tensor(len(p)), entropy, *losses.unbind()]
        )
        self.sums += torch.cat([counts, rest]).to(self.sums.dtype)


def routers_of(model: nn.Module) -> dict[int, Router]:
    """The routers of a network or a part of one, by their layer."""
    return {
        int(name.split(".")[1]): module
        for name, module in model.named_modules()
        if isinstance(module, Router)
    }


def set_loss_scale(routers: Mapping[int, Router], scale: float) -> None:
    """What a token's balance and z loss count in the loss that is differentiated."""
    for router in routers.values():
        router.loss_scale = scale


def set_draws(routers: Mapping[int, Router], key: str, first: int, stride: int) -> None:
    """Begin a step's random numbers; `key` names seed and step."""
    for layer, router in routers.items():
        router.draws = Draws(f"{key}/{layer}", first, stride)


class GroupedLinear(nn.Module):
    """A matrix for each expert."""

    def __init__(self, num_experts: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width_out, width_in))

    def forward(self, x: Float[Tensor, "P I"], counts: Int[Tensor, " E"]) -> Float[Tensor, "P O"]:
        """Rows in order of their experts."""
        return grouped_linear(x, self.weight, counts)


class Experts(nn.Module):
    """The feed-forward networks of all experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        shape = config.num_experts, config.d_model, config.expert_width
        self.up = GroupedLinear(*shape)
        if config.activation == "swiglu":
            self.gate = GroupedLinear(*shape)
        self.down = GroupedLinear(config.num_experts, config.expert_width, config.d_model)

    def forward(self, x: Float[Tensor, "P D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "P D"]:
        """Rows in order of their experts."""
        if not pads_groups(x):
            return self.compute(x, counts)
        padding = pad_groups(len(x), counts, self.up.weight[0].numel())
        return leave_out_rows(self.compute(add_rows(x, padding), padding.counts), padding)

    def compute(self, x: Float[Tensor, "P D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "P D"]:
        """The same; fastest where few sizes of groups occur."""
        gate = self.gate(x, counts) if self.activation == "swiglu" else None
        return self.down(activate(self.activation, self.up(x, counts), gate), counts)


class Spread(nn.Module):
    """Takes rows to their experts; a module, so that a plan may send them to other processes."""

    def forward(
        self,
        x: Float[Tensor, "P D"],
        counts: Int[Tensor, " E"],
        experts: Callable[[Tensor, Tensor], Tensor],
    ) -> Float[Tensor, "P D"]:
        """What the experts make of the rows, in the order of the rows."""
        return experts(x, counts)


class MixtureOfExperts(nn.Module):
    """In the place of a feed-forward layer; `shared` is one that every token visits."""

    def __init__(self, config: ModelConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.router, self.experts, self.spread = Router(config), Experts(config), Spread()
        self.shared = shared

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each token on its own."""
        flat = x.flatten(0, 1)
        routing = self.router(flat)
        rows = take_rows(flat, routing.pairs, self.experts_per_token)
        made = self.spread(rows, routing.counts, self.experts)
        y = sum_pairs(made, routing.pairs, routing.weights).view_as(x)
        return y if self.shared is None else y + self.shared(x)
