"""The network: a causal decoder. Token ids in, logits out.

Devices and ranks are decided elsewhere; nothing here knows of them.
Block "sequential" (pre-norm, GPT-2): attention and its residual first, then feed-forward.
Block "parallel" (GPT-J, Wang & Komatsuzaki 2021): h = norm(x); x + attn(h) + ffn(h).
Block "parallel_two_norms" (GPT-NeoX, Black et al. 2022): x + attn(norm1(x)) + ffn(norm2(x)).
Shapes: B batch, T sequence, D d_model, F feed-forward width, V rows of the vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lascaux.config.schema import ModelConfig
from lascaux.kernels.activation import activate
from lascaux.kernels.cross_entropy import linear_cross_entropy
from lascaux.kernels.embedding import embedding
from lascaux.kernels.norm import layer_norm
from lascaux.model.attention import Attention, AttentionMask, LayerCache
from lascaux.model.moe import MixtureOfExperts
from lascaux.model.positions import Rotation, rotation


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016)."""

    def forward(self, input: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Normalise the last dimension."""
        return layer_norm(input, self.weight, self.bias, self.eps)


class Embedding(nn.Embedding):
    """A table of rows."""

    def forward(self, input: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The row of each id."""
        return embedding(input, self.weight)


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm or RMSNorm (Zhang & Sennrich 2019) over the residual width."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.norm_bias)


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(silu(gate(x)) · up(x)) for swiglu (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.d_model, width, bias=config.ffn_bias)
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.d_model, width, bias=config.ffn_bias)
        self.down = nn.Linear(width, config.d_model, bias=config.ffn_bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each position on its own."""
        gate = self.gate(x) if self.activation == "swiglu" else None
        return self.down(activate(self.activation, self.up(x), gate))


def make_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """Dense, or a mixture of experts where the config says so."""
    if not config.is_mixture(layer):
        return FeedForward(config, config.ffn_width)
    shared = config.num_shared_experts * config.expert_width
    return MixtureOfExperts(config, FeedForward(config, shared) if shared else None)


class Sum(nn.Module):
    """a + b; a module, so that a plan may add up the parts of both at once."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum."""
        return a + b


class HeadLoss(nn.Module):
    """Cross-entropy of the head's logits; a module, so that a plan may split the vocabulary."""

    def forward(
        self,
        h: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        targets: Int[Tensor, " N"],
    ) -> Float[Tensor, ""]:
        """Their sum over the targets, nats; -100 counts nothing."""
        return linear_cross_entropy(h, weight, bias, targets)


class Block(nn.Module):
    """One layer: attention and feed-forward around the residual stream.

    Sandwich norms (CogView, Ding et al. 2021) normalise both outputs before the sum.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.arrangement = config.block
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        if config.block != "parallel":
            self.norm2 = make_norm(config)
        self.ffn = make_feed_forward(config, layer)
        self.join = Sum()
        self.attn_out_norm = make_norm(config) if config.sandwich_norm else nn.Identity()
        self.ffn_out_norm = make_norm(config) if config.sandwich_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        angles: Rotation | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after this layer."""
        h = self.norm1(x)
        attended = self.attn_out_norm(self.attn(h, angles, mask, cache))
        if self.arrangement == "sequential":
            x = x + attended
            return x + self.ffn_out_norm(self.ffn(self.norm2(x)))
        if self.arrangement == "parallel_two_norms":
            h = self.norm2(x)
        return x + self.join(attended, self.ffn_out_norm(self.ffn(h)))


class Transformer(nn.Module):
    """A decoder-only language model; every family is a setting of `ModelConfig`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_rows, config.d_model)
        if config.position == "learned":
            rows = config.max_context + config.learned_position_offset
            self.position_embed = Embedding(rows, config.d_model)
        self.embed_norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleDict({str(i): Block(config, i) for i in range(config.num_layers)})
        self.final_norm = make_norm(config)
        self.mask, self.loss = AttentionMask(config), HeadLoss()
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_rows, bias=config.head_bias)
        elif config.head_bias:
            self.head_bias = nn.Parameter(torch.zeros(config.vocab_rows))

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        *,
        positions: Int[Tensor, "B T"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Float[Tensor, "B T V"] | Float[Tensor, ""]:
        """Logits of the token after each position; with `targets` the sum of their losses instead.

        The sum is in nats, and targets of -100 count nothing. Positions count from the start of the
        sequence, or from what the cache holds, unless they are given. With `document_ids` attention
        stays inside a document. The cache, one entry for each layer, is extended by these tokens.
        """
        x = self.residual(tokens, positions=positions, document_ids=document_ids, cache=cache)
        return self.unembed(x) if targets is None else self.sum_losses(x, targets)

    def residual(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        positions: Int[Tensor, "B T"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after the last block, before the final norm."""
        past = cache[0].length if cache is not None else 0
        if positions is None:
            end = past + tokens.shape[1]
            positions = torch.arange(past, end, device=tokens.device)[None]
        x = self.begin(tokens, positions)
        return self.run_blocks(x, positions, document_ids, past, cache)

    def begin(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "#B T"]
    ) -> Float[Tensor, "B T D"]:
        """The residual stream before the first block."""
        x = self.embed(tokens)
        if self.config.position == "learned":
            x = x + self.position_embed(positions + self.config.learned_position_offset)
        return self.embed_norm(x)

    def run_blocks(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "#B T"],
        document_ids: Int[Tensor, "B T"] | None = None,
        past: int = 0,
        cache: Sequence[LayerCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after the blocks that are here: all, or those of a pipeline stage."""
        config, num_queries = self.config, positions.shape[1]
        angles = None
        if config.position == "rotary":
            angles = rotation(positions, config)
        if cache is not None and len(positions) > 1:
            mask = self.mask.of_rows(positions, past + num_queries)
        else:
            mask = self.mask(num_queries, past + num_queries, document_ids, x.device)
        for index, block in enumerate(self.blocks.values()):
            x = block(x, angles, mask, cache[index] if cache is not None else None)
        return x

    def sum_losses(
        self, x: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """Final norm, output head and the sum of the losses."""
        h = self.final_norm(x)
        return self.loss(h.flatten(0, 1), *self.head_parameters(), targets.flatten())

    def unembed(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Final norm and output head."""
        return F.linear(self.final_norm(x), *self.head_parameters())

    def head_parameters(self) -> tuple[Float[Tensor, "V D"], Float[Tensor, " V"] | None]:
        """Weight and bias of the output head, which may be the token embedding."""
        if self.config.tie_embeddings:
            return self.embed.weight, getattr(self, "head_bias", None)
        return self.head.weight, self.head.bias
