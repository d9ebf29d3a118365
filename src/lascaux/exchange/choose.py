"""From a family's config.json to our network and back, and which family can express a network.

Reading is the only truth: a family can express a network if reading the config.json that would be
written gives a network that computes the same. Biases that only the family has are filled with
zeros.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lascaux.checkpoint.files import shown
from lascaux.config.check import check_model
from lascaux.config.schema import ModelConfig
from lascaux.errors import CheckpointError, ConfigError, suggest
from lascaux.exchange.families import FAMILIES, GPT_NEO, GPT_NEOX, MIXTRAL, OPT, Family
from lascaux.exchange.settings import LARGEST_LENGTH, Settings

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu_squared",
}
GATED = {"silu": "swiglu", "swish": "swiglu"}
ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
ACTIVATION_NAMES |= {"relu_squared": "relu2"}
ROTARY_OBJECT = ("partial_rotary_factor",)
ORIGINAL = "original_max_position_embeddings"
BIASES = ("attention_bias", "attention_output_bias", "ffn_bias", "norm_bias", "head_bias")
OF_TRAINING = (
    "init",
    "balance_over",
    "balance_weight",
    "balance_rate",
    "router_z_weight",
    "router_jitter",
)
"""Settings of the model that change training alone; config.json has no place for them."""


def find_family(content: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.json.

    Raises: CheckpointError for one that is not known, and for quantised weights.
    """
    name = content.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type {shown(name)} is not known to Lascaux"
            f"{suggest(str(name), FAMILIES)}; it reads {', '.join(FAMILIES)}"
        )
    if content.get("quantization_config"):
        raise CheckpointError(
            f"{path}: the weights are quantised (quantization_config); import the original weights"
        )
    return FAMILIES[name]


def read_model(family: Family, s: Settings) -> ModelConfig:
    """The network that a config.json describes; rows beyond the tokenizer are told apart later.

    Raises: ConfigError for what our network has not.
    """
    for name, wanted in family.demanded.items():
        s.demand(name, wanted, "Lascaux's network has no other")
    values = dict(family.fixed)
    for ours, (theirs, default) in family.settings.items():
        value = read_setting(s, ours.split()[0], theirs, default)
        values |= dict.fromkeys(ours.split(), value)
    values["vocab_size"] = s.whole("vocab_size", LARGEST_LENGTH)
    values |= read_scaling(family, s, values["max_context"])
    d_model, num_heads = values["d_model"], values["num_heads"]
    if d_model % num_heads:
        name = family.settings["num_heads"][0].split()[0]
        raise s.error(name, f"a divisor of the width, {d_model}")
    head_width = values.get("head_dim") or d_model // num_heads
    if isinstance(values.get("rotary_dims"), float):
        values["rotary_dims"] = int(head_width * values["rotary_dims"])
    usual = {
        "d_ff": 4 * d_model,
        "num_kv_heads": num_heads,
        "head_dim": d_model // num_heads,
        "rotary_dims": head_width,
    }
    for name, value in usual.items():
        if values.get(name) == value:
            values[name] = None  # it follows from the others
    model = ModelConfig(**values)
    check_peculiarities(family, s, model)
    try:
        check_model(model)
    except ConfigError as error:
        raise ConfigError(f"{s.path}: {error}") from error
    return model


def read_scaling(family: Family, s: Settings, max_context: int) -> dict[str, Any]:
    """How rotary wavelengths are stretched. Raises: ConfigError for a way that we have not."""
    name, kind = s.find(family.scaling)
    if kind in (None, "default", "none"):
        return {}
    if kind not in ("linear", "llama3"):
        raise s.error(name, "'default', 'linear' or 'llama3'; Lascaux stretches in no other way")
    prefix = family.scaling.removesuffix("type") if "." in family.scaling else ""
    values: dict[str, Any] = {"rotary_scaling": kind, "rotary_factor": s.above(f"{prefix}factor")}
    if kind == "llama3":
        values |= {
            "rotary_low_freq_factor": s.above(f"{prefix}low_freq_factor"),
            "rotary_high_freq_factor": s.above(f"{prefix}high_freq_factor"),
            "rotary_original_context": s.whole(ORIGINAL, LARGEST_LENGTH, max_context),
        }
    return values


def write_scaling(model: ModelConfig) -> dict[str, Any]:
    """The same in their words."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rotary_scaling != "none":
        found |= {"rope_type": model.rotary_scaling, "factor": model.rotary_factor}
    if model.rotary_scaling == "llama3":
        found |= {
            "low_freq_factor": model.rotary_low_freq_factor,
            "high_freq_factor": model.rotary_high_freq_factor,
            ORIGINAL: model.rotary_original_context,
        }
    return found


def read_setting(s: Settings, ours: str, theirs: str, default: Any) -> Any:
    """One setting of theirs in our words."""
    if ours == "activation":
        return s.word(theirs, GATED if default == "silu" else ACTIVATIONS, default)
    if ours == "block":
        return "parallel_two_norms" if s.flag(theirs, default) else "sequential"
    if isinstance(default, bool):
        return s.flag(theirs, default)
    if isinstance(default, float):
        return s.number(theirs, default)
    if ours in ("num_kv_heads", "head_dim", "d_ff"):
        return s.optional(theirs)
    return s.whole(theirs, LARGEST_LENGTH if ours == "max_context" else None, default)


def check_peculiarities(family: Family, s: Settings, model: ModelConfig) -> None:
    """What one family alone has. Raises: ConfigError."""
    if family is OPT and s.optional("word_embed_proj_dim") not in (None, model.d_model):
        raise s.error("word_embed_proj_dim", f"hidden_size {model.d_model}, or absent")
    window, local = None, False
    if family is MIXTRAL:
        window, local = s.optional("sliding_window", LARGEST_LENGTH), True
    if family is GPT_NEO:
        window = s.whole("window_size", LARGEST_LENGTH, 256)
        layers, types = s.find("attention_layers")[1], s.find("attention_types")[1]
        local = "local" in repr(layers or types or "local")
    if local and window is not None and window < model.max_context:
        raise s.error(
            "sliding_window" if family is MIXTRAL else "window_size",
            f"at least max_position_embeddings {model.max_context} where layers attend to a window "
            "(Lascaux's attend to everything before)",
        )


def write_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The part of a config.json that describes the network."""
    content = {name: value for name, value in family.demanded.items() if name not in ROTARY_OBJECT}
    for ours, (theirs, default) in family.settings.items():
        content[theirs.split()[0]] = write_setting(model, ours.split(), default)
    content |= {"vocab_size": model.vocab_rows}
    if "rotary_base" in family.settings:
        rotary = write_scaling(model)
        if family is GPT_NEOX:
            rotary["partial_rotary_factor"] = content["rotary_pct"]
        content["rope_parameters"] = rotary
        if model.rotary_scaling != "none":  # as older versions know it
            content["rope_scaling"] = rotary | {"type": model.rotary_scaling}
    if family is GPT_NEO:
        content["attention_types"] = [[["global"], model.num_layers]]
    if family is OPT:
        content["word_embed_proj_dim"] = model.d_model
    return content


def write_setting(model: ModelConfig, ours: list[str], default: Any) -> Any:
    """One setting of theirs; of what the family has not, another that reading finds."""
    match ours[0]:
        case "activation":
            return "silu" if default == "silu" else ACTIVATION_NAMES.get(model.activation, "gelu")
        case "block":
            return model.block != "sequential"
        case "d_ff":
            return model.expert_width if model.num_experts else model.ffn_width
        case "num_kv_heads":
            return model.kv_heads
        case "head_dim":
            return model.head_width
        case "router_normalize":
            return model.normalises_weights
        case "rotary_dims":
            if not isinstance(default, float):
                return model.rotary_width
            fraction = model.rotary_width / model.head_width
            short = int(model.head_width * fraction) < model.rotary_width  # rounded down
            return math.nextafter(fraction, 1.0) if short else fraction
        case _ if isinstance(default, bool):
            return any(getattr(model, name) for name in ours)
        case name:
            return getattr(model, name)


def computed(model: ModelConfig) -> dict[str, Any]:
    """Every setting that changes what the network computes, with those that follow from others."""
    values = dataclasses.asdict(model) | {
        "num_kv_heads": model.kv_heads,
        "head_dim": model.head_width,
        "d_ff": model.ffn_width if model.num_mixture_layers < model.num_layers else None,
        "expert_d_ff": model.expert_width if model.num_experts else None,
        "rotary_dims": model.rotary_width,
        "vocab_size": model.vocab_rows,
        "padded_vocab_size": None,
        "router_normalize": model.normalises_weights,
        "balance": "bias" if model.balance == "bias" else "loss",
    }
    return {name: value for name, value in values.items() if name not in OF_TRAINING}


def choose_family(model: ModelConfig) -> tuple[Family, ModelConfig, list[str]]:
    """The family for an export, the network an import of it gives, and biases filled with zeros.

    Raises: ConfigError naming the settings that the nearest family has not.
    """
    if model.d_model % model.num_heads:
        raise ConfigError(
            f"no Hugging Face family known to Lascaux has model.head_dim {model.head_width} where "
            f"model.num_heads {model.num_heads} does not divide model.d_model {model.d_model}"
        )
    found: list[tuple[int, int, Family, ModelConfig, list[str], list[str]]] = []
    for family in FAMILIES.values():
        try:
            other = read_model(family, Settings(write_config(family, model), Path(family.name)))
        except ConfigError:  # such as no experts in a family of mixtures
            continue
        mine, theirs = computed(model), computed(other)
        zeros = [name for name in BIASES if theirs[name] and not mine[name]]
        wrong = [name for name in mine if mine[name] != theirs[name] and name not in zeros]
        found.append((len(wrong), len(zeros), family, other, zeros, wrong))
    _, _, family, other, zeros, wrong = min(found, key=lambda each: each[:2])
    if wrong:
        mine, theirs = computed(model), computed(other)
        differences = ", ".join(
            f"model.{name} {mine[name]!r} ({family.name} has {theirs[name]!r})"
            for name in wrong
            if theirs[name] is not None  # the width of dense layers where there are none
        )
        raise ConfigError(
            f"no Hugging Face family known to Lascaux computes what this model does; the nearest "
            f"one differs in {differences}"
        )
    return family, dataclasses.replace(other, vocab_size=model.vocab_rows), zeros
