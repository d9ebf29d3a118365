"""An engine around a network that says what it is told to, with a tokenizer of raw bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lascaux.config.schema import GenerateConfig, ModelConfig
from lascaux.data.roles import TokenRoles
from lascaux.generate.engine import Engine
from lascaux.generate.load import LoadedModel
from lascaux.generate.pages import PAGE_TOKENS, PagePool, Row
from lascaux.generate.request import EngineOptions
from lascaux.model.transformer import Transformer

CONFIG = ModelConfig(
    num_layers=1, d_model=8, num_heads=1, vocab_size=260, padded_vocab_size=320, max_context=256
)
END, SILENT = 256, 257


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends the text, 257 stands for no text."""

    vocab_size = 258
    end_of_text_id = END

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < END else b""


class ScriptedNetwork:
    """Whatever the prompt, the likeliest continuation is `script`, then end of text for ever.

    It looks at positions alone, not at what pages hold.
    """

    def __init__(self, script: Sequence[int], prompt_length: int, pool: PagePool) -> None:
        self.script, self.prompt_length, self.pool = list(script), prompt_length, pool
        self.chunk_tokens = PAGE_TOKENS
        self.chunks: list[tuple[int, int]] = []
        self.steps: list[int] = []

    def read(self, tokens: Sequence[int], start: int, table: Sequence[int]) -> Tensor:
        self.chunks.append((start, len(tokens)))
        return torch.arange(start, start + len(tokens))[:, None]

    def logits(self, x: Tensor) -> np.ndarray:
        logits = np.zeros((len(x), ByteTokenizer.vocab_size), dtype=np.float32)
        for row, position in zip(logits, x[:, 0].tolist(), strict=True):
            index = position - self.prompt_length + 1
            row[self.script[index] if 0 <= index < len(self.script) else END] = 50.0
        return logits

    def decode(self, rows: Sequence[Row]) -> np.ndarray:
        self.steps.append(len(rows))
        return self.logits(torch.tensor([[row.position] for row in rows]))


def loaded_model(model: Any = None, tokenizer: Any = None, native: Any = None) -> LoadedModel:
    tokenizer = tokenizer or ByteTokenizer()
    return LoadedModel(
        model=model or Transformer(CONFIG),
        tokenizer=tokenizer,
        roles=TokenRoles(end_ids=(tokenizer.end_of_text_id,), end_token="<end>"),
        settings=GenerateConfig(),
        device=torch.device("cpu"),
        name="scripted",
        precision="fp32",
        weight_bytes=1,
        native=native,
    )


def scripted_engine(
    script: Sequence[int], prompt_length: int = 1, **options: Any
) -> tuple[Engine, ScriptedNetwork]:
    engine = Engine(loaded_model(), EngineOptions(**options))
    network = ScriptedNetwork(script, prompt_length, engine._network.pool)
    engine._network = network  # type: ignore[assignment]
    return engine, network
