"""A tokenizer that splits many characters, and a random network over it."""

import pytest
import torch

from lascaux.config.schema import GenerateConfig, ModelConfig
from lascaux.data.roles import TokenRoles
from lascaux.data.tokenizer import Tokenizer, train_tokenizer
from lascaux.generate.load import LoadedModel
from lascaux.model.transformer import Transformer
from tests.unit.serve.servers import TEXTS, with_specials


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes, few merges and the two tokens of a conversation: many characters take two tokens."""
    trained = train_tokenizer(iter(TEXTS * 3), 290)
    return with_specials(trained, "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session")
def loaded(tokenizer: Tokenizer) -> LoadedModel:
    """A random network over that tokenizer."""
    config = ModelConfig(
        num_layers=2,
        d_model=32,
        num_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_context=128,
    )
    torch.manual_seed(0)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        roles=TokenRoles(end_ids=(tokenizer.end_of_text_id,), end_token="<|endoftext|>"),
        settings=GenerateConfig(),
        device=torch.device("cpu"),
        name="random",
        precision="fp32",
        weight_bytes=sum(p.nbytes for p in model.parameters()),
    )
