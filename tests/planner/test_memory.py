"""The ledger of memory against the formulas of the literature and a real model's tensors."""

import dataclasses

import pytest
import torch

from lascaux.config.load import load_config
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers
from lascaux.parallel.layout import Layout
from lascaux.planner.devices import find_device, processor
from lascaux.planner.job import Job, make_job
from lascaux.planner.memory import layer_activation_bytes, stage_ledger, state_bytes, worst_ledger
from lascaux.planner.runs import find_run

GIB = 2**30


def job_of(name: str) -> Job:
    job = find_run(name).job
    assert job is not None
    return job


@pytest.mark.parametrize("size", ["22b", "530b"])
def test_activations_of_a_layer_are_those_of_korthikanti_et_al(size: str) -> None:
    """Table 2 of the paper: bytes of a layer, s b h (10 + 24/t + 5 a s / h t) and its variants."""
    plain = job_of(f"korthikanti-2022-{size}-memory-none")
    sequence = job_of(f"korthikanti-2022-{size}-memory-sp")
    model, s = plain.config.model, plain.config.train.seq_len
    b, h, a = plain.config.train.microbatch_seqs, model.d_model, model.num_heads
    t = plain.layout.tp
    sbh = s * b * h
    square = 5 * a * s / h
    assert layer_activation_bytes(plain, False, "all") == pytest.approx(
        sbh * (10 + (24 + square) / t)
    )
    assert layer_activation_bytes(sequence, False, "all") == pytest.approx(sbh * (34 + square) / t)
    assert layer_activation_bytes(sequence, False, "selective") == sbh * 34 / t
    assert layer_activation_bytes(plain, False, "full") == 2 * sbh


@pytest.mark.parametrize(
    "name",
    [
        "korthikanti-2022-22b-memory-none",
        "korthikanti-2022-22b-memory-selective-sp",
        "korthikanti-2022-530b-memory-none",
        "korthikanti-2022-530b-memory-selective-sp",
    ],
)
def test_published_activations_and_states(name: str) -> None:
    """The printed activations leave out the input of the first layer, the states embeddings."""
    job, printed = job_of(name), find_run(name).published
    ledger = stage_ledger(job, 0)
    tokens = job.microbatch_tokens * job.config.model.d_model
    embedded = 2 * tokens / (job.layout.tp if job.sequence_parallel else 1)
    p, v = job.layout.pp, job.config.parallel.virtual_pp
    under_way = p * (1 + (p - 1) / (p * v)) if v > 1 else p
    layers = ledger.activations - under_way * embedded
    assert layers == pytest.approx(printed["activation_gib"] * GIB, rel=1e-9)
    states = ledger.weights + ledger.gradients + ledger.optimizer
    body = 12 * job.config.model.num_layers * job.config.model.d_model**2
    assert 18 * body / (job.layout.tp * job.layout.pp) == pytest.approx(
        printed["weights_optimizer_gib"] * GIB, rel=1e-9
    )
    assert states == pytest.approx(printed["weights_optimizer_gib"] * GIB, rel=0.1)


def test_zero_stages_shard_what_they_say() -> None:
    config = load_config("gpt3-6.7b", ["--plan.stack=megatron-lm", "--train.microbatch_seqs=1"])
    device = find_device("A100-80GB-SXM")
    states = []
    for zero in range(4):
        changed = dataclasses.replace(config, plan=dataclasses.replace(config.plan, zero=zero))
        states.append(state_bytes(make_job(changed, device, Layout(dp_shard=8), "bf16"), 0))
    n = states[0]["weights"] / 2
    assert states[0] == {"weights": 2 * n, "gradients": 4 * n, "optimizer": 12 * n}
    assert states[1] == {"weights": 2 * n, "gradients": 4 * n, "optimizer": 12 * n / 8}
    assert states[2] == {"weights": 2 * n, "gradients": 4 * n / 8, "optimizer": 12 * n / 8}
    assert states[3] == {"weights": 2 * n / 8, "gradients": 4 * n / 8, "optimizer": 12 * n / 8}


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_states_are_those_of_a_real_model(preset: str, optimizer: str) -> None:
    """Weights, gradients and moments of the trained network, tensor by tensor, in fp32."""
    rate = ["--optimizer.adamw_lr=none"] if optimizer == "adamw" else []
    config = load_config(preset, [f"--optimizer.name={optimizer}", *rate])
    device = processor({"fp32": 1e11}, 1e10, memory_bytes=1e10)
    ledger = stage_ledger(make_job(config, device, Layout(), "fp32"), 0)
    model = Transformer(config.model)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model(tokens).square().mean().backward()
    optimizers = build_optimizers(model.named_parameters(), config.optimizer)
    for each in optimizers:
        each.step()
    weights = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    moments = sum(
        tensor.numel() * 4
        for each in optimizers
        for state in each.state.values()
        for tensor in state.values()
        if torch.is_tensor(tensor) and tensor.numel() > 1
    )
    assert ledger.weights == pytest.approx(weights, rel=1e-3)
    assert ledger.gradients == ledger.weights
    assert ledger.optimizer == pytest.approx(moments, rel=1e-3)


def test_the_kinds_add_up_and_every_axis_lowers_the_worst_device() -> None:
    config = load_config("gpt3-13b", ["--train.microbatch_seqs=1", "--model.vocab_size=50304"])
    device = find_device("A100-80GB-SXM")
    alone = worst_ledger(make_job(config, device, Layout(), "bf16"))[1]
    assert alone.total == pytest.approx(sum(alone.by_kind().values()))
    for layout in (Layout(dp_shard=8), Layout(tp=8), Layout(pp=8)):
        changed = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, pp=layout.pp)
        )
        _, ledger = worst_ledger(make_job(changed, device, layout, "bf16"))
        assert ledger.weights < alone.weights / 5
        assert ledger.total < 0.6 * alone.total


def test_experts_are_stored_whole_and_activated_in_part() -> None:
    """A mixture's states count every expert, its activations those that a token visits."""
    config = load_config("mixtral-8x7b", ["--train.microbatch_seqs=1"])
    dense = load_config("mixtral-8x7b", ["--train.microbatch_seqs=1", "--model.num_experts=2"])
    device = find_device("H100-80GB-SXM")
    eight, two = (
        stage_ledger(make_job(each, device, Layout(dp_shard=64), "bf16"), 0)
        for each in (config, dense)
    )
    assert eight.weights > 3 * two.weights
    assert eight.activations == pytest.approx(two.activations, rel=0.01)
