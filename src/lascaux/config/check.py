"""Rules that tie settings together, each with the message a user reads when it is broken.

`train`, `prepare` and `config` all call `check` before any work begins. A setting that would have
no effect is an error as well: it means something was misunderstood.
"""

import math
import re

from lascaux.config.plan_schema import PlanConfig
from lascaux.config.schema import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from lascaux.errors import ConfigError

_POSITIVE = (
    "model.num_layers model.d_model model.num_heads model.num_kv_heads model.head_dim model.d_ff "
    "model.vocab_size model.padded_vocab_size model.max_context model.norm_eps model.rotary_dims "
    "model.rotary_base model.rotary_original_context model.rotary_low_freq_factor "
    "model.rotary_high_freq_factor model.experts_per_token model.expert_d_ff model.moe_every "
    "model.capacity_factor model.router_scale model.balance_rate train.steps train.tokens "
    "train.batch_tokens train.microbatch_seqs "
    "train.seq_len train.threads optimizer.lr optimizer.adamw_lr optimizer.embedding_lr "
    "optimizer.eps "
    "optimizer.grad_clip optimizer.muon_newton_schulz_steps checkpoint.every_steps "
    "evaluate.max_tokens evaluate.final_max_tokens evaluate.sample_tokens generate.max_tokens "
    "tokenizer.train_bytes parallel.dp_replicate parallel.dp_shard parallel.tp parallel.cp "
    "parallel.ep parallel.pp parallel.virtual_pp parallel.timeout_seconds plan.devices "
    "plan.price_usd_per_device_hour plan.power_watts plan.pue plan.grid_kg_per_kwh "
    "plan.device_hours_between_failures plan.experiment_factor plan.staff_usd plan.budget_usd "
    "plan.tokens_per_day plan.years_ahead generate.threads generate.repetition_penalty "
    "serve.max_streams serve.cache_tokens"
).split()
_OF_EXPERTS = (
    "experts_per_token expert_d_ff num_shared_experts num_dense_layers moe_every capacity_factor "
    "drop_by router_score router_normalize router_scale balance balance_over balance_weight "
    "balance_rate router_z_weight router_jitter"
).split()
_NOT_NEGATIVE = (
    "model.num_experts model.num_shared_experts model.num_dense_layers model.balance_weight "
    "model.router_z_weight "
    "model.learned_position_offset train.seed optimizer.weight_decay schedule.warmup_steps "
    "checkpoint.keep evaluate.every_steps generate.temperature generate.top_k generate.seed "
    "plan.seed generate.draft_tokens serve.port serve.max_waiting"
).split()
_BELOW_ONE = (
    "data.valid_fraction model.router_jitter optimizer.beta1 optimizer.beta2 "
    "optimizer.muon_momentum generate.min_p"
).split()
_FRACTION = "schedule.decay_fraction schedule.final_lr_fraction generate.top_p".split()


def check(config: Config) -> None:
    """Raise ConfigError for the first rule that the tree breaks."""
    check_ranges(config)
    check_model(config.model)
    check_train(config.train, config.model)
    check_optimizer(config.optimizer)
    check_schedule(config.schedule, config.train)
    check_plan(config.plan)
    if config.tokenizer.path is not None:
        for name in ("pattern", "train_bytes"):
            if getattr(config.tokenizer, name) is not None:
                raise no_effect(f"tokenizer.{name}", "with tokenizer.path, which loads one")
    if "" in config.generate.stop:
        raise ConfigError("'generate.stop' has an empty string, which would end every text at once")
    weights = [source.weight for source in config.data.sources]
    if not weights:
        raise ConfigError("'data.sources' is empty; give at least one path, or 'stdlib'")
    if any(weight is not None and not 0 < weight < math.inf for weight in weights):
        raise ConfigError(f"'data.sources' needs weights above 0; got {weights}")
    if None in weights and any(weight is not None for weight in weights):
        raise ConfigError(
            f"'data.sources' has a weight for some sources only: {weights}; "
            "give one to each, or to none to mix them in proportion to their size"
        )


def check_plan(plan: PlanConfig) -> None:
    """A price with its date, a ZeRO stage that exists, a PUE that buildings have."""
    if (plan.price_usd_per_device_hour is None) != (plan.price_date is None):
        raise ConfigError(
            "give plan.price_usd_per_device_hour and plan.price_date (YYYY-MM) together: a price "
            "without its date cannot be compared"
        )
    if plan.price_date is not None and not re.fullmatch(
        r"20\d\d(-(0[1-9]|1[0-2]))?", plan.price_date
    ):
        raise ConfigError(f"'plan.price_date' must be YYYY-MM; got '{plan.price_date}'")
    if plan.zero not in (None, 0, 1, 2, 3):
        raise ConfigError(f"'plan.zero' must be 0, 1, 2 or 3; got {plan.zero}")
    for name in ("pue", "experiment_factor"):
        value = getattr(plan, name)
        if value is not None and value < 1:
            raise ConfigError(f"'plan.{name}' is at least 1; got {value:g}")


def check_ranges(config: Config) -> None:
    """Numbers on their own: finite, and within what the key can mean."""
    for key in _POSITIVE + _NOT_NEGATIVE + _BELOW_ONE + _FRACTION:
        section, leaf = key.split(".")
        value = getattr(getattr(config, section), leaf)
        if value is None:
            continue
        if key in _POSITIVE:
            fits, wanted = 0 < value < math.inf, "above 0"
        elif key in _NOT_NEGATIVE:
            fits, wanted = 0 <= value < math.inf, "0 or above"
        elif key in _BELOW_ONE:
            fits, wanted = 0 <= value < 1, "at least 0 and below 1"
        else:
            fits, wanted = 0 <= value <= 1, "between 0 and 1"
        if not fits:
            raise ConfigError(f"'{key}' must be {wanted}; got {value}")


def check_model(model: ModelConfig) -> None:
    """Widths and heads that fit together, and no setting of a part that is not there."""
    if model.head_dim is None and model.d_model % model.num_heads:
        nearest = nearest_divisors(model.d_model, model.num_heads)
        raise ConfigError(
            f"[model] d_model {model.d_model} is not a multiple of num_heads {model.num_heads}; "
            f"num_heads {' or '.join(map(str, nearest))} would divide it, or set model.head_dim"
        )
    if model.num_heads % model.kv_heads:
        raise ConfigError(
            f"[model] num_heads {model.num_heads} is not a multiple of num_kv_heads "
            f"{model.kv_heads}; each key-value head serves the same number of query heads"
        )
    if model.vocab_rows < model.vocab_size:
        raise ConfigError(
            f"[model] padded_vocab_size {model.padded_vocab_size} is below vocab_size "
            f"{model.vocab_size}"
        )
    check_positions(model)
    check_experts(model)
    if model.norm == "rmsnorm" and model.norm_bias:
        raise no_effect("model.norm_bias", "with model.norm = 'rmsnorm', which has none")


def check_positions(model: ModelConfig) -> None:
    """Rotary settings need rotary positions, a learned offset a learned table."""
    defaults = ModelConfig()
    if model.position != "rotary":
        for name in ("rotary_dims", "rotary_base", "rotary_layout", "rotary_scaling"):
            if getattr(model, name) != getattr(defaults, name):
                raise no_effect(f"model.{name}", f"with model.position = '{model.position}'")
    elif model.rotary_width % 2 or model.rotary_width > model.head_width:
        raise ConfigError(
            f"[model] rotary_dims {model.rotary_width} must be even and at most the head width "
            f"{model.head_width}"
        )
    check_rotary_scaling(model)
    if model.position != "learned" and model.learned_position_offset:
        raise no_effect(
            "model.learned_position_offset", f"with model.position = '{model.position}'"
        )


def check_rotary_scaling(model: ModelConfig) -> None:
    """Each way to stretch rotary wavelengths has settings of its own."""
    defaults, kind = ModelConfig(), model.rotary_scaling
    own = ("rotary_original_context", "rotary_low_freq_factor", "rotary_high_freq_factor")
    unused = {"none": ("rotary_factor", *own), "linear": own, "llama3": ()}[kind]
    for name in unused:
        if getattr(model, name) != getattr(defaults, name):
            raise no_effect(f"model.{name}", f"with model.rotary_scaling = '{kind}'")
    if not 1 <= model.rotary_factor < math.inf:
        raise ConfigError(f"'model.rotary_factor' must be 1 or above; got {model.rotary_factor}")
    if kind == "llama3" and model.rotary_original_context is None:
        raise ConfigError("model.rotary_scaling = 'llama3' needs model.rotary_original_context")
    if model.rotary_low_freq_factor >= model.rotary_high_freq_factor:
        raise ConfigError(
            f"[model] rotary_low_freq_factor {model.rotary_low_freq_factor} must be below "
            f"rotary_high_freq_factor {model.rotary_high_freq_factor}"
        )


def check_experts(model: ModelConfig) -> None:
    """Settings of experts need experts, and enough of them."""
    defaults = ModelConfig()
    if model.num_experts == 0:
        for name in _OF_EXPERTS:
            if getattr(model, name) != getattr(defaults, name):
                raise no_effect(f"model.{name}", "with model.num_experts = 0")
        return
    if model.num_mixture_layers == 0:
        raise ConfigError(
            f"[model] num_experts {model.num_experts}, but no layer has them: num_dense_layers "
            f"{model.num_dense_layers} and moe_every {model.moe_every} leave none of the "
            f"{model.num_layers} layers; lower one of them"
        )
    if model.experts_per_token > model.num_experts:
        raise ConfigError(
            f"[model] experts_per_token {model.experts_per_token} is more than num_experts "
            f"{model.num_experts}"
        )
    if model.ffn_bias:
        raise ConfigError("[model] ffn_bias is not for models with experts, which have no biases")
    if model.capacity_factor is None and model.drop_by != "position":
        raise no_effect("model.drop_by", "without model.capacity_factor, as nothing is dropped")
    if model.balance != "bias" and model.balance_rate is not None:
        raise no_effect("model.balance_rate", f"with model.balance = '{model.balance}'")
    if model.balance != "loss" and model.balance_over != "microbatch":
        raise no_effect("model.balance_over", f"with model.balance = '{model.balance}'")
    if model.balance != "loss" and model.balance_weight != defaults.balance_weight:
        raise no_effect("model.balance_weight", f"with model.balance = '{model.balance}'")


def check_train(train: TrainConfig, model: ModelConfig) -> None:
    """A length, and batches that come out whole."""
    if (train.steps is None) == (train.tokens is None):
        got = "neither" if train.steps is None else "both"
        raise ConfigError(f"give either train.steps or train.tokens; got {got}")
    if train.seq_len > model.max_context:
        raise ConfigError(
            f"train.seq_len {train.seq_len} is above model.max_context {model.max_context}"
        )
    microbatch_tokens = train.microbatch_seqs * train.seq_len
    if train.batch_tokens % microbatch_tokens:
        below = max(1, train.batch_tokens // microbatch_tokens) * microbatch_tokens
        raise ConfigError(
            f"train.batch_tokens {train.batch_tokens} is not a multiple of train.microbatch_seqs "
            f"{train.microbatch_seqs} x train.seq_len {train.seq_len} = {microbatch_tokens}; "
            f"nearest: {below} or {below + microbatch_tokens}"
        )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Muon's settings need Muon."""
    if optimizer.name != "muon":
        for name in ("adamw_lr", "muon_momentum", "muon_newton_schulz_steps"):
            if getattr(optimizer, name) is not None:
                raise no_effect(f"optimizer.{name}", f"with optimizer.name = '{optimizer.name}'")


def check_schedule(schedule: ScheduleConfig, train: TrainConfig) -> None:
    """A decay only where the schedule decays, and a warm-up that ends."""
    if schedule.name != "wsd" and schedule.decay_fraction is not None:
        raise no_effect("schedule.decay_fraction", f"with schedule.name = '{schedule.name}'")
    if schedule.name == "constant" and schedule.final_lr_fraction is not None:
        raise no_effect("schedule.final_lr_fraction", "with schedule.name = 'constant'")
    steps = num_steps(train)
    if schedule.warmup_steps >= steps:
        raise ConfigError(
            f"schedule.warmup_steps {schedule.warmup_steps} leaves nothing of the {steps} steps "
            "of train.steps; lower one or raise the other"
        )


def num_steps(train: TrainConfig) -> int:
    """Optimizer steps of the run; tokens are rounded up to whole steps."""
    if train.steps is not None:
        return train.steps
    assert train.tokens is not None
    return -(-train.tokens // train.batch_tokens)


def no_effect(key: str, why: str) -> ConfigError:
    """The error for a setting that nothing reads."""
    return ConfigError(f"'{key}' has no effect {why}; remove it, or unset it with --{key}=none")


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of `number` next to `wanted`, below and above."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    return below + [d for d in divisors if d > wanted][:1]
