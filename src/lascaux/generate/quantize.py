"""Weights in 8 or 4 bits, for reading less memory with each token; activations stay as they are.

int8: w ≈ q · s, a factor s for each row of a matrix. int4: w ≈ q · s + m, q from 0 to 15, a factor
and a smallest value for each 32 columns, in bf16. Embedding, head and matrices whose width is no
multiple of 32 have 8 bits in both; norms, biases and routers are not quantized. Each is rounded to
nearest, nothing is calibrated.
Shapes: O rows, I columns; experts' matrices lie below each other.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lascaux.kernels.grouped import grouped_linear
from lascaux.model.moe import GroupedLinear

Bits = Literal[8, 4]
GROUP = 32
ROWS_AT_ONCE = 4096


class QuantizedMatrix(nn.Module):
    """A matrix in few bits with the weight it stands for, in `dtype`, made when it is asked for."""

    def __init__(self, weight: Float[Tensor, "*E O I"], bits: Bits, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.columns, self.bits, self.dtype = (
            weight.shape,
            weight.shape[-1],
            bits,
            dtype,
        )
        flat = weight.reshape(-1, self.columns)
        pack = _pack8 if bits == 8 else _pack4
        parts = [pack(rows.float()) for rows in flat.split(ROWS_AT_ONCE)]
        self.packed: Tensor
        self.scale: Tensor
        self.register_buffer("packed", torch.cat([packed for packed, _ in parts]))
        self.register_buffer("scale", torch.cat([scale for _, scale in parts]))

    @property
    def weight(self) -> Float[Tensor, "*E O I"]:
        """The matrix."""
        unpack = _unpack8 if self.bits == 8 else _unpack4
        return unpack(self.packed, self.scale, self.dtype).view(self.shape)


class QuantizedLinear(QuantizedMatrix):
    """In the place of a linear layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: Bits, dtype: torch.dtype) -> None:
        super().__init__(weight, bits, dtype)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """x Wᵀ + b."""
        if self.bits == 4:
            return nn.functional.linear(x, self.weight, self.bias)
        y = nn.functional.linear(x, self.packed.to(self.dtype)) * self.scale.to(self.dtype)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(QuantizedMatrix):
    """In the place of an embedding."""

    def forward(self, tokens: Int[Tensor, "*B"]) -> Float[Tensor, "*B I"]:
        """The row of each id."""
        return _unpack8(self.packed[tokens], self.scale[tokens], self.dtype)


class QuantizedExperts(QuantizedMatrix):
    """In the place of a matrix for each expert."""

    def forward(self, x: Float[Tensor, "P I"], counts: Int[Tensor, " E"]) -> Float[Tensor, "P O"]:
        """Rows in order of their experts."""
        return grouped_linear(x, self.weight, counts)


def quantizable(module: nn.Module) -> bool:
    """Whether there is a module with fewer bits for this one."""
    return isinstance(module, nn.Linear | nn.Embedding | GroupedLinear)


def quantized(module: nn.Module, bits: Bits, dtype: torch.dtype) -> QuantizedMatrix:
    """What stands in the place of a module; activations are in `dtype`."""
    match module:
        case nn.Linear():
            return QuantizedLinear(module.weight, module.bias, _fit(module.weight, bits), dtype)
        case GroupedLinear():
            return QuantizedExperts(module.weight, _fit(module.weight, bits), dtype)
        case nn.Embedding():
            return QuantizedEmbedding(module.weight, 8, dtype)
    raise AssertionError(f"no quantized {type(module).__name__}")


def _fit(weight: Tensor, bits: Bits) -> Bits:
    return 8 if weight.shape[-1] % GROUP else bits


def _pack8(w: Float[Tensor, "O I"]) -> tuple[Tensor, Tensor]:
    scale = (w.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (w / scale[:, None]).round().to(torch.int8), scale


def _unpack8(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (packed.float() * scale[..., None]).to(dtype)


def _pack4(w: Float[Tensor, "O I"]) -> tuple[Tensor, Tensor]:
    """Bytes hold column j of a group in their low half, column j + 16 in the high one."""
    grouped = w.unflatten(-1, (-1, GROUP))
    low, high = grouped.amin(-1), grouped.amax(-1)
    factor = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
    smallest = low.bfloat16()
    q = (grouped - smallest[..., None].float()) / factor[..., None].float()
    q = q.round().clamp(0, 15).to(torch.uint8)
    packed = q[..., : GROUP // 2] | (q[..., GROUP // 2 :] << 4)
    return packed.flatten(-2), torch.stack([factor, smallest], dim=-1)


def _unpack4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    grouped = packed.unflatten(-1, (-1, GROUP // 2))
    q = torch.cat([grouped & 15, grouped >> 4], dim=-1).to(dtype)
    factor, smallest = scale.to(dtype)[..., None].unbind(-2)
    return torch.addcmul(smallest, q, factor).flatten(-2)
