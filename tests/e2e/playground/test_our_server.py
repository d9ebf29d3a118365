"""The same page before the real server."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL_RUN
from tests.e2e.playground.window import (
    Page,
    Visit,
    answers,
    draw,
    point,
    rest,
    say,
    settings,
    text,
    until,
    write,
)
from tests.e2e.serving import Serving, serving


@pytest.fixture(scope="module")
def our_server(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Serving]:
    """The real server of a small run."""
    from lascaux.cli import run_command

    folder = tmp_path_factory.mktemp("playground")
    config = folder / "small.toml"
    config.write_text(SMALL_RUN.format(corpus=corpus))
    flags = ["--model.max_context=512", "--serve.model_name=sums"]
    assert run_command(["train", str(config), "--run", str(folder / "run"), *flags]) == 0
    with serving(folder / "run") as started:
        yield started


@pytest.fixture
def our_page(our_server: Serving, browser: Any) -> Iterator[Page]:
    visit = Visit(browser, our_server.url + "/")
    yield visit.page
    visit.context.close()
    assert not visit.errors
    assert not visit.elsewhere


def ask(server: Serving, path: str, body: dict[str, Any]) -> Any:
    sent = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(sent) as answer:
        return json.load(answer)


def shown_as(words: str) -> str:
    """The page waits for the rest of a last character, which the API gives as a replacement."""
    return words.removesuffix("\ufffd")


def test_our_server_draws_what_the_copied_program_prints(
    our_page: Page, our_server: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    typed = "add(3, 4) = é😀\n"
    settings(our_page, max_tokens=20, temperature=1, seed=5)
    write(our_page, typed)
    shown = draw(our_page)
    for _ in range(2):
        our_page.keyboard.press("Alt+c")
        our_page.wait_for_selector("#share-sheet[open]")
        our_page.click("#as-python")
        program = our_page.inner_text("#code")
        our_page.keyboard.press("Escape")
        exec(compile(program, "copied", "exec"), {})
        assert shown_as(typed + capsys.readouterr().out[:-1]) == shown_as(shown)
        typed, shown = shown, draw(our_page)


def test_our_server_goes_on_exactly_from_a_chosen_token(
    our_page: Page, our_server: Serving
) -> None:
    settings(our_page, max_tokens=12, temperature=1, seed=5)
    write(our_page, "add(")
    before = draw(our_page)
    seen: list[dict[str, Any]] = []
    our_page.on("request", lambda request: seen.append(request.post_data_json))
    our_page.mouse.move(*point(our_page, len("add(") + 2))
    our_page.wait_for_selector("#popover:not([hidden])")
    number = our_page.eval_on_selector_all(
        "#popover li button", "all => all.findIndex((e) => !e.classList.contains('own'))"
    )
    our_page.click(f"#popover li:nth-child({number + 1}) button")
    our_page.wait_for_selector("#branch:not([hidden])")
    rest(our_page)
    until(our_page, f"document.getElementById('editor').firstChild.data !== {before!r}")
    body = next(body for body in seen if body and body.get("stream"))
    plain = {key: value for key, value in body.items() if "stream" not in key}
    again = ask(our_server, "/v1/completions", plain)["choices"][0]["text"]
    prompt = ask(our_server, "/detokenize", {"tokens": body["prompt"]})["prompt"]
    assert shown_as(text(our_page)) == shown_as(prompt.removeprefix("<|endoftext|>") + again)
    our_page.keyboard.press("Alt+p")
    our_page.wait_for_selector("#score:not([disabled])")
    scored = int(our_page.inner_text("#mean").split()[-1].replace(",", ""))
    assert scored >= len(body["prompt"]) + 11


def test_our_server_chats_without_a_template(our_page: Page) -> None:
    settings(our_page, max_tokens=8, temperature=1, seed=5)
    our_page.click("#tab-chat")
    assert "no chat template" in our_page.inner_text("#chat-note")
    say(our_page, "add(1, 2)")
    first = answers(our_page)
    assert "8" in our_page.inner_text("#chat-status")
    our_page.click(".assistant >> text=Retry")
    rest(our_page, "chat")
    our_page.keyboard.press("Alt+ArrowLeft")
    assert answers(our_page) == first
