"""Where a token stands: rotary rotation of queries and keys, and ALiBi slopes.

Learned positions are a table in `model/transformer.py`.
Shapes: B batch, T sequence, H heads, K head width, R rotary width.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lascaux.config.schema import ModelConfig

RotaryLayout = Literal["half_split", "interleaved"]


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, shared by all layers (B 1 T R/2 each)."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Int[Tensor, "B T"], model: ModelConfig) -> Rotation:
    """Angle j of position p is p times frequency j, in fp32."""
    angles = positions[:, None, :, None].float() * frequencies(model, positions.device)
    return Rotation(angles.cos(), angles.sin())


def frequencies(model: ModelConfig, device: torch.device) -> Float[Tensor, " R/2"]:
    """Frequency j is base^(-2j/R) (Su et al. 2021, section 3.2.2), or lower where scaling asks so.

    "linear" divides all by the factor (Chen et al. 2023). "llama3" divides those that turn less
    than `rotary_low_freq_factor` times in the original context, keeps those that turn more than
    `rotary_high_freq_factor` times, and mixes both between (Llama 3.1's code).
    """
    width = model.rotary_width
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    plain = model.rotary_base ** (-exponents / width)
    if model.rotary_scaling == "none":
        return plain
    divided = plain / model.rotary_factor
    if model.rotary_scaling == "linear":
        return divided
    assert model.rotary_original_context is not None
    low, high = model.rotary_low_freq_factor, model.rotary_high_freq_factor
    turns = model.rotary_original_context * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * divided


def rotate(
    x: Float[Tensor, "B H T K"], angles: Rotation, rotary_width: int, layout: RotaryLayout
) -> Float[Tensor, "B H T K"]:
    """Rotate the first R of K dimensions in pairs and leave the others as they are.

    "half_split" pairs (j, j + R/2) as GPT-NeoX and Llama do, "interleaved" (2j, 2j + 1) as GPT-J.
    """
    rotated, rest = x[..., :rotary_width], x[..., rotary_width:]
    cos, sin = angles.cos.to(x.dtype), angles.sin.to(x.dtype)
    if layout == "half_split":
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = rotated[..., ::2], rotated[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        rotated = pairs.flatten(-2)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head's penalty on distance (Press et al. 2022, section 3).

    Powers of 2^(-8/n) for the largest power of two n ≤ H; further heads take the odd powers of
    2^(-8/2n), as in the authors' code and BLOOM.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 / n * power) for power in range(1, n + 1)]
    extra = [2.0 ** (-4.0 / n * power) for power in range(1, 2 * (num_heads - n), 2)]
    return slopes + extra
