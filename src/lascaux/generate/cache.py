"""Keys and values of the tokens already seen, so that each new token costs one position.

All memory is taken at the start: nothing grows while text is generated.
Shapes: B batch, T new tokens, S tokens so far, G kv heads, K head width, C capacity.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lascaux.config.schema import ModelConfig


class KVCache:
    """One layer's keys and values, up to `capacity` tokens for each sequence of a batch.

    The sequences of a batch have the same length.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.length = 0
        self.capacity = capacity
        shape = (batch, kv_heads, capacity, head_width)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)

    def append(
        self, k: Float[Tensor, "B G T K"], v: Float[Tensor, "B G T K"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
        """Store the new keys and values; return views of all so far, in order."""
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"{end} tokens in a cache of {self.capacity}"
        self._keys[:, :, self.length : end] = k
        self._values[:, :, self.length : end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def make_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> list[KVCache]:
    """An empty cache for each layer.

    Takes `capacity` · `batch` · `accounting.cache_bytes_per_token` bytes.
    """
    return [
        KVCache(batch, config.kv_heads, capacity, config.head_width, dtype, device)
        for _ in range(config.num_layers)
    ]
