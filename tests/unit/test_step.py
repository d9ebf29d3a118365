"""A training step: the same gradient however the batch is split, recomputed or bounded."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lascaux.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from lascaux.data.loader import NO_TARGET, Batch
from lascaux.evaluate.perplexity import measure_perplexity
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers
from lascaux.parallel.layout import Layout
from lascaux.parallel.world import World
from lascaux.train.precision import WorkingCopy
from lascaux.train.step import split_batch, train_step
from tests.conftest import metrics

CPU = torch.device("cpu")
CONFIG = ModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=23, norm_bias=True)


def batch(seqs: int = 8, length: int = 12) -> Batch:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, CONFIG.vocab_size, (seqs, length))
    targets = draw.integers(0, CONFIG.vocab_size, (seqs, length))
    targets[draw.random(targets.shape) < 0.3] = NO_TARGET
    targets[3] = NO_TARGET  # a sequence, and with one sequence a micro-batch, without any target
    return Batch(tokens, targets)


def gradients(
    microbatch_seqs: int, recompute: bool = False, clip: float | None = None
) -> tuple[dict[str, torch.Tensor], float, float]:
    model = Transformer(CONFIG).double()
    initialise(model, seed=0)
    train = TrainConfig(precision="fp32", recompute="block" if recompute else "none")
    result = train_step(
        WorkingCopy(model, train),
        build_optimizers(model.named_parameters(), OptimizerConfig(lr=1e-30, weight_decay=0.0)),
        split_batch(batch(), microbatch_seqs),
        world=World(Layout(), 0, CPU),
        grad_clip=clip,
    )
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, result.loss, result.grad_norm


def reference() -> tuple[dict[str, torch.Tensor], float]:
    model = Transformer(CONFIG).double()
    initialise(model, seed=0)
    whole = batch()
    logits = model(torch.as_tensor(whole.tokens))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.as_tensor(whole.targets).flatten())
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, loss.item()


@pytest.mark.parametrize("microbatch_seqs", [1, 2, 8])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_does_not_depend_on_the_split(microbatch_seqs: int, recompute: bool) -> None:
    wanted, wanted_loss = reference()
    got, loss, _ = gradients(microbatch_seqs, recompute)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-12, rtol=1e-10)


def test_clipping_scales_the_whole_gradient_to_the_bound() -> None:
    free, _, norm = gradients(8)
    assert norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in free.values())))
    clipped, _, reported = gradients(8, clip=norm / 3)
    assert reported == pytest.approx(norm), "the norm before clipping is what is logged"
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient / 3, atol=1e-8, rtol=1e-4)


def test_perplexity_counts_nats_and_bytes() -> None:
    model = Transformer(CONFIG).eval()
    initialise(model, seed=0)
    whole = batch()
    lengths = np.arange(CONFIG.vocab_size, dtype=np.int32)
    result = measure_perplexity(model, split_batch(whole, 3), lengths, CPU)
    with torch.no_grad():
        logits = model(torch.as_tensor(whole.tokens)).double()
    nats = F.cross_entropy(
        logits.flatten(0, 1), torch.as_tensor(whole.targets).flatten(), reduction="sum"
    ).item()
    targets = whole.targets[whole.targets != NO_TARGET]
    assert (result.tokens, result.text_bytes) == (targets.size, targets.sum())
    assert result.loss == pytest.approx(nats / targets.size, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / targets.sum(), rel=1e-6)


@pytest.mark.parametrize(
    "flag",
    [
        "--train.recompute=block",
        "--train.precision=bf16",
        "--data.document_boundaries=respect",
        "--model.block=parallel",
    ],
)
def test_each_way_of_training_learns(
    tmp_path: Path, config_file: Path, cli: Any, flag: str
) -> None:
    run = tmp_path / "run"
    result = cli("train", config_file, "--run", run, flag, "--train.steps=30")
    assert result.code == 0, result.err
    losses = [line["loss"] for line in metrics(run)]
    assert losses[-1] < 0.75 * losses[0]


def test_recomputation_changes_no_bit_of_a_run(tmp_path: Path, config_file: Path, cli: Any) -> None:
    for name, value in (("plain", "none"), ("recomputed", "block")):
        flags = ["--run", tmp_path / name, f"--train.recompute={value}"]
        assert cli("train", config_file, *flags).code == 0
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "recomputed")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it, but not from pytest
@pytest.mark.parametrize(
    ("precision", "recompute"), [("fp32", "none"), ("bf16", "none"), ("fp32", "block")]
)
def test_a_compiled_run_follows_the_eager_one(
    tmp_path: Path, config_file: Path, cli: Any, precision: str, recompute: str
) -> None:
    for name, value in (("eager", "false"), ("compiled", "true")):
        flags = ["--run", tmp_path / name, f"--train.compile={value}"]
        flags += [f"--train.precision={precision}", f"--train.recompute={recompute}"]
        assert cli("train", config_file, *flags).code == 0
    for a, b in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        # fused kernels round otherwise
        assert a["loss"] == pytest.approx(b["loss"], rel={"fp32": 1e-4, "bf16": 2e-3}[precision])


def test_tensorboard_gets_every_step(tmp_path: Path, config_file: Path, cli: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert cli("train", config_file, "--run", run, "--train.tracking=tensorboard").code == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    wanted = [(line["step"], line["loss"]) for line in metrics(run)]
    assert [step for step, _ in logged] == [step for step, _ in wanted]
    assert [value for _, value in logged] == pytest.approx([value for _, value in wanted])


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, config_file: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    flags = ["--run", tmp_path / "run", "--train.tracking=wandb"]
    result = cli("train", config_file, *flags)
    assert result.code == 2 and "pip install 'lascaux[tracking]'" in result.err


def test_boundaries_keep_the_loss_inside_documents(
    tmp_path: Path, config_file: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    flags = ["--run", run, "--data.document_boundaries=respect"]
    assert cli("train", config_file, *flags).code == 0
    ignoring = tmp_path / "ignoring"
    assert cli("train", config_file, "--run", ignoring).code == 0
    assert metrics(run)[0]["loss"] != metrics(ignoring)[0]["loss"]


def test_the_batch_is_split_in_order() -> None:
    whole = dataclasses.replace(batch(), document_ids=np.arange(96).reshape(8, 12))
    parts = split_batch(whole, 3)
    assert [len(part.tokens) for part in parts] == [3, 3, 2]
    for field in ("tokens", "targets", "document_ids"):
        joined = np.concatenate([getattr(part, field) for part in parts])
        assert np.array_equal(joined, getattr(whole, field))
