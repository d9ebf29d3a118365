"""Parameters, work and bytes of a model, from its config alone: no torch, no allocation.

The training loop's utilisation, the report and the checks of memory call these functions; tests
hold them against a real model and torch's operation counter.
"""

from dataclasses import dataclass

from lascaux.config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters by what they are for; a tied head counts once, as embedding."""

    embedding: int
    position: int
    attention: int
    feed_forward: int
    """of dense layers and of what every token visits"""
    experts: int
    router: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        """All parameters: what a checkpoint holds."""
        return (
            self.embedding
            + self.position
            + self.attention
            + self.feed_forward
            + self.experts
            + self.router
            + self.norm
            + self.head
        )


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Exact number of parameters of each kind, biases and padding rows included."""
    width, attention, kv = model.d_model, model.attention_width, model.kv_heads * model.head_width
    norm = norm_parameters(model)
    norms_per_layer = (1 if model.block == "parallel" else 2) + (2 if model.sandwich_norm else 0)
    qk_norm = {
        "none": 0,
        "head": 2 * model.head_width,
        "projection": attention + kv,
    }[model.qk_norm]
    attention_biases = (attention + 2 * kv) * model.attention_bias
    attention_biases += width * model.attention_output_bias
    dense_layers = model.num_layers - model.num_mixture_layers
    ffn_biases = ((_ffn_matrices(model) - 1) * model.ffn_width + width) * model.ffn_bias
    dense = dense_layers * (expert_parameters(model, model.ffn_width) + ffn_biases)
    expert = model.num_mixture_layers * expert_parameters(model, model.expert_width)
    bias = model.num_experts if model.balance == "bias" or model.balances_batches else 0
    learned = model.position == "learned"
    head_matrix = 0 if model.tie_embeddings else model.vocab_rows * width
    return ParameterCount(
        embedding=model.vocab_rows * width,
        position=(model.max_context + model.learned_position_offset) * width * learned,
        attention=model.num_layers * (attention_matmul_parameters(model) + attention_biases),
        feed_forward=dense + model.num_shared_experts * expert,
        experts=model.num_experts * expert,
        router=model.num_mixture_layers * (model.num_experts * width + bias),
        norm=model.num_layers * (norms_per_layer * norm + qk_norm)
        + norm * (1 + model.embedding_norm),
        head=head_matrix + model.vocab_rows * model.head_bias,
    )


def expert_parameters(model: ModelConfig, width: int) -> int:
    """Weights of one feed-forward network of this width."""
    return _ffn_matrices(model) * model.d_model * width


def _ffn_matrices(model: ModelConfig) -> int:
    return 3 if model.activation == "swiglu" else 2


def active_parameters(model: ModelConfig) -> int:
    """Parameters that one token uses: all but the experts it does not visit."""
    idle = model.num_experts - model.experts_per_token
    expert = expert_parameters(model, model.expert_width)
    return count_parameters(model).total - max(0, idle) * model.num_mixture_layers * expert


def replicated_parameters(model: ModelConfig) -> int:
    """Parameters that tensor parallelism does not split: norms and the biases of the outputs.

    Some published totals count them once for each tensor-parallel rank: GPT-NeoX-20B's
    20,556,201,984 has them twice; GPT-J's 6,053,381,344 eight times, with a bias on the embedding
    that the released weights do not have (mesh-transformer-jax, layers.py).
    """
    return count_parameters(model).norm + output_bias_parameters(model)


def norm_parameters(model: ModelConfig) -> int:
    """Gain and bias of one norm over the residual width."""
    return model.d_model * (2 if model.norm == "layernorm" and model.norm_bias else 1)


def output_bias_parameters(model: ModelConfig) -> int:
    """Biases of all attention and feed-forward outputs."""
    return model.num_layers * model.d_model * (model.attention_output_bias + model.ffn_bias)


def attention_matmul_parameters(model: ModelConfig) -> int:
    """Weights of the four attention projections of one layer."""
    kv = model.kv_heads * model.head_width
    return 2 * model.d_model * (model.attention_width + kv)


def active_matmul_parameters(model: ModelConfig) -> int:
    """N_active: weights a token is multiplied with, output head included, embeddings not.

    Of a mixture's experts those that a token visits, also where a capacity drops some.
    """
    mixtures = model.num_mixture_layers
    visited = model.experts_per_token + model.num_shared_experts
    mixture = visited * expert_parameters(model, model.expert_width)
    mixture += model.num_experts * model.d_model
    dense = (model.num_layers - mixtures) * expert_parameters(model, model.ffn_width)
    body = model.num_layers * attention_matmul_parameters(model) + dense + mixtures * mixture
    return body + model.vocab_rows * model.d_model


def flops_per_token_forward(model: ModelConfig, seq_len: int) -> int:
    """Forward work for one token: 2·N_active + 4·L·d·T, d being the width of all heads."""
    attention = 4 * model.num_layers * model.attention_width * seq_len
    return 2 * active_matmul_parameters(model) + attention


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Forward and backward work for one trained token: 6·N_active + 12·L·d·T.

    Attention is not halved for causality; recomputation counts nothing (Chowdhery et al. 2022,
    appendix B). Padding rows of the head are multiplied like any other and count.
    """
    return 3 * flops_per_token_forward(model, seq_len)


def training_state_bytes(model: ModelConfig, optimizer: str) -> int:
    """Bytes of fp32 weights, gradients and optimizer state together, without activations.

    AdamW keeps two moments; Muon one for each matrix of a block and two for the rest.
    """
    total = count_parameters(model).total
    return 4 * (2 * total) + optimizer_state_bytes(model, optimizer)


def optimizer_state_bytes(model: ModelConfig, optimizer: str) -> int:
    """Bytes of the optimizer's fp32 tensors, step counters aside."""
    total = count_parameters(model).total
    if optimizer == "adamw":
        return 4 * 2 * total
    mixtures, expert = model.num_mixture_layers, expert_parameters(model, model.expert_width)
    dense = (model.num_layers - mixtures) * expert_parameters(model, model.ffn_width)
    experts = mixtures * (model.num_experts + model.num_shared_experts) * expert
    matrices = model.num_layers * attention_matmul_parameters(model) + dense + experts
    return 4 * (matrices + 2 * (total - matrices))


def checkpoint_bytes(model: ModelConfig, optimizer: str) -> int:
    """Bytes of a checkpoint's tensors: fp32 weights and optimizer state."""
    return 4 * count_parameters(model).total + optimizer_state_bytes(model, optimizer)


def cache_bytes_per_token(model: ModelConfig, element_bytes: int) -> int:
    """Bytes of keys and values one token adds to a generation cache."""
    return 2 * model.num_layers * model.kv_heads * model.head_width * element_bytes
