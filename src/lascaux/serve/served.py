"""The model that is served, as requests see it."""

import re
from dataclasses import dataclass
from functools import cached_property

from lascaux.data.roles import TokenRoles
from lascaux.data.tokenizer import Tokenizer
from lascaux.generate.engine import Engine
from lascaux.serve.limits import ServerLimits
from lascaux.serve.refusals import Refusal, shown

OF_THE_RUN = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
"""settings of [generate] that a page may begin with; requests without them get OpenAI's"""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A started engine under the name that requests give."""

    name: str
    created: int
    """seconds since 1970"""
    engine: Engine
    limits: ServerLimits
    parameters: int

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.loaded.tokenizer

    @property
    def roles(self) -> TokenRoles:
        """What its tokens are for."""
        return self.engine.loaded.roles

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.max_context

    @property
    def most_answers(self) -> int:
        """Answers one request may ask for: within the limit, and within the queue."""
        options = self.engine.options
        return min(self.limits.answers, options.max_streams + options.max_waiting)

    @cached_property
    def longest_token_bytes(self) -> int:
        """Bytes of the longest token: no text of more than so many times the context fits."""
        return max(1, int(self.tokenizer.byte_lengths.max()))

    @cached_property
    def special_names(self) -> tuple[str, ...]:
        """Names of the special tokens, longer ones first."""
        tokenizer = self.tokenizer
        silent = [i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i)]
        names = [name for i in silent if tokenizer.token_id(name := tokenizer.token_name(i)) == i]
        return tuple(sorted(names, key=len, reverse=True))

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the name of a special token, the longest where several begin."""
        return re.compile("|".join(map(re.escape, self.special_names)))

    def check_model(self, name: str | None) -> None:
        """Raise Refusal (404) for another model's name; none stands for this one."""
        if name is not None and name != self.name:
            raise Refusal(
                f"the model {shown(name)} does not exist; this server has {shown(self.name)}",
                status=404,
                field="model",
                code="model_not_found",
            )

    def describe(self) -> dict[str, object]:
        """The model as /v1/models shows it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lascaux",
            "max_model_len": self.max_context,
            "parameters": self.parameters,
            "precision": self.engine.loaded.precision,
            "chat_template": self.roles.chat_template is not None,
            "defaults": {name: getattr(self.engine.loaded.settings, name) for name in OF_THE_RUN},
        }
