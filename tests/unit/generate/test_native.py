"""The compiled step where it cannot be built, kept or loaded; and many shapes drawn at random."""

import dataclasses
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lascaux.config.schema import ModelConfig
from lascaux.errors import LascauxError
from lascaux.generate import native
from lascaux.generate.load import native_weights
from lascaux.generate.native import NativeWeights
from lascaux.generate.network import PagedNetwork
from lascaux.generate.pages import Row
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer

TINY = ModelConfig(num_layers=1, d_model=32, num_heads=2, vocab_size=64, max_context=128)
CHOICES: dict[str, tuple[Any, ...]] = {
    "num_layers": (1, 2, 3),
    "head_dim": (None, 8, 20, 24),
    "num_kv_heads": (None, 1),
    "d_ff": (None, 40, 52, 96),
    "block": ("sequential", "parallel", "parallel_two_norms"),
    "norm": ("layernorm", "rmsnorm"),
    "sandwich_norm": (False, True),
    "qk_norm": ("none", "head", "projection"),
    "position": ("rotary", "rotary", "learned", "alibi", "none"),
    "rotary_layout": ("half_split", "interleaved"),
    "rotary_scaling": ("none", "linear", "llama3"),
    "activation": ("gelu", "gelu_tanh", "relu", "relu_squared", "swiglu"),
    "attention_bias": (False, True),
    "ffn_bias": (False, True),
    "tie_embeddings": (False, True),
    "head_bias": (False, True),
    "num_experts": (0, 0, 3, 6),
    "experts_per_token": (1, 2, 3),
    "expert_d_ff": (None, 24, 36),
    "num_shared_experts": (0, 2),
    "num_dense_layers": (0, 1),
    "moe_every": (1, 2),
    "router_score": ("softmax", "sigmoid"),
    "router_normalize": (None, False, True),
    "router_scale": (1.0, 1.7),
    "balance": ("loss", "bias"),
}
TOLERANCE = dict(rtol=5e-5, atol=5e-5)
"""fp32 logits of some units: sums in another order"""


def drawn_model(seed: int) -> Transformer:
    source = random.Random(seed)
    fields = {name: source.choice(values) for name, values in CHOICES.items()}
    if fields["rotary_scaling"] != "none":
        fields |= {"rotary_factor": 4.0, "rotary_original_context": 32}
    if fields["num_experts"]:
        fields["ffn_bias"] = False
    model = Transformer(dataclasses.replace(TINY, **fields))
    initialise(model, seed)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0).add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)
    return model.eval()


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_any_network_are_those_of_the_model(seed: int) -> None:
    model = drawn_model(seed)
    by_code = PagedNetwork(model, 80, 64, NativeWeights(model, threads=2))
    by_model = PagedNetwork(model, 80, 64)
    for network in (by_code, by_model):
        network.read(list(range(64)), 0, [0, 1])
    rows = [Row(5, 64, [0, 1]), Row(6, 65, [0, 1])]
    rows += [Row(number % 64, 0, [2 + number]) for number in range(1 + seed * 2 % 70)]
    got = by_code.decode(rows)
    wanted = torch.from_numpy(by_model.decode(rows))
    torch.testing.assert_close(torch.from_numpy(got), wanted, **TOLERANCE)
    alone = by_code.decode(rows[:1])
    assert (alone[0] == got[0]).all()
    x = by_code.read([1], 64, [0, 1])
    first, second = by_code.logits(x), by_model.logits(x)
    torch.testing.assert_close(torch.from_numpy(first), torch.from_numpy(second), **TOLERANCE)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; what is loaded already is forgotten for the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path  # type: ignore[misc]
    native.library.cache_clear()


def refused(caplog: pytest.LogCaptureFixture) -> str:
    """What is said where torch has to compute tokens instead."""
    with caplog.at_level(logging.WARNING):
        assert native_weights(Transformer(TINY), torch.device("cpu")) is None
    return caplog.text


def test_without_a_compiler_torch_computes_and_says_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    assert "no C compiler; install gcc or clang; torch computes tokens" in refused(caplog)


def test_a_compiler_that_fails_is_quoted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = fresh / "bin" / "cc"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho unknown architecture >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    assert "cc cannot build" in refused(caplog) and "unknown architecture" in caplog.text


def test_a_cache_folder_that_cannot_be_made_is_named(
    fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh / "lascaux").write_text("a file")
    assert f"cannot be kept as {fresh}" in refused(caplog)


def test_a_damaged_library_is_built_anew(fresh: Path) -> None:
    path = native.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no library")
    assert native.library() is not None
    assert path.stat().st_size > 1000
    assert list(path.parent.iterdir()) == [path]


def test_no_memory_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(TINY)
    weights = NativeWeights(model, threads=1)
    weights.widest_hidden = 1 << 44
    with pytest.raises(LascauxError, match="not enough memory to generate"):
        PagedNetwork(model, 2, 64, weights)
