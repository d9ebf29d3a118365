"""The engine with the real network: pages change nothing, and seeds decide everything."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lascaux.config.schema import GenerateConfig, ModelConfig
from lascaux.generate import load
from lascaux.generate.continuation import generate, generate_text
from lascaux.generate.engine import Engine
from lascaux.generate.load import place
from lascaux.generate.native import NativeWeights
from lascaux.generate.network import PagedNetwork
from lascaux.generate.pages import Row
from lascaux.generate.request import EngineOptions, Piece, Request, Sampling
from lascaux.generate.sampling import draw, sampling_of
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from tests.unit.generate.scripted import loaded_model

CPU = torch.device("cpu")
TINY = ModelConfig(
    num_layers=3, d_model=32, num_heads=4, vocab_size=300, padded_vocab_size=304, max_context=160
)
SHAPES: dict[str, dict[str, Any]] = {
    "rotary": {},
    "grouped keys": {"num_kv_heads": 2, "qk_norm": "head", "norm": "rmsnorm"},
    "olmoe": {"qk_norm": "projection", "norm": "rmsnorm", "activation": "swiglu"},
    "gpt2": {
        "position": "learned",
        "learned_position_offset": 2,
        "norm_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "ffn_bias": True,
        "activation": "gelu",
    },
    "alibi": {
        "position": "alibi",
        "embedding_norm": True,
        "norm_bias": True,
        "block": "parallel_two_norms",
        "activation": "relu",
    },
    "gptj": {
        "block": "parallel",
        "rotary_dims": 4,
        "rotary_layout": "interleaved",
        "tie_embeddings": False,
        "head_bias": True,
    },
    "no positions": {"position": "none", "sandwich_norm": True, "activation": "relu_squared"},
    "odd widths": {"d_model": 36, "num_heads": 3, "d_ff": 52, "activation": "swiglu"},
    "experts": {
        "num_experts": 5,
        "experts_per_token": 2,
        "num_shared_experts": 1,
        "activation": "swiglu",
        "expert_d_ff": 48,
    },
    "uneven experts": {
        "num_experts": 3,
        "num_dense_layers": 1,
        "d_ff": 100,
        "expert_d_ff": 48,
        "tie_embeddings": False,
    },
    "switch": {
        "num_experts": 4,
        "experts_per_token": 1,
        "num_dense_layers": 1,
        "router_score": "sigmoid",
        "balance": "bias",
        "router_scale": 2.0,
    },
}
TOLERANCE = dict(rtol=2e-5, atol=2e-5)
"""fp32 logits of a few units: sums in another order"""
KEPT_TOLERANCE = dict(rtol=0.0, atol=0.03)
"""keys and values in bf16, logits of a few units"""


class ByteTokenizer:
    vocab_size = 300
    end_of_text_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def make_model(shape: str) -> Transformer:
    model = Transformer(dataclasses.replace(TINY, **SHAPES[shape]))
    initialise(model, 0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, biases far from zero
            parameter.mul_(3.0).add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)
    return model.eval()


def held_as(model: Transformer, bits: int) -> Transformer:
    """The model with weights of few bits and activations in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "has_bf16_products", lambda device: False)
        for name, parameter in list(model.named_parameters()):
            place(model, name, parameter.data, "int8" if bits == 8 else "int4")
    return model


def uncached_text(model: Transformer, prompt: str, settings: GenerateConfig) -> str:
    """The whole sequence through `forward` again for each token: no cache, no pages, no stream."""
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(prompt)
    drawn: list[int] = []
    while len(drawn) < settings.max_tokens and len(tokens) < model.config.max_context:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, -1, : tokenizer.vocab_size].numpy()
        drawn.append(draw(logits, sampling_of(settings), len(drawn)))
        tokens.append(drawn[-1])
        if drawn[-1] == tokenizer.end_of_text_id:
            break
    return b"".join(map(tokenizer.token_bytes, drawn)).decode(errors="replace")


@pytest.mark.parametrize("native", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_with_pages_equals_uncached(
    shape: str, temperature: float, native: bool
) -> None:
    model = make_model(shape)
    loaded = loaded_model(
        model, ByteTokenizer(), NativeWeights(model, threads=2) if native else None
    )
    settings = GenerateConfig(max_tokens=24, temperature=temperature, top_p=0.95, seed=3)
    prompt = "the cave " * 7  # on both sides of a page's end
    text = "".join(piece.text for piece in generate(loaded, prompt, settings))
    assert text == uncached_text(model, prompt, settings)


def paged_logits(network: PagedNetwork, rows: Sequence[Row]) -> np.ndarray:
    """Two prompts, one over two pages that lie apart, then rows of both at once."""
    network.read([i % 300 for i in range(64)], 0, [1, 3])
    network.read([i % 290 for i in range(9)], 64, [1, 3])
    network.read(list(range(30)), 0, [2])
    return network.decode(rows)


ROWS = [
    Row(7, 73, [1, 3]),
    Row(8, 30, [2]),
    Row(9, 74, [1, 3]),
    Row(3, 0, [0]),
    Row(4, 31, [2]),
]
SEQUENCES = [
    [*range(64), *range(9), 7],
    [*range(30), 8],
    [*range(64), *range(9), 7, 9],
    [3],
    [*range(30), 8, 4],
]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("native", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_any_sequences_have_the_logits_of_each_alone(
    shape: str, native: bool, bits: Any
) -> None:
    model = make_model(shape)
    if bits:
        model = held_as(model, bits)
    network = PagedNetwork(model, 4, 300, NativeWeights(model, threads=2) if native else None)
    got = paged_logits(network, ROWS)
    for logits, sequence in zip(got, SEQUENCES, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([sequence]))[0, -1, :300]
        torch.testing.assert_close(torch.from_numpy(logits), alone, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_compiled_step_gives_a_row_the_same_bits_among_any_others(shape: str) -> None:
    model = make_model(shape)
    together = paged_logits(PagedNetwork(model, 4, 300, NativeWeights(model, threads=2)), ROWS)
    for threads in (1, 3):
        network = PagedNetwork(model, 4, 300, NativeWeights(model, threads))
        paged_logits(network, ROWS[3:4])
        for number in range(5):  # in order: later rows see what earlier ones stored
            alone = network.decode(ROWS[number : number + 1])
            assert np.array_equal(alone[0], together[number])
    many = [Row(t, t % 3, [0]) for t in range(100)]
    assert network.decode(many).shape == (100, 300)


@pytest.mark.parametrize("shape", ["rotary", "gpt2", "gptj"])
def test_the_compiled_step_rounds_nothing_but_what_it_keeps(shape: str) -> None:
    model = make_model(shape)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    wide = make_model(shape)
    wide.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    network = PagedNetwork(model, 4, 300, NativeWeights(model, threads=1))
    exact = PagedNetwork(wide, 4, 300)
    for position in range(30):
        got = network.decode([Row(position * 7, position, [0])])
        wanted = exact.decode([Row(position * 7, position, [0])])
        np.testing.assert_allclose(got, wanted, **KEPT_TOLERANCE)


def answers(engine: Engine, requests: Sequence[Request]) -> list[str]:
    pieces: list[list[Piece]] = [[] for _ in requests]
    engine.submit([(r, p.append) for r, p in zip(requests, pieces, strict=True)])
    while engine.step():
        pass
    return ["".join(piece.text for piece in each) for each in pieces]


@pytest.mark.parametrize("draft_tokens", [0, 4])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_text_is_the_same_alone_and_among_seven_others(reuse: bool, draft_tokens: int) -> None:
    model = make_model("grouped keys")
    loaded = loaded_model(model, ByteTokenizer(), NativeWeights(model, threads=2))
    requests = [
        Request(
            prompt=tuple(b"in the cave of bulls there is a bull " * (1 + number % 3))
            + (number,) * number,
            sampling=Sampling(max_tokens=30, seed=number // 2, choice=number % 2),
        )
        for number in range(8)
    ]
    alone = [
        answers(Engine(loaded, EngineOptions(reuse_prefixes=False)), [request])[0]
        for request in requests
    ]
    options = EngineOptions(reuse_prefixes=reuse, draft_tokens=draft_tokens)
    engine = Engine(loaded, options)
    assert answers(engine, requests) == alone
    assert answers(engine, requests[::-1]) == alone[::-1]
    assert len(set(alone)) == 8
    if reuse:
        assert engine.figures().cached_tokens > 0


@pytest.mark.parametrize("native", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("asked", ["embed", "score", "draw"])
def test_what_is_not_finite_stays_with_whoever_asked_for_it(asked: str, native: bool) -> None:
    """Token 299 has an embedding of NaN; all pages are used again after it."""
    model = make_model("uneven experts")
    model.embed.weight.data[299] = torch.nan
    weights = NativeWeights(model, threads=1) if native else None
    loaded = loaded_model(model, ByteTokenizer(), weights)
    sampling = Sampling(max_tokens=6, temperature=0, ignore_end_of_text=True)
    clean = Request(prompt=tuple(range(100)), sampling=sampling)
    shared = Request(prompt=(*range(80), 1), sampling=sampling)
    bad = Request(
        prompt=(*range(80), 299),
        sampling=sampling,
        embed=asked == "embed",
        score_prompt=asked == "score",
        top_logprobs=1 if asked == "score" else None,
    )
    options = EngineOptions(cache_tokens=256, max_streams=4)
    engine = Engine(loaded, EngineOptions(cache_tokens=256, reuse_prefixes=False))
    wanted = [list(engine.run(request)) for request in (clean, shared)]
    engine = Engine(loaded, options)
    pieces: list[Piece] = []
    engine.submit([(bad, pieces.append)])
    while engine.step():
        pass
    outcome = pieces[-1].outcome
    assert outcome is not None and outcome.finish_reason == "error"
    for request, expected in zip((clean, shared), wanted, strict=True):
        got = list(engine.run(request))
        assert [t.id for p in got for t in p.tokens] == [t.id for p in expected for t in p.tokens]
        assert got[-1].outcome is not None and got[-1].outcome.finish_reason == "length"


def test_two_engines_share_the_weights_in_threads_of_their_own() -> None:
    model = make_model("grouped keys")
    loaded = loaded_model(model, ByteTokenizer(), NativeWeights(model, threads=2))
    engines = [Engine(loaded), Engine(loaded)]
    request = Request(
        prompt=tuple(range(70)), sampling=Sampling(max_tokens=60, ignore_end_of_text=True)
    )
    pieces: list[list[Piece]] = [[], []]
    for engine, each in zip(engines, pieces, strict=True):
        engine.start()
        engine.submit([(request, each.append)])
    for engine in engines:
        engine.stop(drain_seconds=60)
    texts = ["".join(piece.text for piece in each) for each in pieces]
    assert texts[0] == texts[1] and texts[0]


def test_scores_are_the_log_probabilities_of_the_model() -> None:
    model = make_model("rotary")
    loaded = loaded_model(model, ByteTokenizer(), NativeWeights(model, threads=1))
    prompt = tuple(i % 256 for i in range(0, 700, 7))
    request = Request(
        prompt=prompt,
        sampling=Sampling(max_tokens=5, temperature=0, ignore_end_of_text=True),
        top_logprobs=3,
        score_prompt=True,
    )
    pieces = list(Engine(loaded).run(request))
    scored = [*pieces[0].prompt, *(token for piece in pieces for token in piece.tokens)]
    ids = [token.id for token in scored]
    assert tuple(ids[:100]) == prompt and len(ids) == 105
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0, :, :300].double().log_softmax(-1)
    for number, token in enumerate(scored[1:]):
        assert token.logprob == pytest.approx(wanted[number, token.id].item(), abs=1e-4)
        values, best = wanted[number].topk(3)
        assert [i for i, _ in token.top] == best.tolist()
        assert [p for _, p in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert scored[-1].logprob == scored[-1].top[0][1]


def test_an_embedding_is_the_mean_of_the_outputs_at_length_one() -> None:
    model = make_model("rotary")
    prompt = [i % 250 for i in range(100)]
    [piece] = Engine(loaded_model(model, ByteTokenizer())).run(
        Request(prompt=tuple(prompt), embed=True)
    )
    with torch.no_grad():
        mean = model.final_norm(model.residual(torch.tensor([prompt]))).mean(1)[0]
    assert piece.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)


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


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_training_comes_back_as_it_was(training: bool) -> None:
    model = make_model("rotary").train(training)
    generate_text(model, ByteTokenizer(), "", GenerateConfig(max_tokens=4), device=CPU)  # type: ignore[arg-type]
    assert model.training == training
    model(torch.tensor([[1, 2, 3]])).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_quantized_weights_are_near_what_they_stand_for() -> None:
    model = make_model("olmoe")
    exact = {n: p.detach().clone() for n, p in model.named_parameters()}
    for bits, most in ((8, 0.01), (4, 0.1)):
        network = held_as(make_model("olmoe"), bits)
        weight = network.blocks["0"].ffn.up.weight  # type: ignore[union-attr]
        wanted = exact["blocks.0.ffn.up.weight"]
        assert (weight - wanted).norm() / wanted.norm() < most  # type: ignore[operator]
        low, high = wanted.unflatten(1, (-1, 32)).aminmax(dim=-1)  # type: ignore[call-overload]
        step = (high - low).amax() / 15 if bits == 4 else wanted.abs().amax() / 127
        assert (weight - wanted).abs().max() <= step * 0.6  # type: ignore[operator]
        assert network.embed.bits == 8
