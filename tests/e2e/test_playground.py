"""The playground in headless Chromium, against a server with a script and against our own."""

import json
import re
import shlex
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL_RUN
from tests.e2e import fake_server
from tests.e2e.fake_server import FakeServer
from tests.e2e.serving import Serving, serving

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

Page = Any
PHONE = {"width": 360, "height": 740}
START = "Once upon a time"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    running, thread = fake_server.start(fake)
    yield fake
    running.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """A browser window, with what must not happen on the way: errors and requests elsewhere."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(10_000)
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._heard)
        self.page.on("request", lambda request: self._asked(request.url, url))
        self.page.goto(url)
        self.page.wait_for_selector("#model b", state="attached")

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def _asked(self, address: str, url: str) -> None:
        if not address.startswith((url, "blob:" + url)):
            self.elsewhere.append(address)


@pytest.fixture
def visit(server: FakeServer, browser: Any) -> Iterator[Any]:
    server.reset()
    opened: list[Visit] = []

    def open_page(**options: Any) -> Page:
        opened.append(Visit(browser, server.url, **options))
        return opened[-1].page

    yield open_page
    for each in opened:
        each.context.close()
        assert not each.errors
        assert not each.elsewhere


@pytest.fixture
def page(visit: Any) -> Page:
    return visit()


def text(page: Page) -> str:
    return page.evaluate("document.getElementById('editor').firstChild.data")


def until(page: Page, condition: str) -> None:
    """Until an expression holds; the page's policy forbids Playwright's own way of waiting."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never: {condition}")


def rest(page: Page, box: str = "complete") -> None:
    """Until nothing is drawn any more and the page has shown it."""
    until(page, f"document.getElementById('{box}').getAttribute('aria-busy') === 'false'")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def write(page: Page, words: str) -> None:
    page.focus("#editor")
    page.keyboard.type(words)


def draw(page: Page, keys: str = "Control+Enter") -> str:
    page.keyboard.press(keys)
    rest(page)
    return text(page)


def point(page: Page, offset: int) -> tuple[float, float]:
    """The middle of a character on the screen."""
    box = page.evaluate(
        """(offset) => {
          const range = new Range(), node = document.getElementById('editor').firstChild;
          range.setStart(node, offset);
          range.setEnd(node, offset + 1);
          const { left, top, width, height } = range.getClientRects()[0];
          return [left + width / 2, top + height / 2];
        }""",
        offset,
    )
    return box[0], box[1]


def settings(page: Page, **values: object) -> None:
    for name, value in values.items():
        page.evaluate(
            """([name, value]) => {
              const input = document.getElementById(`sampling-${name}`);
              input.value = value;
              input.dispatchEvent(new Event('input', { bubbles: true }));
            }""",
            [name, str(value)],
        )


def alternatives(page: Page) -> list[str]:
    return page.eval_on_selector_all("#popover li code", "all => all.map((e) => e.textContent)")


def drawn_by(prompt: str, seed: int, count: int, choice: int = 0) -> str:
    body = {"seed": seed, "max_tokens": count, "temperature": 0.8}
    ids = fake_server.encode(prompt)
    return "".join(fake_server.contribution(fake_server.draw(body, ids, choice)))


def test_a_text_goes_on_in_place_from_exactly_what_is_shown(page: Page, server: FakeServer) -> None:
    settings(page, seed=7, max_tokens=12)
    typed = f"  {START}\n\n over "
    write(page, typed)
    shown = draw(page)
    assert shown == typed + drawn_by(typed, 7, 12)
    assert server.bodies[-1]["prompt"] == fake_server.encode(typed)
    assert "seed 7" in page.inner_text("#status")
    assert re.search(r"\d+ of 2,048 tokens", page.inner_text("#status"))


def test_drawn_tokens_go_back_as_ids_and_typed_text_through_the_tokenizer(
    page: Page, server: FakeServer
) -> None:
    settings(page, seed=3, max_tokens=5)
    write(page, START)
    draw(page)
    first = fake_server.draw({**server.bodies[-1]}, server.bodies[-1]["prompt"], 0)
    write(page, " and a")
    draw(page)
    expected = [*fake_server.encode(START), *first, *fake_server.encode(" and a")]
    assert server.bodies[-1]["prompt"] == expected


def test_escape_stops_and_keeps_what_came(page: Page, server: FakeServer) -> None:
    server.token_seconds = 0.03
    settings(page, max_tokens=400)
    write(page, START)
    page.keyboard.press("Control+Enter")
    until(page, "document.getElementById('editor').firstChild.data.length > 60")
    assert page.inner_text("#continue").startswith("Stop")
    page.keyboard.press("Escape")
    rest(page)
    stopped = text(page)
    page.wait_for_timeout(150)
    assert text(page) == stopped
    assert "stopped" in page.inner_text("#status")
    assert len(stopped) > 60


def test_typing_waits_while_text_is_drawn(page: Page, server: FakeServer) -> None:
    server.token_seconds = 0.02
    settings(page, max_tokens=10, seed=1)
    write(page, START)
    page.keyboard.press("Control+Enter")
    until(page, "document.getElementById('editor').firstChild.data.length > 20")
    page.keyboard.type("xyz")
    rest(page)
    assert text(page) == START + drawn_by(START, 1, 10)


def test_undo_and_redo_cover_typed_and_drawn_text(page: Page) -> None:
    settings(page, max_tokens=6, seed=2)
    write(page, START)
    drawn = draw(page)
    write(page, "!?")
    page.keyboard.press("Control+z")
    assert text(page) == drawn
    page.keyboard.press("Control+z")
    assert text(page) == START
    page.keyboard.press("Control+z")
    assert text(page) == ""
    for _ in range(3):
        page.keyboard.press("Control+y")
    assert text(page) == drawn + "!?"


def test_undo_while_drawing_stops_and_takes_it_back(page: Page, server: FakeServer) -> None:
    server.token_seconds = 0.03
    settings(page, max_tokens=300)
    write(page, START)
    page.keyboard.press("Control+Enter")
    until(page, "document.getElementById('editor').firstChild.data.length > 30")
    page.keyboard.press("Control+z")
    until(page, f"document.getElementById('editor').firstChild.data === '{START}'")
    page.keyboard.press("Alt+ArrowRight")
    assert len(text(page)) > 30


def test_retry_keeps_the_earlier_text_as_a_branch(page: Page) -> None:
    settings(page, max_tokens=8)
    write(page, START)
    versions = [draw(page), draw(page, "Control+Shift+Enter"), draw(page, "Control+Shift+Enter")]
    assert len(set(versions)) == 3
    assert page.inner_text("#branch-number") == "3/3"
    page.keyboard.press("Alt+ArrowLeft")
    assert text(page) == versions[1]
    page.keyboard.press("Alt+ArrowLeft")
    assert text(page) == versions[0]
    assert page.inner_text("#branch-number") == "1/3"
    page.keyboard.press("Alt+ArrowLeft")
    assert text(page) == versions[2]


def test_a_retry_with_a_fixed_seed_moves_the_seed_on(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=4, seed=50)
    write(page, START)
    draw(page)
    draw(page, "Control+Shift+Enter")
    draw(page, "Control+Shift+Enter")
    assert [body["seed"] for body in server.bodies] == [50, 51, 52]


def test_a_click_on_an_alternative_branches_exactly_there(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=6, seed=9)
    write(page, START)
    before = draw(page)
    ids = fake_server.draw(server.bodies[-1], server.bodies[-1]["prompt"], 0)
    starts = len(START + "".join(fake_server.contribution(ids[:2])))
    page.mouse.move(*point(page, starts + 1))
    page.wait_for_selector("#popover:not([hidden])")
    options = fake_server.likely(ids[1])
    assert f"id {ids[2]}" in page.inner_text("#popover .facts")
    other = next(place for place, (token, _) in enumerate(options) if token != ids[2])
    shown = fake_server.name_of(options[other][0]).replace(" ", "␣").replace("\n", "↵")
    assert alternatives(page)[other] == shown
    page.click(f"#popover li:nth-child({other + 1}) button")
    until(page, f"document.getElementById('editor').firstChild.data !== {before!r}")
    rest(page)
    prompt = [*fake_server.encode(START), *ids[:2], options[other][0]]
    assert server.bodies[-1]["prompt"] == prompt
    continued = fake_server.draw(server.bodies[-1], prompt, 0)
    assert text(page) == "".join(fake_server.contribution([*prompt, *continued]))
    page.keyboard.press("Alt+ArrowLeft")
    assert text(page) == before


def test_alternatives_can_be_chosen_with_the_keyboard_alone(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=5, seed=4)
    write(page, START)
    before = draw(page)
    page.keyboard.press("Alt+t")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    until(page, f"document.getElementById('editor').firstChild.data !== {before!r}")
    rest(page)
    assert len(server.bodies) == 2
    page.keyboard.press("Escape")
    write(page, "x")
    assert text(page).endswith("x")


def test_characters_of_several_tokens_stay_whole(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=5, temperature=0)
    write(page, START + "!")
    shown = draw(page)
    assert shown.startswith(START + "!😀")
    settings(page, max_tokens=2)
    page.keyboard.press("Control+z")
    assert draw(page) == START + "!"  # two bytes of four
    assert draw(page) == START + "!😀"
    assert server.bodies[-1]["prompt"][-2:] == fake_server.encode("😀")[:2]
    page.keyboard.press("Backspace")
    assert text(page) == START + "!"


def test_an_alternative_may_be_half_a_character(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=3, temperature=0)
    write(page, "the!")
    shown = draw(page)
    assert shown == "the!"
    settings(page, max_tokens=1)
    assert draw(page) == "the!😀"
    page.mouse.move(*point(page, 4))
    page.wait_for_selector("#popover:not([hidden])")
    assert alternatives(page) == ["bytes:\\x80", "␣the"]


def test_the_end_of_a_text_is_marked_and_can_be_passed(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=4, temperature=0)
    write(page, "over#")
    assert draw(page) == "over#"
    assert page.inner_text("#marks .end") == "end of text"
    assert "ended by itself" in page.inner_text("#status")
    page.click("#marks .end")
    page.click("#popover li:nth-child(2) button")
    until(page, "document.getElementById('editor').firstChild.data.length > 5")
    rest(page)
    assert server.bodies[-1]["prompt"] == fake_server.encode("over# the")


def test_several_continuations_become_branches(page: Page) -> None:
    settings(page, max_tokens=7, seed=5, n=3)
    write(page, START)
    first = draw(page)
    expected = [START + drawn_by(START, 5, 7, choice) for choice in range(3)]
    assert first == expected[0]
    page.keyboard.press("Alt+ArrowRight")
    assert text(page) == expected[1]
    page.keyboard.press("Alt+ArrowRight")
    assert text(page) == expected[2]


def test_a_stop_string_is_cut_out_even_inside_a_token(page: Page, server: FakeServer) -> None:
    whole = drawn_by(START, 3, 30)
    settings(page, max_tokens=30, seed=3, stop=whole[20:23])
    write(page, START)
    kept = START + whole[: whole.index(whole[20:23])]
    assert draw(page) == kept
    assert "ended" in page.inner_text("#status")
    draw(page)
    assert "".join(fake_server.contribution(server.bodies[-1]["prompt"])) == kept


def test_an_edit_of_drawn_text_leaves_the_drawn_version_in_the_tree(page: Page) -> None:
    settings(page, max_tokens=6, seed=8)
    write(page, START)
    drawn = draw(page)
    for _ in range(5):
        page.keyboard.press("Backspace")
    page.keyboard.type(" my words")
    page.wait_for_timeout(500)
    assert text(page) == drawn[:-5] + " my words"
    page.keyboard.press("Alt+ArrowLeft")
    assert text(page) == drawn
    page.keyboard.press("Alt+ArrowRight")
    assert text(page) == drawn[:-5] + " my words"


def test_everything_is_there_after_a_reload(page: Page) -> None:
    settings(page, max_tokens=8, temperature=0.9)
    write(page, START)
    versions = [draw(page), draw(page, "Control+Shift+Enter")]
    page.reload()
    page.wait_for_selector("#model b", state="attached")
    assert text(page) == versions[1]
    assert page.input_value("#sampling-temperature") == "0.9"
    page.keyboard.press("Alt+ArrowLeft")
    assert text(page) == versions[0]
    page.mouse.move(*point(page, len(START) + 1))
    page.wait_for_selector("#popover:not([hidden])")
    assert len(alternatives(page)) >= 8


def test_a_second_tab_does_not_overwrite_the_first(page: Page, server: FakeServer) -> None:
    write(page, "first")
    page.wait_for_timeout(500)
    other = page.context.new_page()
    other.goto(server.url)
    other.wait_for_selector("#model b", state="attached")
    assert text(other) == "first"
    write(other, " second")
    other.wait_for_timeout(500)
    write(page, " third")
    page.wait_for_timeout(500)
    page.click("#documents")
    titles = page.eval_on_selector_all("#documents-menu span", "all => all.map((e) => e.textContent)")
    assert "first second" in titles
    assert text(page) == "first third"


def test_a_document_goes_to_a_file_and_back(page: Page, tmp_path: Path) -> None:
    settings(page, max_tokens=8)
    write(page, START)
    versions = [draw(page), draw(page, "Control+Shift+Enter")]
    page.click("#documents")
    with page.expect_download() as download:
        page.click("text=Export as JSON")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    page.click("#documents")
    page.click("text=New text")
    assert text(page) == ""
    page.set_input_files("#import-file", path)
    until(page, "document.getElementById('editor').firstChild.data !== ''")
    assert text(page) == versions[1]
    page.keyboard.press("Alt+ArrowLeft")
    assert text(page) == versions[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "nodes": []}))
    page.set_input_files("#import-file", path)
    page.wait_for_selector("#message:not([hidden])")
    assert "cannot be read" in page.inner_text("#message")
    assert text(page) == versions[0]


def test_the_command_repeats_the_very_request(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=9, top_k=5, stop="zzz")
    write(page, START + "'s\n")
    shown = draw(page)
    page.keyboard.press("Alt+c")
    words = shlex.split(page.inner_text("#code"))
    assert words[:2] == ["curl", f"{server.url}v1/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert {key: body[key] for key in ("seed", "top_k", "stop")} == {
        "seed": server.bodies[0]["seed"],
        "top_k": 5,
        "stop": ["zzz"],
    }
    sent = urllib.request.Request(
        words[1], json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(sent) as answer:
        again = json.load(answer)["choices"][0]["text"]
    assert START + "'s\n" + again == shown
    page.click("#as-python")
    program = page.inner_text("#code")
    compile(program, "copied", "exec")
    assert f"seed={body['seed']}" in program and "extra_body={" in program


def test_the_command_for_drawn_text_sends_its_ids(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=4)
    write(page, START)
    draw(page)
    draw(page)
    page.click("#share")
    body = json.loads(shlex.split(page.inner_text("#code"))[-1])
    assert body["prompt"] == server.bodies[-1]["prompt"]


def test_pasted_text_is_plain_and_exact(page: Page) -> None:
    page.focus("#editor")
    page.evaluate(
        """() => {
          const data = new DataTransfer();
          data.setData('text/plain', 'a\\r\\n\\tb  \\n');
          data.setData('text/html', '<b>a</b>');
          const event = new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true });
          document.getElementById('editor').dispatchEvent(event);
        }"""
    )
    page.keyboard.type("c")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.keyboard.type("d")
    assert text(page) == "a\n\tb  \nc\n\nd"
    assert page.evaluate("document.getElementById('editor').children.length") == 1


def test_composed_input_and_word_deletion_are_read_back(page: Page) -> None:
    write(page, "cave ")
    session = page.context.new_cdp_session(page)
    session.send("Input.imeSetComposition", {"text": "に", "selectionStart": 1, "selectionEnd": 1})
    session.send("Input.imeSetComposition", {"text": "日", "selectionStart": 1, "selectionEnd": 1})
    session.send("Input.insertText", {"text": "日本"})
    assert text(page) == "cave 日本"
    page.keyboard.type(" walls")
    page.keyboard.press("Control+Backspace")
    assert text(page) == "cave 日本 "
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    assert "walls" not in text(page)


def test_errors_are_said_in_place_and_the_text_stays(page: Page, server: FakeServer) -> None:
    page.focus("#editor")
    page.keyboard.insert_text("the " * 2100)
    before = text(page)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#message:not([hidden])")
    assert "too long" in page.inner_text("#message")
    assert text(page) == before
    server.fail_after = 4
    settings(page, max_tokens=20, seed=1)
    page.keyboard.press("Control+a")
    page.keyboard.type(START)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#message:not([hidden]) >> text=out of memory")
    rest(page)
    assert text(page) == START + drawn_by(START, 1, 4)
    server.fail_after = None
    length = len(text(page))
    page.click("#message >> text=Try again")
    until(page, f"document.getElementById('editor').firstChild.data.length > {length}")
    rest(page)


def test_a_key_is_asked_for_and_kept_for_the_session(browser: Any, server: FakeServer) -> None:
    server.reset()
    server.key = "hand"
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#key-sheet[open]")
    assert "API key" in page.inner_text("#key-reason")
    page.fill("#key", "hand")
    page.keyboard.press("Enter")
    page.wait_for_selector("#model b", state="attached")
    settings(page, max_tokens=3, seed=1)
    write(page, START)
    assert draw(page) == START + drawn_by(START, 1, 3)
    page.reload()
    page.wait_for_selector("#model b", state="attached")
    page.keyboard.press("Alt+c")
    page.wait_for_selector("#share-sheet[open]")
    assert "hand" not in page.inner_text("#code") and "$OPENAI_API_KEY" in page.inner_text("#code")
    assert page.evaluate("JSON.stringify(localStorage).includes('hand')") is False
    context.close()


def test_a_loading_model_is_waited_for(browser: Any, server: FakeServer) -> None:
    server.reset()
    server.loading = True
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#model >> text=loading")
    server.loading = False
    page.wait_for_selector("#model b", state="attached")
    context.close()


def test_all_text_can_be_scored_and_coloured(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=6, seed=6)
    write(page, START)
    shown = draw(page)
    page.keyboard.press("Alt+p")
    page.wait_for_selector("#legend:not([hidden]) >> text=nats a token over")
    assert text(page) == shown
    assert server.bodies[-1]["echo"] and server.bodies[-1]["max_tokens"] == 0
    numbers = page.evaluate("[...CSS.highlights.keys()].filter((name) => name.startsWith('heat')).length")
    assert numbers >= 2
    page.mouse.move(*point(page, len("Once upon")))
    page.wait_for_selector("#popover:not([hidden])")
    assert "typed" in page.inner_text("#popover .facts")
    page.click("#popover li:first-child button")
    rest(page)
    kept = fake_server.encode("Once upon")
    assert server.bodies[-1]["prompt"] == [*kept, fake_server.likely(kept[-1])[0][0]]


def test_scores_are_marked_as_old_after_an_edit_before_them(page: Page) -> None:
    settings(page, max_tokens=6, seed=6)
    write(page, START)
    shown = draw(page)
    page.keyboard.press("Control+Home")
    page.keyboard.type("X")
    page.mouse.move(*point(page, len(shown) - 1))
    page.wait_for_selector("#popover:not([hidden])")
    assert "before the text was edited" in page.inner_text("#popover .facts")
    page.keyboard.press("Backspace")
    page.wait_for_timeout(450)
    page.mouse.move(0, 0)
    page.wait_for_selector("#popover", state="hidden")
    page.mouse.move(*point(page, len(shown) - 2))
    page.wait_for_selector("#popover:not([hidden])")
    assert "before the text was edited" not in page.inner_text("#popover .facts")


def test_branch_here_goes_on_from_the_caret(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=4, seed=1)
    write(page, START)
    before = draw(page)
    page.keyboard.press("Control+Home")
    for _ in "Once upon":
        page.keyboard.press("ArrowRight")
    assert draw(page, "Alt+Enter") == "Once upon" + drawn_by("Once upon", 1, 4)
    page.keyboard.press("Alt+ArrowLeft")
    assert text(page) == before


def say(page: Page, words: str) -> None:
    page.fill("#say", words)
    page.keyboard.press("Enter")
    rest(page, "chat")


def answers(page: Page) -> list[str]:
    return page.eval_on_selector_all(".assistant .body", "all => all.map((e) => e.textContent)")


def test_chat_answers_retries_edits_and_keeps_every_version(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=6)
    page.click("#tab-chat")
    assert "no chat template" in page.inner_text("#chat-note")
    page.click("#system-box summary")
    page.fill("#system", "Paint.")
    say(page, "What is on the walls?")
    first = answers(page)
    assert server.bodies[-1]["messages"] == [
        {"role": "system", "content": "Paint."},
        {"role": "user", "content": "What is on the walls?"},
    ]
    page.click(".assistant >> text=Retry")
    rest(page, "chat")
    assert "2/2" in page.inner_text(".assistant .number")
    assert answers(page) != first
    page.keyboard.press("Alt+ArrowLeft")
    assert answers(page) == first
    page.click(".user >> text=Edit")
    page.fill(".rewrite", "And on the ceiling?")
    page.keyboard.press("Control+Enter")
    rest(page, "chat")
    assert server.bodies[-1]["messages"][-1]["content"] == "And on the ceiling?"
    page.click(".user [aria-label='Previous version']")
    assert answers(page) == first
    page.reload()
    page.wait_for_selector(".assistant .body")
    assert answers(page) == first


def test_a_token_of_an_answer_can_be_replaced(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=5, seed=3)
    page.click("#tab-chat")
    say(page, "Go")
    ids = fake_server.draw(
        server.bodies[-1], prompt := fake_server.encode("user: Go\nassistant:"), 0
    )
    box = page.evaluate(
        """() => {
          const range = new Range(), node = document.querySelector('.assistant .body').firstChild;
          range.setStart(node, 1);
          range.setEnd(node, 2);
          const { left, top, width, height } = range.getClientRects()[0];
          return [left + width / 2, top + height / 2];
        }"""
    )
    page.mouse.move(*box)
    page.wait_for_selector("#popover:not([hidden])")
    options = [token for token, _ in fake_server.likely(prompt[-1])]
    place = 1 if options[0] == ids[0] else 0
    page.click(f"#popover li:nth-child({place + 1}) button")
    rest(page, "chat")
    assert server.bodies[-1]["prompt"] == [*prompt, options[place]]
    assert "2/2" in page.inner_text(".assistant .number")


def test_chat_stops_and_new_chats_leave_the_old_ones(page: Page, server: FakeServer) -> None:
    server.token_seconds = 0.03
    settings(page, max_tokens=300)
    page.click("#tab-chat")
    page.fill("#say", "Tell")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.assistant .body')?.textContent.length > 20")
    page.keyboard.press("Escape")
    rest(page, "chat")
    stopped = answers(page)
    page.click("#chat-new")
    assert answers(page) == []
    page.click(".beginning >> text=Tell")
    assert answers(page) == stopped


def no_sideways(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_phone_has_everything_within_its_width(visit: Any) -> None:
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    settings(page, max_tokens=20, seed=1)
    page.tap("#editor")
    page.keyboard.type(START + " " + "x" * 80)
    page.tap("#continue")
    until(page, "document.getElementById('editor').firstChild.data.length > 110")
    rest(page)
    page.tap("#retry")
    page.wait_for_selector("#branch:not([hidden])")
    rest(page)
    assert no_sideways(page)
    page.tap("#tokens")
    page.touchscreen.tap(*point(page, 110))
    page.wait_for_selector("#popover:not([hidden])")
    box = page.locator("#popover").bounding_box()
    assert box["x"] == 0 and box["width"] == PHONE["width"]
    page.tap("#popover [aria-label=Close]")
    page.tap("#tokens")
    page.tap("#toggle-panel")
    page.wait_for_selector("#panel.open")
    assert page.is_visible("#sampling-temperature")
    page.touchscreen.tap(10, 300)
    page.tap("#tab-chat")
    page.fill("#say", "Hello " * 20)
    page.tap("#send")
    rest(page, "chat")
    assert no_sideways(page)
    hidden = page.evaluate(
        "[...document.querySelectorAll('#chat button')].filter((b) => b.getBoundingClientRect().right > innerWidth).length"
    )
    assert hidden == 0


def test_dark_follows_the_system_and_the_switch(visit: Any) -> None:
    page = visit(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(22, 19, 17)"
    page.click("#theme")
    assert page.evaluate(background) == "rgb(250, 246, 240)"
    page.reload()
    assert page.evaluate(background) == "rgb(250, 246, 240)"


def test_every_control_has_a_name_and_help_lists_the_shortcuts(page: Page) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, [role=textbox], [role=tree]')]
          .filter((e) => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.textContent.trim()
            || (e.labels && e.labels.length))).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    page.keyboard.press("Control+/")
    page.wait_for_selector("#help-sheet[open]")
    assert "Retry" in page.inner_text("#keys")
    page.keyboard.press("Escape")
    page.wait_for_selector("#help-sheet", state="hidden")


def test_a_long_text_is_edited_like_a_short_one(page: Page) -> None:
    long = "The walls of the cave.\n" * 2000
    page.focus("#editor")
    page.keyboard.insert_text(long)
    page.keyboard.type("end")
    assert text(page) == long + "end"
    page.keyboard.press("Control+z")
    assert text(page).startswith(long[:-1])


RANDOM_EDITS = """async (seed) => {
  const { TextDocument } = await import('/playground/document.js');
  const { decodeDocument, encodeDocument } = await import('/playground/saved.js');
  const { textOf } = await import('/playground/pieces.js');
  let state = seed;
  const random = (n) => {
    state = (state * 1103515245 + 12345) % 2147483648;
    return Math.floor((state / 2147483648) * n);
  };
  let doc = new TextDocument(), plain = '', number = 0;
  const drawn = [], history = [''], problems = [];
  const check = (what) => { if (doc.text !== plain) problems.push(`${what}: ${doc.text} / ${plain}`); };
  for (let turn = 0; turn < 400; turn++) {
    const kind = random(10);
    if (kind < 5) {
      const start = random(plain.length + 1), end = Math.min(plain.length, start + random(4));
      const inserted = ['', 'x', 'ab', ' é', '\\n'][random(5)];
      doc.edit(start, end, inserted, { now: turn * 5000 });
      plain = plain.slice(0, start) + inserted + plain.slice(end);
    } else if (kind < 8) {
      const base = kind === 7 ? doc.beforeLastRun() : doc.pieces, run = `r${number++}`;
      doc.settle();
      doc.replace(base);
      const tokens = Array.from({ length: 1 + random(4) }, (_, at) => ({ text: ['a', ' b', '', 'cc'][random(4)], id: at, run, at, logprob: -1 }));
      doc.extend([...base, ...tokens]);
      doc.keep([doc.pieces]);
      drawn.push([run, tokens.length]);
      plain = textOf(doc.pieces);
    } else if (kind === 8) {
      const forks = doc.forks();
      const fork = forks[random(forks.length)];
      if (fork) doc.goTo(fork.children[random(fork.count)]);
      plain = doc.text;
    } else if (random(2)) {
      if (doc.undo()) doc.redo();
    } else {
      doc = decodeDocument(JSON.parse(JSON.stringify(encodeDocument(doc))));
    }
    check(turn);
    doc.settle();
    check('settled');
    if (textOf(doc.tree.piecesTo(doc.end)) !== plain) problems.push('the tree shows another text');
  }
  const kept = {};
  for (const node of doc.tree.nodes.values()) {
    for (const piece of node.pieces) if (piece.run && !piece.stale) (kept[piece.run] ??= new Set()).add(piece.at);
    if (node.id && node.id !== doc.end && node.children.length === 1) problems.push('a node with one child');
  }
  for (const [run, count] of drawn) if (kept[run]?.size !== count) problems.push(`lost of ${run}`);
  return problems;
}"""


@pytest.mark.parametrize("seed", range(5))
def test_random_edits_never_lose_what_was_drawn(page: Page, seed: int) -> None:
    assert page.evaluate(RANDOM_EDITS, seed) == []


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
    settings(our_page, max_tokens=20, temperature=1)
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


def test_our_server_goes_on_exactly_from_a_chosen_token(our_page: Page, our_server: Serving) -> None:
    settings(our_page, max_tokens=12, temperature=1)
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
    our_page.wait_for_selector("#legend:not([hidden]) >> text=nats a token over")
    scored = int(our_page.inner_text("#mean").split()[-1].replace(",", ""))
    assert scored >= len(body["prompt"]) + 11


def test_our_server_chats_without_a_template(our_page: Page) -> None:
    settings(our_page, max_tokens=8, temperature=1)
    our_page.click("#tab-chat")
    assert "no chat template" in our_page.inner_text("#chat-note")
    say(our_page, "add(1, 2)")
    first = answers(our_page)
    assert "8" in our_page.inner_text("#chat-status")
    our_page.click(".assistant >> text=Retry")
    rest(our_page, "chat")
    our_page.keyboard.press("Alt+ArrowLeft")
    assert answers(our_page) == first
