"""The time of a mixture of experts beside a dense layer of equal work and the usual loop.

Forward and backward pass of one layer, routing and losses included; every layer takes its turn in
each round, and a ratio is that of two passes of the same round.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lascaux.config.schema import ModelConfig
from lascaux.model.moe import MixtureOfExperts
from lascaux.model.transformer import FeedForward
from lascaux.units import format_duration

WARM_UP_ROUNDS = 2
SHAPES = ((8, 2), (32, 2), (64, 1), (64, 8))
"""experts, and experts of a token, each as wide as the dense layer divided by the latter"""
D_MODEL, D_FF, TOKENS = 256, 1024, 8192


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpeed:
    """One mixture; ratios are medians over the rounds, smallest and largest in brackets."""

    num_experts: int
    experts_per_token: int
    expert_d_ff: int
    dtype: str
    dense_seconds: float
    mixture_seconds: float
    loop_seconds: float
    times_dense: tuple[float, float, float]
    loop_times_mixture: tuple[float, float, float]


def bench_experts(
    device: torch.device, dtype: torch.dtype, rounds: int, done: Callable[[], None]
) -> list[ExpertSpeed]:
    """All shapes of `SHAPES`; weights in `dtype`, routers in fp32."""
    return [_bench(*shape, device, dtype, rounds, done) for shape in SHAPES]


def _bench(
    num_experts: int,
    per_token: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    done: Callable[[], None],
) -> ExpertSpeed:
    config = ModelConfig(
        d_model=D_MODEL,
        num_experts=num_experts,
        experts_per_token=per_token,
        expert_d_ff=D_FF // per_token,
    )
    with device:
        mixture, dense = MixtureOfExperts(config, None), FeedForward(config, D_FF)
        x = torch.randn(1, TOKENS, D_MODEL).to(dtype)
    for parameter in (*mixture.parameters(), *dense.parameters()):
        nn.init.normal_(parameter, std=0.02)
    mixture.experts.to(dtype)
    dense.to(dtype)
    mixture.router.loss_scale = 1 / TOKENS
    layers: list[Callable[[Tensor], Tensor]] = [dense, mixture, lambda h: usual_loop(mixture, h)]
    times: list[list[float]] = [[], [], []]
    for number in range(WARM_UP_ROUNDS + rounds):
        x = torch.randn_like(x)  # as in training, experts get other numbers of tokens each time
        for layer, seconds in zip(layers, times, strict=True):
            taken = _pass(layer, x, (*mixture.parameters(), *dense.parameters()))
            if number >= WARM_UP_ROUNDS:
                seconds.append(taken)
        done()
    first, second, loop = times
    return ExpertSpeed(
        num_experts=num_experts,
        experts_per_token=per_token,
        expert_d_ff=config.expert_width,
        dtype=str(dtype).removeprefix("torch."),
        dense_seconds=statistics.median(first),
        mixture_seconds=statistics.median(second),
        loop_seconds=statistics.median(loop),
        times_dense=_ratios(second, first),
        loop_times_mixture=_ratios(loop, second),
    )


def _pass(
    layer: Callable[[Tensor], Tensor], x: Tensor, parameters: tuple[nn.Parameter, ...]
) -> float:
    for parameter in parameters:
        parameter.grad = None
    inputs = x.clone().requires_grad_()
    _wait(x)
    started = time.perf_counter()
    layer(inputs).backward(torch.ones_like(x))
    _wait(x)
    return time.perf_counter() - started


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _ratios(above: list[float], below: list[float]) -> tuple[float, float, float]:
    found = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(found), min(found), max(found)


def usual_loop(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """What is usually written down: for each expert the rows that chose it, added to the output."""
    flat = x.flatten(0, 1)
    p = F.linear(flat.float(), layer.router.weight).softmax(-1)
    weights, experts = p.topk(layer.experts_per_token)
    y = torch.zeros_like(flat)
    for expert in range(p.shape[1]):
        rows, places = torch.where(experts == expert)
        up, down = layer.experts.up.weight[expert], layer.experts.down.weight[expert]
        made = F.linear(F.gelu(F.linear(flat[rows], up), approximate="tanh"), down)
        y.index_add_(0, rows, (made * weights[rows, places, None]).to(y.dtype))
    return y.view_as(x)


def describe_experts(found: list[ExpertSpeed]) -> str:
    """A table."""
    name = found[0].dtype
    lines = [
        f"one layer, forward and backward, {TOKENS:,} tokens of width {D_MODEL}, {name}; dense is "
        f"one of width {D_FF}, as much work for each token",
        f"{'experts':<9}{'a token':<9}{'width':<7}{'dense':>8}{'mixture':>9}{'x dense':>9}"
        f"{'':<15}{'loop':>8}{'x mixture':>11}",
    ]
    for one in found:
        middle, least, most = one.times_dense
        lines.append(
            f"{one.num_experts:<9}{one.experts_per_token:<9}{one.expert_d_ff:<7}"
            f"{format_duration(one.dense_seconds):>8}{format_duration(one.mixture_seconds):>9}"
            f"{middle:>9.2f}{f' ({least:.2f}-{most:.2f})':<15}"
            f"{format_duration(one.loop_seconds):>8}{one.loop_times_mixture[0]:>11.1f}"
        )
    return "\n".join(lines)
