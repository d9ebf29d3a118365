"""Text in, text out: one prompt continued, for the command line and for samples while training."""

from collections.abc import Iterator

import torch

from lascaux.config.schema import GenerateConfig
from lascaux.data.roles import TokenRoles
from lascaux.data.tokenizer import Tokenizer
from lascaux.errors import RequestError
from lascaux.generate.engine import Engine
from lascaux.generate.load import LoadedModel, without_capacity
from lascaux.generate.request import EngineOptions, Piece, Request
from lascaux.generate.sampling import sampling_of
from lascaux.model.moe import routers_of
from lascaux.model.transformer import Transformer


def generate(loaded: LoadedModel, prompt: str, settings: GenerateConfig) -> Iterator[Piece]:
    """Continue the prompt; an empty one stands for the beginning of a text.

    The request is checked here, tokens are drawn as the iterator is read. Prompt and answer
    together never exceed `model.max_context` tokens; a prompt is never shortened.

    Raises: RequestError for settings out of range and for a prompt that leaves no room;
    CheckpointError for a tokenizer with more ids than the model.
    """
    tokens = prompt_tokens(prompt, loaded.tokenizer, loaded.roles)
    sampling = sampling_of(settings)
    room = min(loaded.model.config.max_context, len(tokens) + settings.max_tokens)
    options = EngineOptions(
        max_streams=1,
        cache_tokens=room,
        reuse_prefixes=False,
        draft_tokens=settings.draft_tokens,
    )
    engine = Engine(loaded, options)
    return engine.run(Request(prompt=tokens, sampling=sampling))


def prompt_tokens(prompt: str, tokenizer: Tokenizer, roles: TokenRoles) -> tuple[int, ...]:
    """The ids of a text to be continued. Raises: RequestError for what is no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"'prompt' is not valid text at character {error.start}; give it in UTF-8"
        ) from None
    return (*roles.begin_ids, *tokenizer.encode(prompt)) or (tokenizer.end_of_text_id,)


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerateConfig,
    *,
    device: torch.device,
) -> str:
    """The whole continuation by a model in training, which is left as it was.

    Raises what `generate` raises.
    """
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        roles=TokenRoles(end_ids=(tokenizer.end_of_text_id,), end_token=""),
        settings=settings,
        device=device,
        name="",
        precision="fp32",
        weight_bytes=0,
    )
    was_training, routers = model.training, routers_of(model).values()
    model.eval()
    for router in routers:
        router.config = without_capacity(model.config)
    try:
        return "".join(piece.text for piece in generate(loaded, prompt, settings))
    finally:
        model.train(was_training)
        for router in routers:
            router.config = model.config
