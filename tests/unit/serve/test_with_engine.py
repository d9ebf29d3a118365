"""The server over the real engine and a random network whose characters are split over tokens."""

import gc
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lascaux.data.tokenizer import Tokenizer
from lascaux.generate.engine import Engine
from lascaux.generate.load import LoadedModel
from lascaux.generate.request import EngineOptions
from tests.unit.serve.servers import HTTP, Running, running


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[Running]:
    engine = Engine(loaded, EngineOptions(max_streams=4, max_waiting=64))
    engine.start()
    with running(engine) as served:
        yield served
    engine.stop(0)


def ask(server: Running, **body: Any) -> dict[str, Any]:
    answer = HTTP.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask_streamed(server: Running, **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The choices, each put together from its chunks, and the usage."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = HTTP.post(f"{server.url}/v1/completions", json=body | options)
    events = answer.content.decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    usage = chunks.pop()["usage"]
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (part,) = chunk["choices"]
        whole = choices.setdefault(part["index"], {"text": "", "finish_reason": None})
        assert whole["finish_reason"] is None
        whole["text"] += part["text"]
        whole["finish_reason"] = part["finish_reason"]
        for name, values in (part["logprobs"] or {}).items():
            whole.setdefault("logprobs", {}).setdefault(name, []).extend(values)
    return [choices[index] for index in sorted(choices)], usage


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", errors="replace")


def cut(text: str, stops: list[str]) -> str:
    """The text up to the stop string that is complete first, the longest of several."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return text[: min(ends)[1]] if ends else text


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    likely = draw(st.sampled_from(["", "éöü", "🦊🐴", "ab\n"]))
    return {
        "prompt": draw(st.lists(st.integers(1, 256), min_size=1, max_size=5)),
        "max_tokens": draw(st.integers(1, 16)),
        "seed": draw(st.integers(0, 1000)),
        "temperature": draw(st.sampled_from([0, 0.7, 2.0])),
        "likely": likely,
    }


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    asked=requests(), places=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=3)
)
def test_streamed_whole_and_expected_text_agree_over_stops_and_cut_characters(
    server: Running, tokenizer: Tokenizer, asked: dict[str, Any], places: list[tuple[int, int]]
) -> None:
    likely = {i for i in tokenizer.encode(asked["likely"])}
    body = {name: value for name, value in asked.items() if name != "likely"}
    body |= {"logit_bias": {str(i): 20 for i in likely}, "ignore_eos": True}
    whole = ask(server, **body, return_token_ids=True, echo=True)["choices"][0]
    drawn = whole["token_ids"]
    assert whole["text"] == text_of(tokenizer, [*body["prompt"], *drawn])
    free = ask(server, **body)["choices"][0]["text"]
    stops = [free[at : at + length] for at, length in places] + ["never\0"]
    stops = [stop for stop in stops if stop]
    expected = cut(free, stops)
    stopped = body | {"stop": stops, "logprobs": 2}
    one = ask(server, **stopped)
    (streamed,), usage = ask_streamed(server, **stopped)
    for choice in (one["choices"][0], streamed):
        assert choice["text"] == expected
        assert choice["finish_reason"] == ("stop" if expected != free else "length")
        tokens = choice["logprobs"]["tokens"]
        assert "".join(tokens).startswith(expected)
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]
    assert usage == one["usage"]
    assert streamed["logprobs"] == one["choices"][0]["logprobs"]


def test_the_one_new_token_is_always_among_the_scores(
    server: Running, tokenizer: Tokenizer
) -> None:
    """lm_eval drops the last entry, whatever the token is: the end of the text, a stop string."""
    for bias, stop in ((tokenizer.end_of_text_id, None), (tokenizer.encode("a")[0], "a")):
        (choice,) = ask(
            server,
            prompt=[[40, 41, 42]],
            max_tokens=1,
            temperature=0,
            logprobs=1,
            echo=True,
            stop=stop,
            logit_bias={str(bias): 100},
        )["choices"]
        assert choice["finish_reason"] == "stop"
        lengths = {len(values) for values in choice["logprobs"].values()}
        assert lengths == {4}


def test_greedy_tokens_have_the_largest_log_probability_exactly(server: Running) -> None:
    (choice,) = ask(server, prompt=[40], max_tokens=30, temperature=0, logprobs=1)["choices"]
    scores = choice["logprobs"]
    for value, top in zip(scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert value == max(top.values())


def test_a_prompt_of_all_but_one_token_of_the_context_fits(server: Running) -> None:
    ask(server, prompt=[40] * 127, max_tokens=1, logprobs=1, echo=True)
    answer = HTTP.post(f"{server.url}/v1/completions", json={"prompt": [40] * 128})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_all_log_probabilities_sum_to_one(server: Running, tokenizer: Tokenizer) -> None:
    (choice,) = ask(server, prompt="x", max_tokens=2, logprobs=-1)["choices"]
    for top in choice["logprobs"]["top_logprobs"]:
        assert len(top) == tokenizer.vocab_size
        assert sum(2.718281828459045**value for value in top.values()) == pytest.approx(1, abs=1e-4)


def test_ragged_lists_score_as_each_alone(server: Running) -> None:
    asked: dict[str, Any] = dict(max_tokens=1, temperature=0, logprobs=1, echo=True)
    prompts = [[40], [41, 42, 43, 44, 45], [46, 47], [40] * 50]
    together = ask(server, prompt=prompts, **asked)["choices"]
    for choice, prompt in zip(together, prompts, strict=True):
        (alone,) = ask(server, prompt=prompt, **asked)["choices"]
        ours, theirs = (c["logprobs"]["token_logprobs"] for c in (choice, alone))
        assert ours[1:] == pytest.approx(theirs[1:], abs=1e-5)
        assert choice["logprobs"]["tokens"] == alone["logprobs"]["tokens"]


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-300},
    {"temperature": 5e-324},
    {"temperature": 100},
    {"top_p": 0},
    {"top_p": 1e-300},
    {"min_p": 0.999},
    {"typical_p": 0.001},
    {"top_k": 1_000_000},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 100},
    {"presence_penalty": -2, "frequency_penalty": -2},
    {"seed": -(1 << 63)},
    {"seed": -1},
    {"seed": (1 << 63) - 1},
    {"min_tokens": 1_000_000},
    {"max_tokens": 1_000_000},
    {"logit_bias": {str(i): -100 for i in range(200)}},
    {"stop": ["a" * 1000] * 32},
    {"n": 60, "max_tokens": 1},
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
def test_the_bounds_of_every_field_are_carried_out(
    server: Running, extreme: dict[str, Any]
) -> None:
    choices = ask(server, **({"prompt": "x", "max_tokens": 3} | extreme))["choices"]
    assert all(choice["finish_reason"] in ("length", "stop") for choice in choices)


def test_embeddings_have_length_one_and_know_their_texts(server: Running) -> None:
    body = {"input": ["Hello", "Hello", "🦊"]}
    data = HTTP.post(f"{server.url}/v1/embeddings", json=body).json()["data"]
    first, same, other = (item["embedding"] for item in data)
    assert first == same != other
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_returns_after_bad_requests(server: Running) -> None:
    """A hundred bad requests of up to a megabyte leave less than 30 MB behind."""
    bad: list[bytes] = [
        b'{"prompt": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        b'{"prompt": "' + b"x" * 1_000_000 + b'"}',
        b'{"prompt": [' + b"[1]," * 25_000 + b"[1]]}",
        b'{"prompt": "x", "n": 1000000, "a": "' + b"y" * 1_000_000 + b'"}',
        b'{"prompt": "x", "stop": ["' + b"z" * 1_000_000 + b'"]}',
    ]

    def send_all() -> None:
        for body in bad:
            answer = HTTP.post(f"{server.url}/v1/completions", content=body)
            assert answer.status_code == 400

    for _ in range(2):
        send_all()
    gc.collect()
    before = resident_bytes()
    for _ in range(20):
        send_all()
    gc.collect()
    assert resident_bytes() - before < 30 << 20
    ask(server, prompt="x", max_tokens=1)
