"""From logits to the next token: temperature, then top-k, then top-p, then min-p, then a draw.

Each filter sees the distribution the one before it left, renormalised. The likeliest token always
stays; among equally likely tokens the lower id counts as likelier. A draw depends on the settings'
seed and on how many tokens came before, on nothing else: no global state, no generator's history.
Sources: top-k, Fan et al. 2018; top-p, Holtzman et al. 2020; min-p, Nguyen et al. 2024.
Shapes: B batch, V ids that may be drawn.
"""

import hashlib
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lascaux.config.schema import GenerateConfig
from lascaux.errors import LascauxError, RequestError


def check_settings(settings: GenerateConfig) -> None:
    """Hold every field against its range.

    Raises: RequestError with the field, the value and the range that is allowed.
    """
    rules = [
        ("max_tokens", settings.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= settings.temperature < math.inf, "0 or above, and finite"),
        ("top_k", settings.top_k >= 0, "0 (all tokens) or above"),
        ("top_p", 0 <= settings.top_p <= 1, "between 0 and 1"),
        ("min_p", 0 <= settings.min_p < 1, "at least 0 and below 1"),
        ("seed", settings.seed >= 0, "0 or above"),
        ("stop", all(settings.stop), "strings that are not empty"),
    ]
    for field, fits, wanted in rules:
        if not fits:
            value = getattr(settings, field)
            shown = list(value) if isinstance(value, tuple) else value
            raise RequestError(f"'{field}' must be {wanted}; got {shown}")


def token_generator(seed: int, index: int) -> torch.Generator:
    """The source of randomness for generated token number `index`, counted from 0."""
    digest = hashlib.sha256(f"lascaux token {seed} {index}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big"))


def sample(
    logits: Float[Tensor, "B V"], settings: GenerateConfig, generator: torch.Generator
) -> Int[Tensor, " B"]:
    """Draw one id for each row; temperature 0 takes the likeliest.

    Every id in `logits` may be drawn: rows of a padded vocabulary are cut off by the caller.
    Computed on the CPU in fp64, so that a seed means the same on every device.

    Raises: LascauxError for logits that are not finite.
    """
    logits = logits.to("cpu", torch.float64)
    largest = logits.amax(dim=-1)
    if not torch.isfinite(largest).all():
        raise LascauxError(
            f"the model's largest logit is {largest[~torch.isfinite(largest)][0].item()}: its "
            "weights are damaged or overflow in this precision; check them with `lascaux verify`, "
            "or generate in fp32"
        )
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = filtered_probabilities(logits, settings).cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator)
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def filtered_probabilities(
    logits: Float[Tensor, "B V"], settings: GenerateConfig
) -> Float[Tensor, "B V"]:
    """What `sample` draws from at a temperature above 0: probabilities in fp64, 0 if left out."""
    z = logits.double()
    z = (z - z.amax(dim=-1, keepdim=True)) / settings.temperature
    probabilities = z.softmax(dim=-1)
    if settings.top_k > 0 or settings.top_p < 1:
        probabilities = _keep_likeliest(probabilities, settings)
    if settings.min_p > 0:
        threshold = settings.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = _keep(probabilities, probabilities >= threshold)
    return probabilities


def _keep_likeliest(
    probabilities: Float[Tensor, "B V"], settings: GenerateConfig
) -> Float[Tensor, "B V"]:
    """Top-k, then top-p, both over ids sorted by falling probability."""
    falling, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(falling.shape[-1], device=falling.device)
    if settings.top_k > 0:
        falling = _keep(falling, rank < settings.top_k)
    if settings.top_p < 1:
        likelier = falling.cumsum(dim=-1).roll(1, dims=-1)  # mass of all tokens before this one
        falling = _keep(falling, (rank == 0) | (likelier < settings.top_p))
    return torch.zeros_like(falling).scatter(-1, ids, falling)


def _keep(probabilities: Float[Tensor, "B V"], kept: Tensor) -> Float[Tensor, "B V"]:
    """Zero elsewhere, renormalised."""
    remaining = probabilities.where(kept, 0.0)
    return remaining / remaining.sum(dim=-1, keepdim=True)
