"""Our network against the implementations in `transformers`, weights copied over."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lascaux.model.transformer import Transformer
from tests.parity.families import FAMILIES, Family, V, randomised

# fp32, values of order 1: both sides round every product, in another order
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5


def pair(family: Family) -> tuple[nn.Module, Transformer]:
    reference = randomised(family.reference()).train()
    ours = Transformer(family.config)
    mapped = family.to_ours(dict(reference.state_dict()))
    ours.load_state_dict({name: mapped[name] for name in dict(ours.named_parameters())})
    assert sum(p.numel() for p in ours.parameters()) == sum(
        p.numel() for p in reference.parameters()
    )
    return reference, ours


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def tokens() -> torch.Tensor:
    return torch.randint(2, V, (2, 37), generator=torch.Generator().manual_seed(3))


def test_logits_equal_those_of_transformers(family: Family) -> None:
    reference, ours = pair(family)
    with torch.no_grad():
        wanted = reference(tokens()).logits
        got = ours(tokens())
    assert wanted.abs().max() > 1, "a trivial model would prove nothing"
    scale = wanted.abs().max()
    torch.testing.assert_close(got / scale, wanted / scale, atol=LOGITS_TOLERANCE, rtol=0)


def test_gradients_equal_those_of_transformers(family: Family) -> None:
    reference, ours = pair(family)
    x = tokens()
    for logits in (reference(x).logits, ours(x)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in reference.named_parameters()
    }
    wanted = family.to_ours(gradients)
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        # a key bias has no effect on a softmax: its gradient is rounding alone
        scale = wanted[name].abs().max().clamp(min=1e-2 * largest)
        torch.testing.assert_close(
            parameter.grad / scale,
            wanted[name] / scale,
            atol=GRADIENT_TOLERANCE,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )
