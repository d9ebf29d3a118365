"""Properties of the network: causality, cache, documents, initial weights."""

import dataclasses

import numpy as np
import pytest
import torch

from lascaux.config.schema import ModelConfig
from lascaux.model.init import initial_tensor, initialise
from lascaux.model.positions import alibi_slopes
from lascaux.model.transformer import Transformer

BASE = ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=61, max_context=32)
VARIANTS = {
    "rotary": BASE,
    "interleaved, parallel": dataclasses.replace(
        BASE, block="parallel", rotary_layout="interleaved", rotary_dims=4
    ),
    "learned": dataclasses.replace(BASE, position="learned", norm_bias=True),
    "alibi": dataclasses.replace(BASE, position="alibi", embedding_norm=True),
    "grouped": dataclasses.replace(BASE, num_kv_heads=2, qk_norm="head", norm="rmsnorm"),
    "sandwich, no positions": dataclasses.replace(BASE, position="none", sandwich_norm=True),
}
# fp64, logits of order 10, other shapes of the same products; angles are the same fp32 numbers
TOLERANCE = dict(atol=1e-10, rtol=0)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request: pytest.FixtureRequest) -> Transformer:
    model = Transformer(request.param)
    initialise(model, seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.double().eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, BASE.vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def test_a_token_does_not_see_the_future(model: Transformer) -> None:
    x = tokens(2, 20)
    changed = x.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % BASE.vocab_size
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


class GrowingCache:
    """Keys and values of one layer, put behind each other."""

    length = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.length:
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.k, self.v, self.length = k, v, k.shape[2]
        return k, v


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (7, 1, 1, 8, 3)])
def test_cached_logits_equal_uncached(model: Transformer, pieces: tuple[int, ...]) -> None:
    x = tokens(2, 20)
    cache = [GrowingCache() for _ in range(model.config.num_layers)]
    got = [model(part, cache=cache) for part in x.split(list(pieces), dim=1)]
    torch.testing.assert_close(torch.cat(got, dim=1), model(x), **TOLERANCE)


@torch.no_grad()
def test_documents_packed_together_equal_documents_alone(model: Transformer) -> None:
    first, second = tokens(1, 9), tokens(1, 16)[:, 3:]
    packed = torch.cat([first, second], dim=1)
    lengths = (first.shape[1], second.shape[1])
    ids = torch.tensor(np.repeat([0, 1], lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = model(packed, positions=positions, document_ids=ids)
    alone = torch.cat([model(first), model(second)], dim=1)
    torch.testing.assert_close(got, alone, **TOLERANCE)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    small, deep = Transformer(BASE), Transformer(dataclasses.replace(BASE, num_layers=2))
    torch.manual_seed(123)
    initialise(small, seed=1)
    torch.manual_seed(456)
    torch.rand(10)
    initialise(deep, seed=1)
    for (name, a), b in zip(small.named_parameters(), deep.parameters(), strict=True):
        assert torch.equal(a, b), name
    q = initial_tensor("blocks.0.attn.q.weight", torch.Size([32, 32]), BASE, 1)
    assert not torch.equal(q, initial_tensor("blocks.1.attn.q.weight", q.shape, BASE, 1))
    assert not torch.equal(q, initial_tensor("blocks.0.attn.q.weight", q.shape, BASE, 2))


@pytest.mark.parametrize(
    ("scheme", "name", "shape", "std"),
    [
        ("gpt2", "blocks.0.ffn.up.weight", (400, 300), 0.02),
        ("gpt2", "blocks.0.attn.o.weight", (300, 300), 0.01),
        ("neox", "blocks.0.ffn.up.weight", (400, 300), (2 / (5 * 32)) ** 0.5),
        ("neox", "blocks.0.ffn.down.weight", (300, 400), 2 / 2 / 32**0.5),
        ("zero_residual", "blocks.0.ffn.down.weight", (300, 400), 0.0),
        ("zero_residual", "blocks.0.attn.k.weight", (300, 400), 0.02),
    ],
)
def test_initial_scales_follow_the_published_rules(
    scheme: str, name: str, shape: tuple[int, int], std: float
) -> None:
    config = dataclasses.replace(BASE, init=scheme, num_layers=2)
    tensor = initial_tensor(name, torch.Size(shape), config, seed=0)
    assert tensor.std().item() == pytest.approx(std, rel=0.01)
    assert abs(tensor.mean().item()) <= 0.01 * max(std, 1e-9) + 1e-4


def test_alibi_slopes_follow_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    twelve = alibi_slopes(12)
    assert twelve[:8] == alibi_slopes(8)
    assert twelve[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
