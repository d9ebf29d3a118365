"""Parameters against published totals and a real model, FLOPs against torch's counter."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lascaux.model.moe as moe
from lascaux.config.load import load_config, preset_names
from lascaux.config.schema import ModelConfig, OptimizerConfig
from lascaux.model.accounting import (
    active_matmul_parameters,
    active_parameters,
    cache_bytes_per_token,
    checkpoint_bytes,
    count_parameters,
    flops_per_token,
    flops_per_token_forward,
    optimizer_state_bytes,
    replicated_parameters,
)
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers, state_tensors

FLOP_TOLERANCE = 0.005  # the issue's own bound; the counter leaves nothing out on the meta device


def model_config(preset: str) -> ModelConfig:
    return load_config(preset).model


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-355m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1558m", 1_557_611_200),
        ("bloom-176b", 176_247_271_424),
        ("llama-7b", 6_738_415_616),
        ("gptj-6b", 6_050_882_784),
        ("gpt-neox-20b", 20_554_567_680),
        ("mixtral-8x7b", 46_702_792_704),
        ("olmoe-1b-7b", 6_919_161_856),
        ("deepseekmoe-16b", 16_375_728_128),
    ],
)
def test_parameters_equal_those_of_the_released_weights(preset: str, published: int) -> None:
    assert count_parameters(model_config(preset)).total == published


def test_printed_totals_of_gptj_and_neox_count_tensor_parallel_copies() -> None:
    gptj, neox = model_config("gptj-6b"), model_config("gpt-neox-20b")
    embedding_bias = gptj.d_model  # in mesh-transformer-jax only
    copies = 7 * replicated_parameters(gptj) + 8 * embedding_bias
    assert count_parameters(gptj).total + copies == 6_053_381_344
    assert count_parameters(neox).total + replicated_parameters(neox) == 20_556_201_984


@pytest.mark.parametrize(
    ("preset", "billions"),
    [("mixtral-8x7b", 12.9), ("olmoe-1b-7b", 1.3), ("deepseekmoe-16b", 2.8)],
)
def test_active_parameters_are_the_published_ones(preset: str, billions: float) -> None:
    assert active_parameters(model_config(preset)) / 1e9 == pytest.approx(billions, abs=0.05)


def test_switch_and_glam_have_their_published_sizes() -> None:
    """7 B, 1,571 B, and 1.2 T less the gates of GLaM's dense layers, which are not here."""
    totals = [count_parameters(model_config(n)).total for n in ("switch-base-128", "switch-c-2048")]
    assert totals[0] / 1e9 == pytest.approx(7.4, abs=0.05)
    assert totals[1] / 1e9 == pytest.approx(1571, abs=0.5)
    glam = model_config("glam-64b-64e")
    gates = 32 * glam.d_model * glam.ffn_width
    assert (count_parameters(glam).total + gates) / 1e12 == pytest.approx(1.162, abs=0.001)
    assert (active_parameters(glam) + gates) / 1e9 == pytest.approx(96.6, abs=0.1)


def test_gpt3_175b_by_its_published_shape() -> None:
    layer = 12 * 12288**2 + 13 * 12288
    total = 96 * layer + (50257 + 2048) * 12288 + 2 * 12288
    assert count_parameters(model_config("gpt3-175b")).total == total == 174_604_259_328


@pytest.mark.parametrize("preset", preset_names())
def test_parameters_equal_a_meta_model(preset: str) -> None:
    config = model_config(preset)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


SHAPES = [
    ModelConfig(num_layers=2, d_model=64, num_heads=4, vocab_size=300),
    ModelConfig(num_layers=3, d_model=60, num_heads=3, num_kv_heads=1, head_dim=16, vocab_size=97,
                padded_vocab_size=128, activation="swiglu", tie_embeddings=False, norm="rmsnorm",
                qk_norm="projection", sandwich_norm=True),
    ModelConfig(num_layers=2, d_model=64, num_heads=4, vocab_size=211, block="parallel",
                position="learned", ffn_bias=True, norm_bias=True, attention_bias=True,
                attention_output_bias=True, head_bias=True, embedding_norm=True, qk_norm="head"),
    ModelConfig(num_layers=5, d_model=48, num_heads=4, vocab_size=101, d_ff=72, num_experts=6,
                experts_per_token=2, expert_d_ff=24, num_shared_experts=1, num_dense_layers=1,
                moe_every=2, activation="swiglu", balance="bias"),
]  # fmt: skip


@pytest.mark.parametrize("config", SHAPES)
def test_parameters_of_unusual_shapes_equal_a_real_model(config: ModelConfig) -> None:
    model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total
    visited = config.experts_per_token / max(1, config.num_experts)
    matrices = sum(
        p.numel() * (visited if p.ndim == 3 else 1)
        for n, p in model.named_parameters()
        if "blocks" in n and p.ndim >= 2
    )
    assert active_matmul_parameters(config) == matrices + config.vocab_rows * config.d_model


@pytest.mark.parametrize("config", [*SHAPES, model_config("gpt2-124m"), model_config("gptj-6b")])
def test_flops_equal_torchs_counter(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, seq_len = 2, 64
    with torch.device("meta"):
        model = Transformer(config)
        tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    if config.num_experts:  # the counter knows no grouped products; each row has one matrix
        monkeypatch.setattr(moe, "grouped_linear", lambda x, w, _: F.linear(x, w[0]))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens)
        forward = counter.get_total_flops()
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    per_token = counter.get_total_flops() / (batch * seq_len)
    assert flops_per_token_forward(config, seq_len) == pytest.approx(
        forward / (batch * seq_len), rel=FLOP_TOLERANCE
    )
    assert flops_per_token(config, seq_len) == pytest.approx(per_token, rel=FLOP_TOLERANCE)


@pytest.mark.parametrize("config", [SHAPES[0], dataclasses.replace(SHAPES[3], balance="loss")])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_bytes_equal_the_optimizers_tensors(name: str, config: ModelConfig) -> None:
    model = Transformer(config)
    optimizers = build_optimizers(model.named_parameters(), OptimizerConfig(name=name))  # type: ignore[arg-type]
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    tensors = state_tensors(model.named_parameters(), optimizers).values()
    state = sum(tensor.nbytes for tensor in tensors if tensor.ndim)
    assert state == optimizer_state_bytes(config, name)
    weights = sum(p.nbytes for p in model.parameters())
    assert weights + state == checkpoint_bytes(config, name)


def test_cache_bytes_follow_the_key_value_heads() -> None:
    config = dataclasses.replace(SHAPES[1])
    assert cache_bytes_per_token(config, element_bytes=2) == 3 * 2 * 1 * 16 * 2
