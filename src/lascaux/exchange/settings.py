"""A family's config.json, read value by value: types, ranges, and what nobody asked for."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lascaux.checkpoint.files import shown
from lascaux.errors import CheckpointError, ConfigError

LARGEST_JSON_BYTES = 64 << 20
LARGEST_WIDTH = 1 << 20
LARGEST_LENGTH = 1 << 24
WITHOUT_EFFECT = set(
    "architectures model_type transformers_version dtype torch_dtype use_cache initializer_range "
    "init_std bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
    "resid_pdrop embd_pdrop attn_pdrop resid_dropout embed_dropout attention_dropout "
    "hidden_dropout dropout layerdrop activation_dropout classifier_dropout summary_type "
    "summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
    "scale_attn_weights skip_bias_add_qkv reorder_and_upcast_attn pretraining_tp slow_but_exact "
    "output_router_logits router_aux_loss_coef router_jitter_noise gradient_checkpointing "
    "use_bfloat16 n_ctx rotary task_specific_params tokenizer_class prefix is_decoder "
    "return_dict output_attentions output_hidden_states id2label label2id problem_type "
    "chunk_size_feed_forward is_encoder_decoder _name_or_path name_or_path offset_alibi "
    "skip_bias_add masked_softmax_fusion attention_softmax_in_fp32 bias_dropout_fusion "
    "unk_token_id n_inner seq_length".split()
)
"""Of training, of generation, or how the same numbers are computed."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; NaN and Infinity, which are no JSON, are refused.

    Raises: CheckpointError naming the file.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} must be a file, not a folder or a device")
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > LARGEST_JSON_BYTES:
        raise CheckpointError(f"{path} has more than {LARGEST_JSON_BYTES:,} bytes; it is no index")
    try:
        content = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); download the folder again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return cast(dict[str, Any], content)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


class Settings:
    """The settings of a config.json; an absent one and null are the same.

    What `rope_parameters`, or `rope_scaling` of older files, holds counts as settings of their own.

    Raises: ConfigError naming the file, the key, what was found and what is wanted.
    """

    def __init__(self, content: Mapping[str, Any], path: Path) -> None:
        rotary = content.get("rope_scaling") or content.get("rope_parameters") or {}
        self.path, self.content = path, dict(content)
        self._read = {"rope_scaling", "rope_parameters"}
        if not isinstance(rotary, dict):
            raise self.error("rope_parameters", "an object")
        self.content |= cast(dict[str, Any], rotary)

    def error(self, name: str, wanted: str) -> ConfigError:
        """The error for a setting of the wrong value."""
        found = shown(self.content.get(name))
        return ConfigError(f"{self.path}: '{name}' must be {wanted}; got {found}")

    def find(self, names: str) -> tuple[str, Any]:
        """The first of several spellings that is there, and its value; None for none of them."""
        words = names.split()
        self._read.update(words)
        for name in words:
            if self.content.get(name) is not None:
                return name, self.content[name]
        return words[0], None

    def optional(self, names: str, limit: int | None = None) -> int | None:
        """A whole number above 0, or None."""
        name, value = self.find(names)
        limit = LARGEST_WIDTH if limit is None else limit
        if value is None:
            return None
        if type(value) is not int or not 1 <= value <= limit:
            raise self.error(name, f"a whole number from 1 to {limit:,}")
        return value

    def whole(self, names: str, limit: int | None = None, default: int | None = None) -> int:
        """A whole number above 0; without a default it must be there."""
        value = self.optional(names, limit)
        if value is None and default is None:
            raise self.error(names.split()[0], "there")
        return value if value is not None else cast(int, default)

    def above(self, names: str) -> float:
        """A number above 0 that must be there."""
        name, value = self.find(names)
        if value is None:
            raise self.error(name, "there")
        return self.number(names, 0.0)

    def number(self, names: str, default: float) -> float:
        """A number above 0."""
        name, value = self.find(names)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        _, value = self.find(name)
        if value is not None and type(value) is not bool:
            raise self.error(name, "true or false")
        return default if value is None else value

    def word(self, name: str, known: Mapping[str, str], default: str) -> Any:
        """What a word stands for."""
        _, value = self.find(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in known:
            raise self.error(name, f"one of {', '.join(known)}")
        return known[value]

    def demand(self, name: str, wanted: object, why: str) -> None:
        """Refuse any value but one; an absent setting is that one."""
        _, value = self.find(name)
        same = value == wanted and (type(value) is bool) == (type(wanted) is bool)
        if value is not None and not same:
            raise self.error(name, f"{json.dumps(wanted)}: {why}")

    def unread(self) -> list[str]:
        """Settings that nothing has asked for and that may have an effect."""
        return sorted(self.content.keys() - self._read - WITHOUT_EFFECT)
