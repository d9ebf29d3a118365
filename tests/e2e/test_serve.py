"""The server as people start it: the official client against it, and how it ends."""

import json
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import SMALL_RUN
from tests.e2e.serving import Serving, serving

LONG, LONGEST = 1200, 2000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of a few steps with room for long answers."""
    from lascaux.cli import run_command

    folder = tmp_path_factory.mktemp("serve")
    config = folder / "small.toml"
    config.write_text(SMALL_RUN.format(corpus=corpus))
    flags = ["--model.max_context=2048", "--serve.model_name=sums"]
    assert run_command(["train", str(config), "--run", str(folder / "run"), *flags]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Serving]:
    with serving(run) as started:
        yield started


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as given:
        yield given


def test_what_the_start_says(server: Serving) -> None:
    assert server.figures["model"] == "sums" and server.figures["needs_key"] is False
    assert server.figures["weight_bytes"] > 0 and server.figures["cache_bytes"] > 0
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_the_same_prompt_and_seed_are_the_same_text_as_from_the_command(
    client: openai.OpenAI, run: Path, cli: Any
) -> None:
    flags = ["--generate.seed=7", "--generate.temperature=1", "--generate.max_tokens=30"]
    generated = cli("generate", run, "--prompt", "add(3, ", "--json", *flags)
    served = client.completions.create(
        model="sums", prompt="add(3, ", seed=7, temperature=1, max_tokens=30
    )
    assert served.choices[0].text == json.loads(generated.out)["text"]


def test_batch_mates_and_kept_prefixes_change_no_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(model="sums", max_tokens=40, temperature=1, seed=3)
    prompts = ["# file 1\n" * 20 + f"add({i}, " for i in range(6)]
    alone = [client.completions.create(prompt=p, **asked).choices[0].text for p in prompts]
    again = client.completions.create(prompt=prompts, **asked)
    assert [choice.text for choice in again.choices] == alone
    usage = again.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_every_endpoint_answers_the_official_client(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "add(1, 1)"}]
    chat = client.chat.completions.create(model="sums", messages=messages, max_tokens=5)
    assert chat.choices[0].message.content and chat.usage is not None
    chunks = client.chat.completions.create(
        model="sums", messages=messages, max_tokens=5, stream=True, seed=1
    )
    assert [chunk.object for chunk in chunks][0] == "chat.completion.chunk"
    assert len(client.embeddings.create(model="sums", input="add").data[0].embedding) == 32
    assert client.models.list().data[0].id == "sums"
    scored = client.completions.create(
        model="sums", prompt=["add(1, ", "x"], echo=True, logprobs=3, max_tokens=1
    )
    assert all(choice.logprobs is not None for choice in scored.choices)


def begin_stream(url: str, tokens: int) -> Any:
    body = {"prompt": "add", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120)


def test_sigterm_finishes_streams_and_exits_0(run: Path) -> None:
    with serving(run) as started:
        with begin_stream(started.url, LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            started.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{started.url}/health").status_code == 200:
                time.sleep(0.02)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["timings"]["predicted_n"] == LONG
        code, err = started.ends()
        assert code == 0 and "Traceback" not in err


def test_a_second_signal_ends_at_once(run: Path) -> None:
    with serving(run) as started:
        with begin_stream(started.url, LONGEST) as answer:
            lines = answer.iter_lines()
            next(lines)
            started.process.send_signal(signal.SIGINT)
            while httpx.get(f"{started.url}/health").status_code == 200:
                time.sleep(0.02)
            started.process.send_signal(signal.SIGINT)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        code, err = started.ends()
        assert code == 0 and "Traceback" not in err


def test_a_port_in_use_is_one_line(run: Path, cli: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = cli("serve", run, "--port", port)
    assert refused.code == 2 and refused.out == ""
    assert refused.err.startswith(f"lascaux: port {port} of 127.0.0.1 is in use")
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--serve.host=0.0.0.0"], "needs API keys"),
        (["--serve.api_keys_file=/nowhere"], "cannot read"),
        (["--serve.port=70000"], "'serve.port' must be 0 to 65535"),
        (["--serve.port=1", "--port=2"], "--serve.port is given twice"),
        (["--serve.host=no.such.host.invalid"], "needs API keys"),
        (["--serve.max_streams=0"], "'serve.max_streams' must be above 0"),
        (["--serve.allowed_origins=example.org"], "must be like https://"),
        (["--generate.temperature=1"], "each request says how to draw"),
        (["--train.steps=1"], "has no effect on serving"),
        (["--serve.prot=1"], "did you mean 'serve.port'"),
    ],
)
def test_settings_that_cannot_be_are_said_before_anything_listens(
    run: Path, cli: Any, flags: list[str], message: str
) -> None:
    refused = cli("serve", run, *flags)
    assert refused.code == 2 and message in refused.err and refused.out == ""


def test_a_folder_without_a_model_is_said(tmp_path: Path, cli: Any) -> None:
    refused = cli("serve", tmp_path)
    assert refused.code == 2 and "no intact checkpoint" in refused.err


def test_a_model_that_does_not_load_ends_the_server(run: Path, tmp_path: Path, cli: Any) -> None:
    damaged = shutil.copytree(run, tmp_path / "run")
    tokenizer = damaged / "tokenizer.json"
    tokenizer.write_text("{}")
    refused = cli("serve", damaged, "--port", 0)
    assert refused.code == 2 and "tokenizer.json' is malformed" in refused.err
