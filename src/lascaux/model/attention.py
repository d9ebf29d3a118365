"""Causal self-attention with shared key and value heads, and the mask all layers share.

The cache of keys and values is handed in; `generate/pages.py` has two.
Shapes: B batch, T sequence, S keys (T and what the cache holds), D d_model, H heads, G kv heads,
K head width.
"""

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lascaux.config.schema import ModelConfig
from lascaux.kernels.attention import attention
from lascaux.model.positions import RotaryLayout, Rotation, alibi_slopes, rotate


class LayerCache(Protocol):
    """Keys and values of the tokens one layer has already seen."""

    length: int

    def append(
        self, k: Float[Tensor, "B G T K"], v: Float[Tensor, "B G T K"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S K"]]:
        """Store the new keys and values; return all of them, in order."""
        ...


class Attend(nn.Module):
    """softmax(q kᵀ / √K + mask) v; a module, so that a plan may gather keys and values first."""

    def forward(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B G S K"],
        v: Float[Tensor, "B G S K"],
        mask: Tensor | None,
    ) -> Float[Tensor, "B H T K"]:
        """Every query's weighted mean of the values it may see."""
        return attention(q, k, v, mask)


class Attention(nn.Module):
    """softmax(q kᵀ / √K + mask) v, projected back to the residual stream.

    Heads are counted by the weights (`view(…, -1, K)`): a plan may give a rank some of them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.rotary_width = config.rotary_width
        self.rotary_layout: RotaryLayout = config.rotary_layout
        self.qk_norm = config.qk_norm
        kv_width = config.kv_heads * config.head_width
        self.q = nn.Linear(config.d_model, config.attention_width, bias=config.attention_bias)
        self.k = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.v = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.o = nn.Linear(
            config.attention_width, config.d_model, bias=config.attention_output_bias
        )
        self.attend = Attend()
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            q_width = config.head_width if per_head else config.attention_width
            k_width = config.head_width if per_head else kv_width
            self.q_norm = nn.RMSNorm(q_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(k_width, eps=config.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        angles: Rotation | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend over this sequence and the cache; `mask` None means plainly causal."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (self._split_heads(t) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q = rotate(q, angles, self.rotary_width, self.rotary_layout)
            k = rotate(k, angles, self.rotary_width, self.rotary_layout)
        if cache is not None:
            k, v = cache.append(k, v)
        z = self.attend(q, k, v, mask)
        return self.o(z.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)  # B T HK -> B H T K


class AttentionMask(nn.Module):
    """What each query may see and ALiBi's penalty on distance; the same for all layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.alibi = config.position == "alibi"

    def forward(
        self,
        num_queries: int,
        num_keys: int,
        document_ids: Int[Tensor, "B T"] | None,
        device: torch.device,
    ) -> Bool[Tensor, "#B 1 T S"] | Float[Tensor, "#B H T S"] | None:
        """The mask, or None where plain causality is all; the last query stands at the last key.

        With `document_ids` a query sees its own document only.
        """
        if not self.alibi and document_ids is None:
            return None
        keys = torch.arange(num_keys, device=device)
        queries = torch.arange(num_keys - num_queries, num_keys, device=device)
        visible = (queries[:, None] >= keys)[None, None]
        if document_ids is not None:
            visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
        return self._with_penalty(visible, queries[None], keys)

    def of_rows(
        self, positions: Int[Tensor, "B T"], num_keys: int
    ) -> Bool[Tensor, "B 1 T S"] | Float[Tensor, "B H T S"]:
        """The mask where sequences have different lengths: a query sees keys up to its position."""
        keys = torch.arange(num_keys, device=positions.device)
        visible = (positions[:, :, None] >= keys)[:, None]
        return self._with_penalty(visible, positions, keys)

    def _with_penalty(
        self, visible: Bool[Tensor, "#B 1 T S"], queries: Int[Tensor, "#B T"], keys: Tensor
    ) -> Bool[Tensor, "#B 1 T S"] | Float[Tensor, "#B H T S"]:
        if not self.alibi:
            return visible
        slopes = torch.tensor(alibi_slopes(self.num_heads), device=keys.device)[:, None, None]
        penalty = -slopes * (queries[:, None, :, None] - keys).float()
        return torch.where(visible, penalty, float("-inf"))
