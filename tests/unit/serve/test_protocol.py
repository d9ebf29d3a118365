"""OpenAI's objects, seen by the official client, over an engine whose answers are scripted."""

import base64
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from lascaux.data.tokenizer import Tokenizer
from lascaux.generate.request import Piece, Request, ScoredToken
from tests.unit.serve.servers import CHATML, HTTP, FakeEngine, Running, outcome, running


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as given:
        yield given


def last(engine: FakeEngine) -> Request:
    return engine.asked[-1]


def test_a_completion_has_text_usage_and_reason(client: openai.OpenAI, engine: FakeEngine) -> None:
    done = client.completions.create(model="model", prompt="Hello", max_tokens=3, temperature=0)
    assert done.object == "text_completion" and done.id.startswith("cmpl-")
    assert (done.model, done.system_fingerprint) == ("model", None)
    (choice,) = done.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, "abc", "length")
    assert choice.logprobs is None and done.usage is not None
    prompt = engine.loaded.tokenizer.encode("Hello")
    assert last(engine).prompt == tuple(prompt)
    assert done.usage.prompt_tokens == len(prompt)
    assert (done.usage.completion_tokens, done.usage.total_tokens) == (3, len(prompt) + 3)
    assert done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.cached_tokens == 0


def test_defaults_are_those_of_openai(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model="model", prompt="Hello")
    sampling = last(engine).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (16, 1.0, 1.0)
    client.chat.completions.create(model="model", messages=[{"role": "user", "content": "x"}])
    assert last(engine).sampling.max_tokens is None


def test_every_way_to_draw_reaches_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(
        model="model",
        prompt="Hello",
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": -100},
        seed=-5,
        stop=["x", "yz"],
        user="me",
        extra_body={
            "top_k": -1,
            "min_p": 0.1,
            "typical_p": 0.8,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "include_stop_str_in_output": True,
            "ignore_eos": True,
            "best_of": 1,
        },
    )
    sampling = last(engine).sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.9, 0.1)
    assert (sampling.top_k, sampling.typical_p, sampling.repetition_penalty) == (0, 0.8, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert (dict(sampling.logit_bias), sampling.seed) == ({7: -100.0}, (1 << 64) - 5)
    assert (sampling.stop, sampling.stop_token_ids) == (("x", "yz"), (9,))
    assert sampling.include_stop and sampling.ignore_end_of_text and sampling.min_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("Hello", 1), (["Hello", "World"], 2), ([40, 41, 42], 1), ([[40], [41, 42, 43], [44, 45]], 3)],
)
def test_prompts_have_four_forms(
    client: openai.OpenAI, engine: FakeEngine, prompt: Any, count: int
) -> None:
    before = len(engine.asked)
    done = client.completions.create(model="model", prompt=prompt, max_tokens=2, n=2)
    assert [choice.index for choice in done.choices] == list(range(2 * count))
    asked = [request.prompt for request in engine.asked[before:]]
    encode = engine.loaded.tokenizer.encode
    given = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ids = [tuple(encode(p) if isinstance(p, str) else p) for p in given]
    assert asked == [each for each in ids for _ in range(2)]
    assert [r.sampling.choice for r in engine.asked[before:]] == [0, 1] * count
    assert done.usage is not None
    assert done.usage.prompt_tokens == sum(map(len, ids))
    assert done.usage.completion_tokens == 2 * 2 * count


def test_null_is_the_beginning_of_a_text(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model="model", prompt=None, max_tokens=1)
    assert last(engine).prompt == (engine.loaded.tokenizer.end_of_text_id,)


def test_texts_begin_as_the_models_texts_do_and_ids_as_they_are(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, begin_ids=(7,))
    with running(engine) as server, server.client() as client:
        client.completions.create(model="model", prompt="Hello", max_tokens=1)
        assert last(engine).prompt == (7, *tokenizer.encode("Hello"))
        client.completions.create(model="model", prompt=[40], max_tokens=1)
        assert last(engine).prompt == (40,)
        without = {"add_special_tokens": False}
        client.completions.create(model="model", prompt="Hello", max_tokens=1, extra_body=without)
        assert last(engine).prompt == tuple(tokenizer.encode("Hello"))
        client.completions.create(
            model="model", prompt="Hello", max_tokens=1, extra_body={"truncate_prompt_tokens": 2}
        )
        assert last(engine).prompt == tuple(tokenizer.encode("Hello"))[-2:]


def test_names_of_special_tokens_in_a_prompt_are_text(
    client: openai.OpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    client.completions.create(model="model", prompt="a<|im_end|>", max_tokens=1)
    assert tokenizer.token_id("<|im_end|>") not in last(engine).prompt


def test_each_request_without_a_seed_gets_a_new_one_and_hears_it(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    seeds = set()
    for _ in range(4):
        done = client.completions.create(model="model", prompt="Hello", max_tokens=1)
        seeds.add(done.model_dump()["seed"])
        assert last(engine).sampling.seed == done.model_dump()["seed"]
    assert len(seeds) == 4


def test_echo_puts_the_prompt_and_its_scores_first(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="model", prompt="Hello", max_tokens=2, echo=True, logprobs=1
    )
    (choice,) = done.choices
    scores = choice.logprobs
    assert scores is not None and scores.tokens and scores.text_offset and scores.token_logprobs
    assert choice.text == "Helloab" == "".join(scores.tokens)
    assert scores.text_offset == [
        sum(map(len, scores.tokens[:i])) for i in range(len(scores.tokens))
    ]
    assert scores.top_logprobs is not None
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert set(scores.token_logprobs[1:-2]) == {-1.5} and scores.token_logprobs[-1] == -1.0
    assert scores.top_logprobs[-1] == {"H": -0.5, "b": -1.0}  # the best one and the one drawn


def test_echo_without_new_tokens_scores_the_prompt_alone(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    done = client.completions.create(
        model="model", prompt="Hello", max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = done.choices
    assert choice.text == "Hello" and choice.logprobs is not None and choice.logprobs.tokens
    assert "".join(choice.logprobs.tokens) == "Hello"
    assert last(engine).sampling.max_tokens == 0
    assert done.usage is not None and done.usage.completion_tokens == 0


def test_ids_come_back_where_they_are_asked_for(client: openai.OpenAI, engine: FakeEngine) -> None:
    ids = {"return_token_ids": True}
    done = client.completions.create(
        model="model", prompt=[40, 41], max_tokens=2, logprobs=2, echo=True, extra_body=ids
    ).model_dump()
    (choice,) = done["choices"]
    encode = engine.loaded.tokenizer.encode
    assert choice["prompt_token_ids"] == [40, 41] and choice["token_ids"] == encode("ab")
    assert choice["logprobs"]["token_ids"] == [40, 41, *encode("ab")]
    for logprobs, by_name in zip(
        choice["logprobs"]["top_logprobs"], choice["logprobs"]["top_token_ids"], strict=True
    ):
        assert logprobs is None or logprobs.keys() == by_name.keys()
    assert choice["logprobs"]["top_token_ids"][-1]["b"] == encode("b")[0]


def test_streamed_is_what_is_not_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(
        model="model", prompt=["Hello", "Wo"], n=2, max_tokens=4, echo=True, logprobs=2, seed=3
    )
    whole = client.completions.create(**asked).model_dump()
    chunks = [
        chunk.model_dump()
        for chunk in client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk.get("usage") is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        parts = [
            c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]
        ]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][name]] == values
        assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["length"]
    assert "timings" in chunks[-2] and chunks[-2]["seed"] == 3


def test_a_chat_streams_role_text_and_reason(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(
        model="model",
        messages=[{"role": "user", "content": "x"}],
        max_completion_tokens=3,
        logprobs=True,
        top_logprobs=2,
        n=2,
    )
    whole = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == ["abc", "abc"]
    assert whole.choices[0].logprobs is not None
    entry = (whole.choices[0].logprobs.content or [])[0]
    assert (entry.token, entry.logprob, entry.bytes) == ("a", -1.0, [97])
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("H", -0.5), ("I", -0.75)]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for index in (0, 1):
        parts = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert parts[0].delta.role == "assistant"
        assert all(part.delta.role is None for part in parts[1:])
        assert "".join(part.delta.content or "" for part in parts) == "abc"
        assert parts[-1].finish_reason == "length"


def test_without_a_template_a_conversation_is_plain_text(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    client.chat.completions.create(
        model="model",
        messages=[
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}],
            },
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Why?"},
        ],
        max_tokens=1,
        stop="END",
    )
    text = engine.loaded.tokenizer.decode(last(engine).prompt)
    assert text == "System: Be brief.\nUser: Hi\n!\nAssistant: Hello\nUser: Why?\nAssistant:"
    assert last(engine).sampling.stop == ("END", "\nUser:")


def test_embeddings_come_as_base64_and_as_numbers(client: openai.OpenAI, server: Running) -> None:
    done = client.embeddings.create(model="model", input=["Hello", "Wo"])
    assert [item.embedding for item in done.data] == [pytest.approx([0.6, 0.8])] * 2
    assert [item.index for item in done.data] == [0, 1]
    body = {"input": [[40, 41], [42]], "encoding_format": "base64"}
    raw = HTTP.post(f"{server.url}/v1/embeddings", json=body).json()
    assert struct.unpack("<2f", base64.b64decode(raw["data"][0]["embedding"])) == (
        pytest.approx((0.6, 0.8))
    )
    assert raw["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    plain = HTTP.post(f"{server.url}/v1/embeddings", json={"input": "Hello"}).json()
    assert plain["data"][0]["embedding"] == [0.6, 0.8]


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    described = client.models.retrieve("model").model_dump()
    assert listed.id == described["id"] == "model" and listed.object == "model"
    assert described["max_model_len"] == 64 and described["parameters"] == 12
    assert described["precision"] == "fp32" and described["chat_template"] is False
    assert described["defaults"]["temperature"] == 0.8


def test_the_three_tokenizer_routes_are_those_lm_eval_uses(
    server: Running, tokenizer: Tokenizer
) -> None:
    info = HTTP.get(f"{server.url}/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>" and info["chat_template"] is None
    for name in ("prompt", "content"):
        body = {name: info["eos_token"], "add_special_tokens": False}
        ids = HTTP.post(f"{server.url}/tokenize", json=body).json()["tokens"]
        assert ids == [tokenizer.end_of_text_id]
    text = "Zwölf 🦊 <|im_end|> x"
    ids = HTTP.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokenizer.token_id("<|im_end|>") in ids
    back = HTTP.post(f"{server.url}/detokenize", json={"tokens": ids}).json()
    assert back == {"prompt": text, "content": text}


def test_a_character_in_two_tokens_is_named_by_its_bytes_and_the_text_joins(
    tokenizer: Tokenizer,
) -> None:
    first, second = tokenizer.encode("é") if len(tokenizer.encode("é")) == 2 else (196, 102)
    bytes_of = tokenizer.token_bytes
    text = (bytes_of(first) + bytes_of(second)).decode()

    def script(request: Request) -> Iterator[Piece]:
        tops = ((first, -0.5), (second, -0.75))
        tokens = (ScoredToken(first, -0.5, tops), ScoredToken(second, -0.75, tops))
        yield Piece(text=text, tokens=tokens)
        end = ScoredToken(tokenizer.end_of_text_id, -9e99, ())
        yield Piece(tokens=(end,), outcome=outcome(request, 3, "end_of_text"))

    with running(FakeEngine(tokenizer, script)) as server, server.client() as client:
        done = client.completions.create(model="model", prompt="x", logprobs=2)
        (choice,) = done.choices
        assert choice.logprobs is not None and choice.logprobs.top_logprobs is not None
        assert choice.finish_reason == "stop" and choice.text == text
        assert choice.logprobs.tokens == ["", text, ""]
        assert choice.logprobs.text_offset == [0, 0, 1]
        names = [f"bytes:\\x{bytes_of(i)[0]:02x}" for i in (first, second)]
        assert list(choice.logprobs.top_logprobs[0]) == names
        assert choice.logprobs.top_logprobs[2] == {"<|endoftext|>": -9e99}
        chat = client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": "x"}], logprobs=True
        )
        entries = (chat.choices[0].logprobs.content or []) if chat.choices[0].logprobs else []
        assert [entry.bytes for entry in entries] == [[*bytes_of(first)], [*bytes_of(second)], None]


def test_infinite_logprobs_are_finite_on_the_wire(tokenizer: Tokenizer) -> None:
    def script(request: Request) -> Iterator[Piece]:
        token = ScoredToken(40, float("-inf"), ((41, 0.0), (40, float("-inf"))))
        yield Piece(text="'", tokens=(token,), outcome=outcome(request, 1, "length"))

    with running(FakeEngine(tokenizer, script)) as server, server.client() as client:
        done = client.completions.create(model="model", prompt="x", logprobs=2)
        assert done.choices[0].logprobs is not None
        assert done.choices[0].logprobs.token_logprobs == [-9999.0]


def test_timings_are_those_of_llama_cpp(client: openai.OpenAI) -> None:
    done = client.completions.create(model="model", prompt=[40] * 10, max_tokens=5).model_dump()
    timings = done["timings"]
    assert (timings["prompt_n"], timings["cache_n"], timings["predicted_n"]) == (10, 0, 5)
    assert (timings["prompt_ms"], timings["predicted_ms"]) == (500, 250)
    assert (timings["prompt_per_second"], timings["predicted_per_second"]) == (20, 16)


def test_a_model_with_a_template_uses_it(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, chat_template=CHATML)
    with running(engine) as server, server.client() as client:
        client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": "Hi"}], max_tokens=1
        )
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert last(engine).prompt == tuple(tokenizer.encode_marked(written))
    assert last(engine).sampling.stop == ()


def test_the_playground_is_served_with_a_strict_policy(server: Running) -> None:
    for path in ("/", "/playground/index.html"):
        page = HTTP.get(server.url + path)
        assert page.status_code == 200 and "text/html" in page.headers["content-type"]
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert "http" not in policy
    for path in ("/playground/../app.py", "/playground/%2e%2e/app.py", "/playground/..%2fapp.py"):
        assert HTTP.get(server.url + path).status_code == 404
