"""Initial weights as a pure function of (seed, parameter name): any device or mesh makes the same.

Standard deviations, in a network of L layers and width D:

| scheme        | matrices     | residual outputs | embeddings | source                       |
|---------------|--------------|------------------|------------|------------------------------|
| gpt2          | 0.02         | 0.02 / √(2L)     | 0.02       | Radford et al. 2019          |
| neox          | √(2 / 5D)    | 2 / (L √D)       | √(2 / 5D)  | Black et al. 2022, section 3 |
| zero_residual | 0.02         | 0                | 0.02       | Zhang et al. 2019 (Fixup)    |

Residual outputs are attn.o and ffn.down, also of experts. Norm gains are one and biases zero.
"""

import hashlib
import math

import torch
from torch import Tensor

from lascaux.config.schema import ModelConfig
from lascaux.model.transformer import Transformer

RESIDUAL_OUTPUTS = ("attn.o.weight", "down.weight")
EMBEDDINGS = ("embed.weight", "position_embed.weight")


def initial_std(name: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix's initial weights."""
    residual_output = name.endswith(RESIDUAL_OUTPUTS)
    layers, width = config.num_layers, config.d_model
    match config.init:
        case "gpt2":
            return 0.02 / math.sqrt(2 * layers) if residual_output else 0.02
        case "neox":
            return 2 / (layers * math.sqrt(width)) if residual_output else math.sqrt(0.4 / width)
        case "zero_residual":
            return 0.0 if residual_output else 0.02


def initial_tensor(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The fp32 tensor a parameter starts from, on the CPU."""
    if len(shape) == 1:
        value = 0.0 if name.endswith("bias") else 1.0
        return torch.full(shape, value, dtype=torch.float32)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    std = initial_std(name, config)
    return torch.randn(shape, generator=generator, dtype=torch.float32) * std


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Set every parameter from (seed, name), wherever it lives."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_tensor(name, parameter.shape, model.config, seed))
