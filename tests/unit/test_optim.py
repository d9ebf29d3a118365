"""Schedules by their defining points; optimizer groups; state that survives a round trip."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

from lascaux.config.schema import ModelConfig, OptimizerConfig, ScheduleConfig
from lascaux.errors import CheckpointError
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.muon import Muon
from lascaux.optim.optimizer import (
    build_optimizers,
    load_state_tensors,
    set_lr,
    state_tensors,
)
from lascaux.optim.schedule import lr_fraction

MODEL = ModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=31, norm_bias=True)


def test_cosine_meets_its_defining_points() -> None:
    schedule = ScheduleConfig(name="cosine", warmup_steps=10, final_lr_fraction=0.2)
    at = [lr_fraction(schedule, step, 110) for step in range(1, 111)]
    assert at[0] == 0.1 and at[9] == 1.0
    assert at[59] == pytest.approx(0.6)  # half-way between 1 and 0.2
    assert at[109] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(at[9:], at[10:], strict=False))


def test_wsd_is_flat_and_then_straight() -> None:
    schedule = ScheduleConfig(
        name="wsd", warmup_steps=10, decay_fraction=0.4, final_lr_fraction=0.0
    )
    at = [lr_fraction(schedule, step, 100) for step in range(1, 101)]
    assert at[9:60] == [1.0] * 51
    assert at[79] == pytest.approx(0.5) and at[99] == 0.0


def test_a_decay_of_everything_starts_where_the_warmup_ends() -> None:
    schedule = ScheduleConfig(name="wsd", warmup_steps=20, decay_fraction=1.0)
    at = [lr_fraction(schedule, step, 100) for step in range(1, 101)]
    assert at[19] == 1.0 and at[20] < 1.0
    assert at[99] == pytest.approx(0.1)


def test_constant_stays() -> None:
    schedule = ScheduleConfig(name="constant", warmup_steps=0)
    assert {lr_fraction(schedule, step, 50) for step in range(1, 51)} == {1.0}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_owner_and_only_matrices_decay(name: str) -> None:
    model = Transformer(MODEL)
    optimizers = build_optimizers(model.named_parameters(), OptimizerConfig(name=name))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owned = [parameter for group in groups for parameter in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))
    for group in groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
    assert set_lr(optimizers, 0.5) == pytest.approx(3e-4)


def adamw_reference(
    weights: list[torch.Tensor], gradients: list[list[torch.Tensor]], config: OptimizerConfig
) -> list[torch.Tensor]:
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    weights = [weight.double() for weight in weights]
    first = [torch.zeros_like(weight) for weight in weights]
    second = [torch.zeros_like(weight) for weight in weights]
    for step, gradient_list in enumerate(gradients, start=1):
        for i, gradient in enumerate(g.double() for g in gradient_list):
            first[i] = config.beta1 * first[i] + (1 - config.beta1) * gradient
            second[i] = config.beta2 * second[i] + (1 - config.beta2) * gradient**2
            m = first[i] / (1 - config.beta1**step)
            v = second[i] / (1 - config.beta2**step)
            decay = config.weight_decay if weights[i].ndim >= 2 else 0.0
            weights[i] = weights[i] - config.lr * (m / (v.sqrt() + config.eps) + decay * weights[i])
    return weights


def test_adamw_follows_the_paper() -> None:
    model = Transformer(MODEL)
    initialise(model, 0)
    config = OptimizerConfig(name="adamw", lr=1e-2)
    (optimizer,) = build_optimizers(model.named_parameters(), config)
    parameters = list(model.parameters())
    torch.manual_seed(0)
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(3)]
    wanted = adamw_reference([p.detach() for p in parameters], gradients, config)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for got, expected in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_equals_torchs(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    settings = dict(lr=0.02, weight_decay=0.1, momentum=0.9)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], newton_schulz_steps=5, compute_dtype=torch.bfloat16, **settings),
        torch.optim.Muon([theirs], ns_steps=5, adjust_lr_fn="match_rms_adamw", **settings),
    ]
    for gradient in gradients:
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    # both iterate in bf16, whose steps are 2^-8; updates have size 0.02 x 0.2 x sqrt(40) x 1/6
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_muon_makes_an_orthogonal_update_of_adamw_size() -> None:
    model = Transformer(MODEL)
    initialise(model, 0)
    muon = build_optimizers(
        model.named_parameters(), OptimizerConfig(name="muon", lr=1.0, weight_decay=0.0)
    )[0]
    (weight,) = [p for n, p in model.named_parameters() if n == "blocks.0.ffn.up.weight"]
    before = weight.detach().clone()
    for parameter in muon.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    update = (weight - before).detach() / (0.2 * math.sqrt(max(weight.shape)))
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5 and singular.max() < 1.4  # five quintic iterations, bf16


def ranges(saved: dict[str, torch.Tensor], wanted: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: saved[name][slab] for name, slab in wanted.items()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_survives_a_round_trip_bit_for_bit(name: str) -> None:
    def two_steps_and_one(restore: bool) -> dict[str, torch.Tensor]:
        model = Transformer(MODEL)
        initialise(model, 0)
        optimizers = build_optimizers(model.named_parameters(), OptimizerConfig(name=name, lr=1e-2))
        for step in range(3):
            if restore and step == 2:
                saved = {
                    k: v.clone()
                    for k, v in state_tensors(model.named_parameters(), optimizers).items()
                }
                optimizers = build_optimizers(
                    model.named_parameters(), OptimizerConfig(name=name, lr=1e-2)
                )
                load_state_tensors(
                    model.named_parameters(), optimizers, saved, partial(ranges, saved)
                )
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters()}

    straight, restored = two_steps_and_one(False), two_steps_and_one(True)
    for key, value in straight.items():
        assert torch.equal(value, restored[key]), key


def test_state_is_whole_before_the_first_update() -> None:
    muon = build_optimizers(Transformer(MODEL).named_parameters(), OptimizerConfig(name="muon"))[0]
    for parameter in muon.param_groups[0]["params"]:
        assert torch.equal(muon.state[parameter]["momentum_buffer"], torch.zeros_like(parameter))


def test_state_of_another_optimizer_is_refused() -> None:
    model = Transformer(MODEL)
    adamw = build_optimizers(model.named_parameters(), OptimizerConfig(name="adamw"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw[0].step()
    saved = state_tensors(model.named_parameters(), adamw)
    muon = build_optimizers(model.named_parameters(), OptimizerConfig(name="muon"))
    with pytest.raises(CheckpointError, match="saved with another optimizer.name"):
        load_state_tensors(model.named_parameters(), muon, saved, partial(ranges, saved))
    del saved["embed.weight.exp_avg"]
    with pytest.raises(CheckpointError, match=r"no optimizer state 'embed.weight.exp_avg'"):
        load_state_tensors(
            model.named_parameters(),
            build_optimizers(model.named_parameters(), OptimizerConfig()),
            saved,
            partial(ranges, saved),
        )
