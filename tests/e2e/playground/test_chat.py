"""The chat."""

from tests.e2e.playground import fake_server
from tests.e2e.playground.fake_server import FakeServer
from tests.e2e.playground.window import Page, answers, point, rest, say, settings, until


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
    page.mouse.move(*point(page, 1, ".assistant .body"))
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


def test_a_chat_that_fails_says_so_and_can_be_tried_again(page: Page, server: FakeServer) -> None:
    server.fail_after = 0
    settings(page, max_tokens=4)
    page.click("#tab-chat")
    say(page, "Go")
    assert "out of memory" in page.inner_text("#chat-message")
    assert answers(page) == []
    server.fail_after = None
    page.click("#chat-message >> text=Try again")
    page.wait_for_selector(".assistant .body")
    rest(page, "chat")
    assert len(answers(page)[0]) > 0
