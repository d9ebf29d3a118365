"""`lascaux bench`: figures that fit together, and messages for what cannot be measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lascaux.bench.experts as experts
from lascaux.config.load import load_config
from lascaux.config.schema import ModelConfig
from lascaux.model.accounting import active_matmul_parameters, flops_per_token
from lascaux.model.moe import MixtureOfExperts


def test_the_figures_of_a_training_step_fit_together(config_file: Path, cli: Any) -> None:
    result = cli("bench", "train", config_file, "--rounds", "3", "--json")
    assert result.code == 0, result.err
    speed = json.loads(result.out)
    config = load_config(str(config_file))
    steps, median = speed["step_seconds"], speed["median_step_seconds"]
    assert len(steps) == 3 and median == sorted(steps)[1]
    assert speed["tokens_per_second"] == pytest.approx(config.train.batch_tokens / median)
    work = flops_per_token(config.model, config.train.seq_len)
    assert speed["flops_per_token"] == work
    peak = speed["peaks"]["matmul_flops_per_second"]["fp32"]
    # measured beside each step, so at least what the best measurement gives for the slowest step
    assert speed["mfu"] >= work * config.train.batch_tokens / max(steps) / peak
    assert set(speed["part_seconds"]) == {
        "forward",
        "backward",
        "optimizer",
        "copy",
        "data",
        "other",
    }
    assert sum(speed["part_seconds"].values()) < 2 * max(steps)
    assert all(seconds >= 0 for seconds in speed["part_seconds"].values())
    assert speed["peak_memory_bytes"] > 2**20
    assert "Traceback" not in result.err


def test_the_figures_of_generation_fit_together(config_file: Path, cli: Any) -> None:
    flag = "--generate.weights=fp32"
    result = cli("bench", "generate", config_file, "--rounds", "2", "--json", flag)
    assert result.code == 0, result.err
    speed = json.loads(result.out)
    config = load_config(str(config_file))
    assert len(speed["decode_tokens_per_second"]) == 2
    weights = 4 * active_matmul_parameters(config.model)
    assert speed["bytes_per_token"] > weights
    bandwidth = speed["peaks"]["read_bytes_per_second"]
    moved = speed["median_decode_tokens_per_second"] * speed["bytes_per_token"]
    assert speed["fraction_of_bandwidth"] == pytest.approx(moved / bandwidth)


def test_a_short_context_is_enough(config_file: Path, cli: Any) -> None:
    flags = ["--model.max_context=32", "--model.position=learned"]
    result = cli("bench", "generate", config_file, "--rounds", "1", *flags)
    assert result.code == 0, result.err


def test_a_large_batch_is_measured_by_a_few_microbatches(config_file: Path, cli: Any) -> None:
    flag = "--train.batch_tokens=12800"
    result = cli("bench", "train", config_file, "--rounds", "1", "--json", flag)
    config = load_config(str(config_file))
    microbatch = config.train.microbatch_seqs * config.train.seq_len
    assert json.loads(result.out)["batch_tokens"] == 4 * microbatch


def test_both_are_told_in_words(config_file: Path, cli: Any) -> None:
    train = cli("bench", "train", config_file, "--rounds", "1").out
    for word in ("tokens/s", "MFU", "6N + 12LdT", "forward", "backward", "GFLOP/s", "copy"):
        assert word in train
    generate = cli("bench", "generate", config_file, "--rounds", "1").out
    for word in ("prompt", "decode", "of what a sum reads", "8 at once"):
        assert word in generate


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "trian"], "invalid choice: 'trian'"),
        (["bench", "train", "tinny"], "did you mean 'tiny'?"),
        (["bench", "train", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["bench", "train", "--train.threads=0"], "'train.threads' must be above 0; got 0"),
        (["bench", "train", "gpt3-175b", "--train.device=cpu"], "choose a smaller preset"),
        (["bench", "generate", "gpt3-175b", "--train.device=cpu"], "choose a smaller preset"),
        (["bench", "generate", "--optimizer.lr=1"], "--optimizer.lr has no effect on"),
        (["bench", "train", "--generate.seed=1"], "--generate.seed has no effect on"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_message(
    cli: Any, arguments: list[str], words: str
) -> None:
    result = cli(*arguments)
    assert result.code == 2 and words in result.err and result.out == ""


def test_experts_are_timed_beside_a_dense_layer_and_the_usual_loop(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "TOKENS", 64)
    monkeypatch.setattr(experts, "SHAPES", ((4, 2), (8, 1)))
    table = cli("bench", "moe", "--rounds", "2", "--train.precision=fp32")
    assert table.code == 0 and "x dense" in table.out and len(table.out.splitlines()) == 4
    result = cli("bench", "moe", "--rounds", "2", "--train.precision=fp32", "--json")
    first, second = json.loads(result.out)["layers"]
    assert (first["num_experts"], second["experts_per_token"]) == (4, 1)
    low, middle, high = (first["times_dense"][i] for i in (1, 0, 2))
    assert 0 < low <= middle <= high
    assert cli("bench", "moe", "--model.d_model=64").code == 2


def test_the_usual_loop_is_the_mixture() -> None:
    config = ModelConfig(num_experts=8, experts_per_token=2, d_model=16, d_ff=24, num_heads=2)
    layer = MixtureOfExperts(dataclasses.replace(config, router_normalize=False), None)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(experts.usual_loop(layer, x), layer(x), atol=1e-4, rtol=1e-4)
