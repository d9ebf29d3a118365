"""Every setting of a run, as one frozen tree of dataclasses.

The string below a field is its help text, shown by `lascaux COMMAND --help`; it carries the unit.
`None` always means "not set"; what then happens stands in the help text.
Rules that tie settings together are in `config/check.py`, reading files and flags in `config/load.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from lascaux.config.plan_schema import PlanConfig
from lascaux.config.serve_schema import GenerateConfig, ServeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of the network."""

    num_layers: int = 6
    """transformer blocks"""
    d_model: int = 256
    """width of the residual stream"""
    num_heads: int = 4
    """query heads of each attention layer"""
    num_kv_heads: int | None = None
    """key and value heads shared by groups of query heads; unset: num_heads"""
    head_dim: int | None = None
    """width of one head; unset: d_model / num_heads, which must divide"""
    d_ff: int | None = None
    """width of the feed-forward layer; unset: 4 * d_model"""
    vocab_size: int = 4096
    """token ids the tokenizer may produce"""
    padded_vocab_size: int | None = None
    """rows of embedding and head, at least vocab_size; unset: vocab_size"""
    max_context: int = 1024
    """longest sequence, tokens"""
    block: Literal["sequential", "parallel", "parallel_two_norms"] = "sequential"
    """attention then feed-forward, or both from one norm (GPT-J), or both with a norm each (GPT-NeoX)"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """normalisation everywhere in the network"""
    norm_eps: float = 1e-5
    """added to the variance before the square root"""
    embedding_norm: bool = False
    """normalise the token embedding (BLOOM)"""
    sandwich_norm: bool = False
    """normalise the output of attention and feed-forward before the residual sum (CogView)"""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm on queries and keys: for each head, or over the whole projection (OLMoE)"""
    position: Literal["rotary", "learned", "alibi", "none"] = "rotary"
    """how the network learns where a token stands"""
    rotary_dims: int | None = None
    """leading dimensions of each head that rotate; unset: all of head_dim"""
    rotary_base: float = 10000.0
    """base of the rotary wavelengths"""
    rotary_layout: Literal["half_split", "interleaved"] = "half_split"
    """pairs (j, j + rotary_dims/2) as in GPT-NeoX and Llama, or neighbours (2j, 2j + 1) as in GPT-J"""
    rotary_scaling: Literal["none", "linear", "llama3"] = "none"
    """stretch the rotary wavelengths for texts longer than those trained on: none, all, or the long ones (Llama 3.1)"""
    rotary_factor: float = 1.0
    """how much they are stretched"""
    rotary_original_context: int | None = None
    """with llama3: longest text trained on before, tokens"""
    rotary_low_freq_factor: float = 1.0
    """with llama3: what turns fewer times than this in the original context is stretched whole"""
    rotary_high_freq_factor: float = 4.0
    """with llama3: what turns more often than this stays; between the two it is shared"""
    learned_position_offset: int = 0
    """unused rows at the start of the position table (OPT: 2)"""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu_squared", "swiglu"] = "gelu_tanh"
    """non-linearity of the feed-forward layer; swiglu adds a gate matrix"""
    attention_bias: bool = False
    """biases on the query, key and value projections"""
    attention_output_bias: bool = False
    """bias on the attention output projection"""
    ffn_bias: bool = False
    """biases in the feed-forward layer"""
    norm_bias: bool = False
    """biases in LayerNorm"""
    tie_embeddings: bool = True
    """use the token embedding as the output head"""
    head_bias: bool = False
    """bias on the output head (GPT-J)"""
    num_experts: int = 0
    """experts of each mixture layer; 0: every layer is dense"""
    experts_per_token: int = 2
    """experts that compute each token"""
    expert_d_ff: int | None = None
    """width of one expert; unset: d_ff"""
    num_shared_experts: int = 0
    """expert widths of a dense layer beside the experts that every token visits"""
    num_dense_layers: int = 0
    """first layers that stay dense"""
    moe_every: int = 1
    """every n-th layer after those is a mixture, the others are dense"""
    capacity_factor: float | None = None
    """most tokens of an expert, as a multiple of an even share of a micro-batch; unset: none are dropped"""
    drop_by: Literal["position", "probability"] = "position"
    """with a capacity: drop the tokens that come last, or the least likely ones"""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """how the router's logits become weights"""
    router_normalize: bool | None = None
    """divide the weights of a token's experts by their sum; unset: with two experts or more"""
    router_scale: float = 1.0
    """factor on the weights of the experts"""
    balance: Literal["loss", "bias", "none"] = "loss"
    """keep experts equally busy by a loss, by a bias that chooses but never weighs, or not at all"""
    balance_over: Literal["microbatch", "batch"] = "microbatch"
    """what the loss keeps even: the choices of each micro-batch, or those of a whole batch, as they were in the step before"""
    balance_weight: float = 0.01
    """weight of the balance loss, which is 1 for even choices"""
    balance_rate: float | None = None
    """step of the balance bias; unset: 0.001"""
    router_z_weight: float = 0.001
    """weight of the mean squared logsumexp of the router's logits"""
    router_jitter: float = 0.0
    """in training the router's input is multiplied by random factors between 1 - this and 1 + this (Switch: 0.01)"""
    init: Literal["gpt2", "neox", "zero_residual"] = "gpt2"
    """scale of the initial weights: GPT-2 (0.02, residual outputs / sqrt(2 layers)), GPT-NeoX (small init, Wang init), or GPT-2's with residual outputs at zero"""

    @property
    def kv_heads(self) -> int:
        """Key and value heads of each attention layer."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def attention_width(self) -> int:
        """Width of all query heads together; d_model in most published models."""
        return self.num_heads * self.head_width

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward layer."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def expert_width(self) -> int:
        """Width of one expert."""
        return self.ffn_width if self.expert_d_ff is None else self.expert_d_ff

    @property
    def balances_batches(self) -> bool:
        """Whether the balance loss goes by the choices of the step before."""
        return self.num_experts > 0 and self.balance == "loss" and self.balance_over == "batch"

    @property
    def normalises_weights(self) -> bool:
        """Whether a token's weights add up to one before `router_scale`."""
        if self.router_normalize is None:
            return self.experts_per_token > 1
        return self.router_normalize

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        after = layer - self.num_dense_layers
        return self.num_experts > 0 and after >= 0 and after % self.moe_every == self.moe_every - 1

    @property
    def num_mixture_layers(self) -> int:
        """Layers that have experts."""
        return sum(self.is_mixture(layer) for layer in range(self.num_layers))

    @property
    def rotary_width(self) -> int:
        """Leading dimensions of each head that rotate."""
        return self.head_width if self.rotary_dims is None else self.rotary_dims

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and of the head."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source of text inside `data.sources`."""

    path: str = "stdlib"
    """'stdlib' (the Python standard library), a file, a folder, or a folder made by `lascaux prepare`"""
    weight: float | None = None
    """share of the samples in a mixture; unset for all sources: each in proportion to its size"""
    text_field: str = "text"
    """field that holds the text in .jsonl, .jsonl.zst and .parquet"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the text comes from and how it is cut into sequences."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    """sources of text: PATH, or PATH,PATH, or tables with path, weight, text_field"""
    valid_fraction: float = 0.05
    """share of documents held out for validation, chosen by the hash of their text"""
    document_boundaries: Literal["ignore", "respect"] = "ignore"
    """respect: attention, positions and loss do not cross from one document into the next"""
    strict: bool = False
    """refuse a source with a bad record instead of excluding, counting and listing it"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """The byte-level BPE tokenizer: trained on the sources, or loaded."""

    path: str | None = None
    """tokenizer.json, or a folder with it or with encoder.json and vocab.bpe; unset: train one of model.vocab_size"""
    pattern: Literal["gpt2", "code"] | None = None
    """how text is split before merging; code keeps a line break and its indentation together; unset: gpt2"""
    train_bytes: int | None = None
    """text the tokenizer is trained on, bytes; unset: 32,000,000"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch and numerics of the training run."""

    steps: int | None = None
    """optimizer steps; give this or train.tokens"""
    tokens: int | None = None
    """tokens to train on, rounded up to whole steps; give this or train.steps"""
    batch_tokens: int = 8192
    """tokens of one optimizer step over all devices"""
    microbatch_seqs: int = 32
    """sequences of one forward pass on one device"""
    seq_len: int = 256
    """tokens of one training sequence"""
    seed: int = 0
    """initial weights and the order of the data follow from it"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """dtype the network computes in; weights and optimizer stay in fp32; auto: bf16 where the hardware is faster at it, else fp32; fp16 needs a GPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    threads: int | None = None
    """CPU threads; unset: OMP_NUM_THREADS, else one for each core this process may use"""
    allocator: Literal["keep", "system"] = "keep"
    """CPU memory freed in a step: keep it for the next one (needs glibc), or leave it to the C library"""
    recompute: Literal["none", "block"] = "none"
    """block: keep only each block's input and recompute the rest in the backward pass"""
    compile: bool = False
    """compile the layers with torch.compile"""
    deterministic: bool = False
    """add gradients in one order for any dp_replicate and dp_shard: the weights are the same to the last bit"""
    tracking: Literal["none", "tensorboard", "wandb"] = "none"
    """write the metrics to TensorBoard or Weights & Biases as well (extra: tracking)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients change weights."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases"""
    lr: float = 6e-4
    """peak learning rate; with muon that of the matrices"""
    adamw_lr: float | None = None
    """peak learning rate of what AdamW updates beside muon; unset: lr"""
    embedding_lr: float | None = None
    """peak learning rate of the embeddings; unset: that of everything else AdamW updates"""
    weight_decay: float = 0.1
    """decoupled weight decay, on matrices and embeddings only"""
    beta1: float = 0.9
    """AdamW's average of the gradient"""
    beta2: float = 0.95
    """AdamW's average of the squared gradient"""
    eps: float = 1e-8
    """AdamW's denominator term"""
    muon_momentum: float | None = None
    """Muon's momentum; unset: 0.95"""
    muon_newton_schulz_steps: int | None = None
    """iterations of Muon's orthogonalisation; unset: 5"""
    grad_clip: float | None = 1.0
    """largest global gradient norm; "none" to switch clipping off"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over the steps, as a fraction of its peak."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """after the warm-up: a half cosine, or constant and then a straight decay, or constant"""
    warmup_steps: int = 100
    """steps of straight rise from zero"""
    decay_fraction: float | None = None
    """wsd: share of the steps in the decay; unset: 0.2"""
    final_lr_fraction: float | None = None
    """learning rate at the end as a fraction of the peak; unset: 0.1; not for constant"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How one model is split over the processes that `torchrun` starts; 1 leaves an axis out."""

    dp_replicate: int = 1
    """data parallel with whole weights: copies of the model, or of its shards"""
    dp_shard: int | None = None
    """data parallel with sharded weights, gradients and optimizer state (FSDP); unset: what the other axes leave of the processes"""
    tp: int = 1
    """tensor parallel: each process has some heads, feed-forward columns and vocabulary rows, and a part of the sequence in between"""
    cp: int = 1
    """context parallel: each process has two of 2 * cp pieces of every sequence"""
    ep: int = 1
    """expert parallel: each of ep processes has some of the experts, among those of dp_shard and cp"""
    pp: int = 1
    """pipeline parallel: each process has some of the layers"""
    virtual_pp: int = 1
    """stages of layers for each pipeline process; 1f1b has one"""
    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    """order of forward and backward passes in the pipeline"""
    timeout_seconds: int = 600
    """longest wait for another process; then the job ends and says which process is behind"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept of a run."""

    every_steps: int = 500
    """steps between checkpoints; one more is always written at the end"""
    keep: int = 2
    """newest checkpoints to keep; 0 keeps all"""
    background: bool = True
    """write while training goes on, from a copy of weights and optimizer state in CPU memory; false: training waits"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is looked at during training."""

    every_steps: int = 250
    """steps between validations and samples; 0 leaves only the one at the end"""
    max_tokens: int = 65536
    """validation tokens of a periodic validation; the one at the end has final_max_tokens"""
    final_max_tokens: int | None = None
    """validation tokens of the validation at the end; unset: all"""
    sample_prompts: tuple[str, ...] = ("",)
    """prompts continued at each validation; an empty one begins a new text"""
    sample_tokens: int = 64
    """tokens of each sample"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole tree: defaults, then the preset, then the file, then the flags."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
