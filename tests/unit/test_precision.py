"""The working copy: rounded weights, gradients summed in fp32, the same curve as fp32."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from lascaux.config.schema import ModelConfig, TrainConfig
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.train.precision import WorkingCopy
from tests.conftest import metrics

CONFIG = ModelConfig(num_layers=2, d_model=32, num_heads=2, vocab_size=41, tie_embeddings=True)


def model() -> Transformer:
    made = Transformer(CONFIG)
    initialise(made, seed=0)
    return made


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(0, CONFIG.vocab_size, (2, 16), generator=draw) for _ in range(2))  # type: ignore[misc]
        for _ in range(count)
    ]


def test_fp32_computes_in_the_model_itself() -> None:
    made = model()
    working = WorkingCopy(made, TrainConfig(precision="fp32"))
    assert working.network is made


def test_the_copy_holds_the_rounded_weights_and_one_tensor_for_a_tied_head() -> None:
    made = model()
    working = WorkingCopy(made, TrainConfig(precision="bf16"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    working.refresh()
    copied = dict(working.network.named_parameters())
    for name, parameter in made.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(copied[name], parameter.bfloat16())
    weight, _ = working.network.head_parameters()
    assert weight is working.network.embed.weight


def test_gradients_of_microbatches_are_summed_in_fp32() -> None:
    made = model()
    working = WorkingCopy(made, TrainConfig(precision="bf16"))
    wanted = {name: torch.zeros_like(p) for name, p in made.named_parameters()}
    for tokens, targets in batches(3):
        alone = WorkingCopy(model(), TrainConfig(precision="bf16"))
        alone.network(tokens, targets).backward()
        for name, parameter in alone.network.named_parameters():
            assert parameter.grad is not None
            wanted[name] += parameter.grad.float()
        working.network(tokens, targets).backward()
        working.collect_gradients()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, wanted[name])
    assert all(p.grad is None for p in working.network.parameters())


def test_bf16_gradients_are_those_of_fp32_up_to_rounding() -> None:
    """Over 4,096 tokens, some of them very frequent: sums kept in bf16 would stop growing."""
    config = ModelConfig(
        num_layers=2,
        d_model=64,
        num_heads=2,
        vocab_size=50,
        position="learned",
        attention_output_bias=True,
        ffn_bias=True,
        norm_bias=True,
        head_bias=True,
    )
    draw = torch.Generator().manual_seed(0)
    shares = 1.0 / torch.arange(1, config.vocab_size + 1)
    size = (16, 256)
    tokens, targets = (
        torch.multinomial(shares, 4096, replacement=True, generator=draw).view(size)
        for _ in range(2)
    )
    exact, rounded = Transformer(config), Transformer(config)
    for made in (exact, rounded):
        initialise(made, seed=0)
    WorkingCopy(exact, TrainConfig(precision="fp32")).network(tokens, targets).backward()
    working = WorkingCopy(rounded, TrainConfig(precision="bf16"))
    working.network(tokens, targets).backward()
    working.collect_gradients()
    for (name, want), got in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert want.grad is not None and got.grad is not None
        assert (got.grad - want.grad).norm() < 0.02 * want.grad.norm(), name


def test_the_bf16_curve_lies_within_the_seed_noise_of_fp32(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    """Both precisions, three seeds; benchmarks/precision.py does the same at full size."""
    ends: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for precision, values in ends.items():
        for seed in range(3):
            run = tmp_path / f"{precision}{seed}"
            flags = [f"--train.precision={precision}", f"--train.seed={seed}", "--train.steps=60"]
            result = cli("train", config_file, "--run", run, *flags)
            assert result.code == 0, result.err
            values.append(statistics.mean(line["loss"] for line in metrics(run)[-20:]))
    spread = max(ends["fp32"]) - min(ends["fp32"])
    differences = [abs(a - b) for a, b in zip(ends["fp32"], ends["bf16"], strict=True)]
    assert spread > 0 and statistics.mean(differences) < spread


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputation_changes_no_bit_of_a_gradient(precision: str) -> None:
    gradients = []
    for recompute in ("none", "block"):
        made = model()
        working = WorkingCopy(made, TrainConfig(precision=precision, recompute=recompute))  # type: ignore[arg-type]
        for tokens, targets in batches(2):
            working.network(tokens, targets).backward()
            working.collect_gradients()
        gradients.append([p.grad for p in made.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and recomputed is not None and torch.equal(plain, recomputed)
