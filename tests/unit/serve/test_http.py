"""What strangers, slow clients and bad requests meet; the server keeps serving."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lascaux.config.schema import ServeConfig
from lascaux.data.tokenizer import Tokenizer
from lascaux.errors import ConfigError
from lascaux.generate.request import Piece, Request, ScoredToken
from lascaux.serve.keys import Keys, is_own_address, read_keys
from tests.unit.serve.servers import HTTP, FakeEngine, Running, outcome, running

HELLO: dict[str, Any] = {"prompt": "Hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Running]:
    with running(FakeEngine(tokenizer)) as served:
        yield served
        assert ask(served).status_code == 200  # after everything it still serves


def ask(server: Running, path: str = "/v1/completions", **given: Any) -> httpx.Response:
    body = given.pop("json", HELLO)
    return HTTP.post(server.url + path, json=body, **given)


def raw(server: Running, data: bytes, *, seconds: float = 10) -> bytes:
    """What a server answers to these bytes, until it closes the connection."""
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=seconds)) as link:
        link.sendall(data)
        return read_all(link)


def read_all(link: socket.socket) -> bytes:
    received = b""
    try:
        while part := link.recv(1 << 16):
            received += part
    except ConnectionResetError:
        pass
    return received


def http(body: bytes, path: str = "/v1/completions", **headers: str) -> bytes:
    lines = {"host": "localhost", "content-length": str(len(body)), "connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt"),
        ({"prompt": ["x", [1]]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({}, "prompt"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": "x", "n": 1_000_000}, "n"),
        ({"prompt": ["x"] * 5, "n": 2}, "n"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "stop": [1]}, "stop"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
    ],
)
def test_bad_fields_are_a_400_that_names_them(
    server: Running, body: dict[str, Any], param: str
) -> None:
    answer = ask(server, json=body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param and f"'{param}" in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_none_are_a_400(server: Running, number: str) -> None:
    for name in ("temperature", "top_p", "n", "seed", "logprobs"):
        body = f'{{"prompt": "x", "{name}": {number}}}'
        answer = HTTP.post(f"{server.url}/v1/completions", content=body)
        assert answer.status_code == 400 and error_of(answer)["param"] == name


def test_the_official_client_gets_its_classes(server: Running, tokenizer: Tokenizer) -> None:
    with server.client() as client:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="model", prompt="")
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("../../etc/passwd")
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="model", prompt=[40] * 64)
        assert long.value.code == "context_length_exceeded" and "63" in long.value.message
        with pytest.raises(openai.BadRequestError) as endless:
            client.completions.create(model="model", prompt="x" * 1_000_000)
        assert endless.value.code == "context_length_exceeded"

    def script(request: Request) -> Iterator[Piece]:
        if request.prompt == (1,):
            raise AssertionError("a bug of ours in the engine's thread")
        yield Piece(outcome=outcome(request, 0, "error", error="logits are not finite"))

    with running(FakeEngine(tokenizer, script)) as other, other.client() as client:
        with pytest.raises(openai.InternalServerError, match="not finite"):
            client.completions.create(model="model", prompt="x")
        with pytest.raises(openai.APIError, match="not finite"):
            list(client.completions.create(model="model", prompt="x", stream=True))


def test_a_bug_of_ours_is_a_500_in_the_same_shape(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(tokenizer)
    engine.submit = lambda asked: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    with running(engine) as server:
        answer = ask(server)
        assert answer.status_code == 500
        assert error_of(answer)["message"] == "internal error"
        assert 'failed_total{status="500"} 1.0' in HTTP.get(f"{server.url}/metrics").text


def test_a_full_queue_is_a_429_with_a_time_to_come_back(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.script = engine.endless
    with running(engine) as server, server.client() as client:
        streams = [
            client.completions.create(model="model", prompt="x", stream=True) for _ in range(8)
        ]
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="model", prompt="x")
        assert int(full.value.response.headers["retry-after"]) > 0
        assert full.value.code == "queue_full"
        engine.released.set()
        for stream in streams:
            assert "".join(chunk.choices[0].text for chunk in stream) == "az"
        assert engine.wait_until_free()


def test_a_client_that_hangs_up_frees_its_answers(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.script = engine.endless
    with running(engine) as server:
        for stream in (True, False):
            body = json.dumps({"prompt": ["x", "y"], "stream": stream}).encode()
            link = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            link.sendall(http(body))
            wait_for(lambda: len(engine.live) == 2)
            if stream:
                assert b"text/event-stream" in link.recv(1 << 16)
            link.close()
            assert engine.wait_until_free()
            assert server.state.running == 0 or wait_for(lambda: server.state.running == 0)
            engine.cancelled.clear()


def wait_for(true: Any, seconds: float = 10) -> bool:
    ends_at = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends_at, "did not happen in time"
        time.sleep(0.01)
    return True


def test_a_client_that_does_not_read_is_cut_off_and_its_answer_freed(tokenizer: Tokenizer) -> None:
    def flood(request: Request) -> Iterator[Piece]:
        for _ in range(100_000):
            time.sleep(0.0002)
            yield Piece(text="x" * 20_000, tokens=(ScoredToken(40),))
        yield Piece(outcome=outcome(request, 1, "length"))

    engine = FakeEngine(tokenizer, flood)
    with running(engine, backlog_pieces=20, send_seconds=1.0) as server:
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=20)) as link:
            link.sendall(http(b'{"prompt": "x", "stream": true}'))
            assert engine.wait_until_free()
            assert wait_for(lambda: server.state.running == 0)
            assert len(read_all(link)) < 100 << 20
        assert ask(server, path="/tokenize", json={"prompt": "x"}).status_code == 200


def test_a_silent_stream_gets_comments(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.script = engine.endless
    with running(engine, comment_seconds=0.05) as server:
        body = {"prompt": "x", "stream": True}
        with HTTP.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            while not next(lines).startswith(": "):
                pass
            engine.released.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_request_has_its_time(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.script = engine.endless
    with running(engine, request_seconds=0.2) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError, match=r"longer than 0.2 s") as late:
            client.completions.create(model="model", prompt="x")
        assert late.value.status_code == 504 and late.value.code == "timeout"
        with pytest.raises(openai.APIError, match=r"longer than 0.2 s"):
            list(client.completions.create(model="model", prompt="x", stream=True))
        assert engine.wait_until_free()


def test_a_client_that_gives_up_waiting_frees_its_answer(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.script = engine.endless
    with running(engine) as server, server.client(timeout=0.3) as client:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="model", prompt="x")
        assert engine.wait_until_free()


def test_a_large_body_is_a_413_whether_announced_or_not(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer), body_bytes=10_000) as server:
        answer = ask(server, json={"prompt": "x" * 30_000})
        assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"
        parts = (b"x" * 1000 for _ in range(30))
        answer = HTTP.post(f"{server.url}/v1/completions", content=parts)
        assert answer.status_code == 413
        announced = http(b"", content_length="99999999999", expect="100-continue")
        assert b" 413 " in raw(server, announced)
        assert server.state.bodies_bytes == 0


def test_a_slow_body_is_a_408_and_a_slow_head_is_cut_off(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer), body_seconds=0.3, header_seconds=0.3) as server:
        answer = raw(server, http(b'{"prompt"', content_length="100"))
        assert b" 408 " in answer and b"0.3 seconds" in answer
        assert raw(server, b"POST /v1/completions HTTP/1.1\r\nhost: loc") == b""
        assert raw(server, b"") == b""


def test_too_many_bodies_at_once_are_a_503(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer), bodies_bytes=1500) as server:
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as link:
            link.sendall(http(b"x" * 1000, content_length="1200"))
            wait_for(lambda: server.state.bodies_bytes == 1000)
            answer = ask(server, json={"prompt": "x" * 900})
            assert answer.status_code == 503 and answer.headers["retry-after"]
        wait_for(lambda: server.state.bodies_bytes == 0)
        assert ask(server).status_code == 200


def test_connections_are_counted(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer), connections=2) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        wait_for(lambda: len(server.server.server_state.connections) == 2)
        assert b" 503 " in raw(server, b"")
        for link in held:
            link.close()
        wait_for(lambda: not server.server.server_state.connections)
        assert ask(server).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/x\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: " + b"y" * (1 << 20) + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_a_400_in_the_same_shape(server: Running, data: bytes) -> None:
    answer = raw(server, data)
    if answer:  # of a very long head the kernel may drop the answer
        assert b" 400 " in answer and b'"error"' in answer


def test_a_request_cut_short_is_forgotten(server: Running) -> None:
    with closing(socket.create_connection(("127.0.0.1", server.port))) as link:
        link.sendall(http(b'{"prompt": ', content_length="100"))
    wait_for(lambda: server.state.running == 0 and server.state.bodies_bytes == 0)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "stop": "\\udc00"}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "model": "\\ud800"}',
        b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}",
        b"null",
        b"",
    ],
)
def test_broken_bodies_are_a_400(server: Running, body: bytes) -> None:
    answer = HTTP.post(f"{server.url}/v1/completions", content=body)
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_wrong_paths_and_methods_have_the_same_shape(server: Running) -> None:
    assert error_of(HTTP.get(f"{server.url}/v2/x"))["type"] == "invalid_request_error"
    answer = HTTP.get(f"{server.url}/v1/completions")
    assert answer.status_code == 405 and error_of(answer) and answer.headers["allow"] == "POST"
    for name in ("..%2f..%2fetc%2fpasswd", "a/b/../c", "%00", "%ff", "model%20"):
        answer = HTTP.get(f"{server.url}/v1/models/{name}")
        assert answer.status_code == 404 and error_of(answer)


def test_keys_are_asked_for_everywhere_but_at_health(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer), keys=["k-1", "k-2"]) as server:
        paths = ["/v1/models", "/v1/models/model", "/metrics", "/tokenizer_info"]
        for path in paths:
            answer = HTTP.get(server.url + path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert error_of(answer)["code"] == "invalid_api_key"
            for wrong in ("Bearer k", "Bearer k-3", "Basic k-1", "k-1", "Bearer", "Bearer ü"):
                header = {"authorization": wrong.encode()}
                assert HTTP.get(server.url + path, headers=header).status_code == 401
            for key in ("k-1", "k-2"):
                header = {"authorization": f"Bearer {key}"}
                assert HTTP.get(server.url + path, headers=header).status_code == 200
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"):
            assert ask(server, path).status_code == 401
        assert HTTP.get(f"{server.url}/v1/unknown").status_code == 401
        assert HTTP.get(f"{server.url}/health").status_code == 200
        assert HTTP.get(f"{server.url}/").status_code == 200
        with server.client("k-2") as client, server.client("k-3") as stranger:
            assert client.completions.create(model="model", prompt="x").choices
            with pytest.raises(openai.AuthenticationError):
                stranger.completions.create(model="model", prompt="x")


def test_keys_come_from_a_file_and_are_needed_on_open_addresses(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for Ann\nk-1\n\n  k-2  \n#k-3\n")
    keys = read_keys(ServeConfig(host="0.0.0.0", api_keys_file=str(file)))
    accepted = [key for key in ("k-1", "k-2", "k-3", "#k-3", "") if keys.accept(f"Bearer {key}")]
    assert accepted == ["k-1", "k-2"]
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        assert not is_own_address(host)
        with pytest.raises(ConfigError, match="needs API keys"):
            read_keys(ServeConfig(host=host))
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        assert is_own_address(host) and not read_keys(ServeConfig(host=host))
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no keys"):
        read_keys(ServeConfig(api_keys_file=str(file)))
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(ServeConfig(api_keys_file=str(tmp_path / "none")))
    assert Keys().accept(None)


def test_without_keys_only_this_machines_names_are_answered(server: Running) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "0.0.0.0"):
        answer = HTTP.get(f"{server.url}/v1/models", headers={"host": host})
        assert answer.status_code == 403 and error_of(answer)["code"] == "host_not_allowed"
    for host in ("localhost", "localhost:99", "127.0.0.1:1", "[::1]:8000"):
        assert HTTP.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 200


def test_other_origins_are_refused_unless_they_are_named(
    server: Running, tokenizer: Tokenizer
) -> None:
    own = {"origin": server.url}
    assert ask(server, headers=own).status_code == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://[", "x"):
        answer = ask(server, headers={"origin": origin})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    settings = ServeConfig(allowed_origins=("https://good.example",))
    with running(FakeEngine(tokenizer), settings=settings, keys=["k"]) as other:
        good = {"origin": "https://good.example"}
        asks = good | {"access-control-request-method": "POST"}
        asks |= {"access-control-request-headers": "authorization"}
        before = HTTP.options(f"{other.url}/v1/completions", headers=asks)
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == "https://good.example"
        answer = ask(other, headers=good)
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert ask(other, headers={"origin": "https://evil.example"}).status_code == 403


def test_health_is_503_until_the_model_is_loaded_and_while_draining(tokenizer: Tokenizer) -> None:
    with running(None) as server:
        answer = HTTP.get(f"{server.url}/health")
        loading = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
        assert (answer.status_code, answer.json()) == (503, {"error": loading})
        early = ask(server)
        assert early.status_code == 503 and early.headers["retry-after"]
        assert error_of(early)["code"] == "loading_model"
    with running(FakeEngine(tokenizer)) as server:
        answer = HTTP.get(f"{server.url}/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_the_first_signal_finishes_streams_and_refuses_new_requests(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.script = engine.endless
    with running(engine) as server, server.client() as client:
        stream = client.completions.create(model="model", prompt="x", stream=True)
        assert next(iter(stream)).choices[0].text == "a"
        server.server.handle_exit(15, None)
        answer = ask(server)
        assert answer.status_code == 503 and error_of(answer)["code"] == "shutting_down"
        assert HTTP.get(f"{server.url}/health").status_code == 503
        assert not server.server.should_exit
        engine.released.set()
        assert "".join(chunk.choices[0].text for chunk in stream) == "z"
        wait_for(lambda: server.server.should_exit)


def test_streams_that_take_too_long_to_finish_hear_why(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.script = engine.endless
    with running(engine, drain_seconds=0.2) as server, server.client() as client:
        stream = client.completions.create(model="model", prompt="x", stream=True)
        assert next(iter(stream)).choices[0].text == "a"
        server.server.handle_exit(15, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)


def test_metrics_parse_and_count(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer)) as server:
        for _ in range(3):
            ask(server, json={"prompt": "x", "max_tokens": 5})
        ask(server, json={"prompt": ""})
        answer = HTTP.get(f"{server.url}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {each.name: each for each in text_string_to_metric_families(answer.text)}

    def value(family: str, sample: str, **labels: str) -> float:
        found = [
            s.value for s in families[family].samples if s.name == sample and s.labels == labels
        ]
        assert len(found) == 1, (family, labels)
        return found[0]

    route = {"route": "completions"}
    seconds = "lascaux_time_to_first_token_seconds"
    assert value(seconds, f"{seconds}_count", **route) == 3
    between = "lascaux_time_between_tokens_seconds"
    assert value(between, f"{between}_count", **route) == 12
    assert value("lascaux_request_seconds", "lascaux_request_seconds_count", **route) == 3
    assert value("lascaux_requests_failed", "lascaux_requests_failed_total", status="400") == 1
    assert value("lascaux_requests_finished", "lascaux_requests_finished_total", reason="stop") == 3
    assert value("lascaux_generated_tokens_per_second", "lascaux_generated_tokens_per_second") == 16
    for name in (
        "requests_running requests_waiting cache_pages cache_pages_used cache_use_ratio "
        "cache_bytes weight_bytes prompt_tokens generated_tokens prefix_cache_queried_tokens "
        "prefix_cache_hit_tokens steps rows rows_per_step drafted_tokens accepted_tokens "
        "prompt_tokens_per_second"
    ).split():
        assert f"lascaux_{name}" in families


def test_log_probabilities_have_a_limit_for_one_request(tokenizer: Tokenizer) -> None:
    with running(FakeEngine(tokenizer), logprob_entries=10_000) as server:
        assert ask(server, json=HELLO | {"logprobs": -1}).status_code == 200
        answer = ask(server, json={"prompt": "x", "max_tokens": 60, "logprobs": -1})
        assert answer.status_code == 400 and error_of(answer)["param"] == "logprobs"
