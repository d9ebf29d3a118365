"""Mixtures of experts against a loop over tokens written apart, in fp64, and by properties."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lascaux.config.check import check_model
from lascaux.config.schema import ModelConfig
from lascaux.errors import ConfigError
from lascaux.kernels import grouped
from lascaux.kernels.grouped import grouped_linear, pad_groups, sum_pairs, take_rows
from lascaux.model import moe
from lascaux.model.moe import MixtureOfExperts, order_pairs
from lascaux.model.transformer import FeedForward, make_feed_forward

SCALE = 0.37


def make(dtype: torch.dtype = torch.float64, **settings: Any) -> MixtureOfExperts:
    base: dict[str, Any] = dict(
        num_layers=1, d_model=12, num_heads=1, d_ff=20, num_experts=8, position="none"
    )
    config = ModelConfig(**(base | settings))
    check_model(config)
    layer = make_feed_forward(config, 0).to(dtype)
    assert isinstance(layer, MixtureOfExperts)
    draw = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(dtype)
    layer.router.loss_scale = SCALE
    return layer


def expert(config: ModelConfig, up: Tensor, gate: Tensor | None, down: Tensor, x: Tensor) -> Tensor:
    if gate is not None:
        return down @ (F.silu(gate @ x) * (up @ x))
    return down @ F.gelu(up @ x, approximate="tanh")


def by_token(layer: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the sum of balance and z losses, each token on its own."""
    config, experts = layer.router.config, layer.experts
    E, K = config.num_experts, config.experts_per_token
    outputs, probabilities, z = [], [], x.new_zeros(())
    busy = [0] * E
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token
        p = logits.softmax(0) if config.router_score == "softmax" else logits.sigmoid()
        order = p + layer.router.bias if config.balance == "bias" else p
        chosen = sorted(range(E), key=lambda e: -order[e].item())[:K]
        total = sum(p[e] for e in chosen) if config.normalises_weights else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            busy[e] += 1
            gate = experts.gate.weight[e] if config.activation == "swiglu" else None
            made = expert(config, experts.up.weight[e], gate, experts.down.weight[e], token)
            y = y + config.router_scale * p[e] / total * made
        if layer.shared is not None:
            y = y + layer.shared(token[None, None])[0, 0]
        outputs.append(y)
        probabilities.append(p / p.sum())
        z = z + torch.logsumexp(logits, 0) ** 2
    mean = torch.stack(probabilities).mean(0)
    N = len(outputs)
    balance = E * sum(n / (K * N) * mean[e] for e, n in enumerate(busy)) * N
    losses = config.router_z_weight * z
    if config.balance == "loss":
        losses = losses + config.balance_weight * balance
    return torch.stack(outputs).view_as(x), losses


def compare(layer: MixtureOfExperts, shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(*shape, layer.router.config.d_model, generator=draw, dtype=torch.float64)
    x.requires_grad_()
    grad = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    wanted_named = [(n, p) for n, p in layer.named_parameters() if p.requires_grad]
    inputs = [x, *(p for _, p in wanted_named)]
    got = layer(x)
    found = torch.autograd.grad((got * grad).sum(), inputs)
    want, losses = by_token(layer, x)
    wanted = torch.autograd.grad(
        (want * grad).sum() + SCALE * losses, inputs, allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    for (name, _), a, b in zip([("x", x), *wanted_named], found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("num_experts", "per_token"), [(e, k) for e in (1, 2, 8, 64) for k in (1, 2, 8) if k <= e]
)
@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh"])
def test_outputs_and_gradients_are_those_of_the_tokens(
    num_experts: int, per_token: int, activation: str
) -> None:
    sizes = dict(num_experts=num_experts, experts_per_token=per_token, activation=activation)
    for shape in ((1, 1), (2, 9)):  # 64 experts then have many without a token
        compare(make(**sizes), shape)
        compare(make(**sizes, d_model=7, d_ff=9, num_shared_experts=2), shape)


@pytest.mark.parametrize(
    "settings",
    [
        dict(router_score="sigmoid", balance="bias"),
        dict(router_score="sigmoid", router_scale=2.5, num_shared_experts=1),
        dict(router_normalize=False, balance="none"),
        dict(router_normalize=True, experts_per_token=1, router_z_weight=0.0),
        dict(expert_d_ff=4, experts_per_token=4),
    ],
    ids=str,
)
def test_settings_of_the_router_are_those_of_the_tokens(settings: dict[str, Any]) -> None:
    compare(make(**settings), (3, 5))


def test_one_expert_is_the_dense_layer() -> None:
    for activation in ("swiglu", "relu_squared"):
        layer = make(num_experts=1, experts_per_token=1, activation=activation)
        dense = FeedForward(layer.router.config, 20).double()
        for name in ("up", "gate", "down")[:: 1 if activation == "swiglu" else 2]:
            matrix = getattr(layer.experts, name).weight
            getattr(dense, name).weight = torch.nn.Parameter(matrix[0].detach())
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        torch.testing.assert_close(layer(x), dense(x), atol=1e-12, rtol=1e-12)


def test_a_capacity_without_end_drops_nothing() -> None:
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    for drop_by in ("position", "probability"):
        wide = make(capacity_factor=8.0, drop_by=drop_by)
        torch.testing.assert_close(wide(x), make()(x), atol=1e-12, rtol=1e-12)


def test_a_capacity_keeps_who_comes_first_or_is_likeliest() -> None:
    """Eight pairs, two experts: room for ⌈0.5 · 8 / 2⌉ = 2 each."""
    config = ModelConfig(num_experts=2, experts_per_token=2, capacity_factor=0.5)
    experts = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]])
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]])
    pairs, counts = order_pairs(experts, weights, config)
    # all first choices go before all second ones: expert 0 takes tokens 0 and 1, expert 1 2 and 0
    assert pairs.tolist() == [0, 2, 4, 1] and counts.tolist() == [2, 2]
    likeliest = dataclasses.replace(config, drop_by="probability")
    pairs, counts = order_pairs(experts, weights, likeliest)
    assert pairs.tolist() == [2, 6, 4, 1] and counts.tolist() == [2, 2]


def test_dropped_pairs_add_nothing_and_are_counted() -> None:
    layer = make(experts_per_token=1, capacity_factor=0.25, balance="none", router_z_weight=0.0)
    layer.router.weight.data.zero_()
    layer.router.weight.data[3] = 1.0
    x = torch.rand(1, 16, 12, dtype=torch.float64) + 0.1  # all choose expert 3, with room for one
    y = layer(x)
    assert (y[0, 1:] == 0).all() and (y[0, 0] != 0).any()
    sums = layer.router.report.sums
    assert sums[:8].tolist() == [0, 0, 0, 1, 0, 0, 0, 0] and sums[8] == 15 and sums[9] == 16


@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_the_balance_loss_is_one_for_even_choices(per_token: int) -> None:
    layer = make(experts_per_token=per_token, balance_weight=1.0, router_z_weight=0.0)
    p = torch.full((8, 8), 1 / 8, dtype=torch.float64)
    experts = (torch.arange(8)[:, None] + torch.arange(per_token)) % 8
    balance, _ = layer.router.losses(p.log(), p, experts)
    assert balance.item() / 8 == pytest.approx(1.0, abs=1e-12)
    crowded, _ = layer.router.losses(p.log(), p.roll(0) * 0 + torch.eye(8)[0], experts * 0)
    assert crowded.item() / 8 == pytest.approx(8.0)


def test_a_switch_router_has_a_gradient_and_losses_of_weight_zero_have_none() -> None:
    layer = make(experts_per_token=1, balance_weight=0.0, router_z_weight=0.0)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.router.weight.grad is not None and layer.router.weight.grad.abs().max() > 0
    normalised = make(
        experts_per_token=1, router_normalize=True, balance_weight=0.0, router_z_weight=0.0
    )
    normalised(x).sum().backward()
    assert normalised.router.weight.grad is not None
    assert normalised.router.weight.grad.abs().max() < 1e-12


def test_figures_are_of_training_alone() -> None:
    layer = make()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    assert not layer.router.report.sums.any()
    layer.train()(x)
    sums = layer.router.report.sums
    assert sums[:8].sum() == 20 and sums[8] == 0 and sums[9] == 10
    assert 0 < sums[10] / 10 < math.log(8)


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    width=st.sampled_from([1, 7, 8, 16]),
    out=st.sampled_from([3, 8, 24]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    few=st.sampled_from([0, 32]),
)
def test_grouped_products_are_those_of_each_group(
    counts: list[int], width: int, out: int, dtype: torch.dtype, few: int
) -> None:
    draw = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), width, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), out, width, generator=draw).to(dtype).requires_grad_()
    wanted = torch.cat([r @ w.T for r, w in zip(x.split(counts), weight.unbind(), strict=True)])
    grad = torch.randn(wanted.shape, generator=draw).to(dtype)
    got = grouped_linear(x, weight, torch.tensor(counts))
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(got, wanted, atol=bound, rtol=bound)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight), grad),
        torch.autograd.grad(wanted, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=bound, rtol=bound)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "FEW_ROWS", few)
        again = grouped_linear(x, weight, torch.tensor(counts))
    torch.testing.assert_close(again, wanted.detach(), atol=bound, rtol=bound)


@pytest.mark.parametrize("call_multiplications", [0, 10**9])
@pytest.mark.parametrize("shape", [(8, 2, 3), (8, 1, 40), (1, 1, 5), (64, 4, 17)])
def test_rows_added_for_speed_change_nothing(
    shape: tuple[int, int, int], call_multiplications: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of a multiple of 16 rows, or all of one size, as in bf16 on a CPU; here in fp64."""
    num_experts, per_token, tokens = shape
    layer = make(num_experts=num_experts, experts_per_token=per_token)
    x = torch.randn(1, tokens, 12, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1, tokens, 12, dtype=torch.float64)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    plain = layer(x)
    plain_gradients = torch.autograd.grad(plain, inputs, grad)
    asked = []
    monkeypatch.setattr(grouped, "CALL_MULTIPLICATIONS", call_multiplications)
    monkeypatch.setattr(grouped, "pads_groups", lambda x: True)
    monkeypatch.setattr(moe, "pads_groups", lambda x: asked.append(len(x)) or True)
    padded = layer(x)
    torch.testing.assert_close(padded, plain, atol=1e-12, rtol=1e-12)
    found = torch.autograd.grad(padded, inputs, grad)
    for a, b in zip(found, plain_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert asked == [per_token * tokens]
    counts = torch.tensor([3, 0, 17, 1])
    padding = pad_groups(21, counts, 100)
    wanted = [32] * 4 if call_multiplications else [16, 0, 32, 16]
    assert padding.counts.tolist() == wanted


def test_sums_of_pairs_with_some_left_out() -> None:
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    pairs = torch.tensor([6, 0, 1, 5, 4])
    wanted = torch.zeros(8, 3, dtype=torch.float64).index_put((pairs,), y)
    wanted = (wanted.view(4, 2, 3) * weights[..., None]).sum(1)
    torch.testing.assert_close(sum_pairs(y, pairs, weights), wanted)
    assert torch.autograd.gradcheck(lambda y, w: sum_pairs(y, pairs, w), (y, weights))
    assert torch.autograd.gradcheck(lambda x: take_rows(x, pairs, 2), (x,))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(num_experts=0, experts_per_token=3), "'model.experts_per_token' has no effect"),
        (dict(num_experts=2, experts_per_token=4), "more than num_experts 2"),
        (dict(num_dense_layers=5), "leave none of the 1 layers"),
        (dict(drop_by="probability"), "'model.drop_by' has no effect without"),
        (dict(balance_rate=0.1), "'model.balance_rate' has no effect"),
        (dict(balance="none", balance_weight=0.5), "'model.balance_weight' has no effect"),
        (dict(ffn_bias=True), "have no biases"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**settings)
