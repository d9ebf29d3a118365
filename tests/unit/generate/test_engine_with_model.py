"""The engine with the real network: the cache changes nothing, and seeds decide everything."""

import dataclasses

import pytest
import torch

from lascaux.config.schema import GenerateConfig, ModelConfig
from lascaux.generate.cache import make_cache
from lascaux.generate.engine import generate, generate_text
from lascaux.generate.sampling import sample, token_generator
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer

CPU = torch.device("cpu")
TINY = ModelConfig(
    num_layers=3, d_model=32, num_heads=4, vocab_size=300, padded_vocab_size=304, max_context=48
)
SHAPES = {
    "rotary": {},
    "grouped keys": {"num_kv_heads": 2, "qk_norm": "head", "norm": "rmsnorm"},
    "gpt2": {"position": "learned", "norm_bias": True},
    "alibi": {"position": "alibi", "embedding_norm": True, "block": "parallel_two_norms"},
    "gptj": {"block": "parallel", "rotary_dims": 4, "rotary_layout": "interleaved"},
    "nothing": {"position": "none"},
}
CACHE_TOLERANCE = 2e-5  # fp32 logits of a few units: products of one row and of many round apart


class ByteTokenizer:
    vocab_size = 300
    end_of_text_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def make_model(shape: str) -> Transformer:
    model = Transformer(dataclasses.replace(TINY, **SHAPES[shape]))  # type: ignore[arg-type]
    initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform, so that a wrong cache would show
    return model


def uncached_text(model: Transformer, prompt: str, settings: GenerateConfig) -> str:
    """The whole sequence through `forward` again for each token, no cache, no stream."""
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(prompt)
    drawn: list[int] = []
    while len(drawn) < settings.max_tokens and len(tokens) < model.config.max_context:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[:, -1, : tokenizer.vocab_size]
        drawn.append(int(sample(logits, settings, token_generator(settings.seed, len(drawn)))))
        tokens.append(drawn[-1])
        if drawn[-1] == tokenizer.end_of_text_id:
            break
    return b"".join(map(tokenizer.token_bytes, drawn)).decode(errors="replace")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_generation_equals_uncached(shape: str, temperature: float) -> None:
    model = make_model(shape)
    settings = GenerateConfig(max_tokens=30, temperature=temperature, top_p=0.95, seed=3)
    text = generate_text(model, ByteTokenizer(), "the cave", settings, device=CPU)  # type: ignore[arg-type]
    assert text == uncached_text(model, "the cave", settings)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_in_steps_of_any_length_equal_those_at_once(shape: str) -> None:
    model = make_model(shape).eval()
    tokens = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = make_cache(model.config, 2, 20, torch.float32, CPU)
    with torch.inference_mode():
        whole = model(tokens)
        parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 4, 7], dim=1)]
    torch.testing.assert_close(
        torch.cat(parts, dim=1), whole, atol=CACHE_TOLERANCE, rtol=CACHE_TOLERANCE
    )


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = make_model("rotary")

    def text(seed: int, max_tokens: int = 20) -> str:
        settings = GenerateConfig(max_tokens=max_tokens, temperature=1.0, seed=seed)
        return generate_text(model, ByteTokenizer(), "def ", settings, device=CPU)  # type: ignore[arg-type]

    first = text(1)
    torch.manual_seed(5)
    assert text(1) == first
    assert text(2) != first
    assert first.startswith(text(1, max_tokens=5).rstrip("\ufffd"))


def test_training_goes_on_after_generating() -> None:
    model = make_model("rotary").train()
    settings = GenerateConfig(max_tokens=4)
    *_, last = generate(model, ByteTokenizer(), "", settings, device=CPU)  # type: ignore[arg-type]
    assert last.finish_reason in ("length", "end_of_text")
    assert model.training
    model(torch.tensor([[1, 2, 3]])).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
