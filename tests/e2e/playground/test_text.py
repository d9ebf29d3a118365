"""Writing and drawing in one text."""

import re
from typing import Any

from tests.e2e.playground import fake_server
from tests.e2e.playground.fake_server import FakeServer
from tests.e2e.playground.window import (
    START,
    Page,
    draw,
    drawn_by,
    point,
    rest,
    settings,
    text,
    until,
    write,
)


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


def test_a_tokenizer_that_puts_a_space_before_texts_does_so_once(
    visit: Any, server: FakeServer
) -> None:
    server.prefixed = True
    page = visit()
    settings(page, max_tokens=3, seed=2)
    write(page, "the cave")
    draw(page)
    first = server.bodies[-1]["prompt"]
    assert "".join(fake_server.contribution(first)) == " the cave"
    drawn = fake_server.draw(server.bodies[-1], first, 0)
    write(page, "over it")
    shown = draw(page)
    assert server.bodies[-1]["prompt"] == [*first, *drawn, *fake_server.encode("over it")]
    page.keyboard.press("Alt+p")
    page.wait_for_selector("#score:not([disabled])")
    assert text(page) == shown
    page.mouse.move(*point(page, 4))
    page.wait_for_selector("#popover:not([hidden]) >> text=typed")


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


def test_a_stop_string_is_cut_out_even_inside_a_token(page: Page, server: FakeServer) -> None:
    whole = drawn_by(START, 3, 30)
    settings(page, max_tokens=30, seed=3, stop=whole[20:23])
    write(page, START)
    kept = START + whole[: whole.index(whole[20:23])]
    assert draw(page) == kept
    assert "ended" in page.inner_text("#status")
    draw(page)
    assert "".join(fake_server.contribution(server.bodies[-1]["prompt"])) == kept


def test_pasted_text_is_plain_and_exact(page: Page) -> None:
    page.focus("#editor")
    page.evaluate(
        """() => {
          const data = new DataTransfer();
          data.setData('text/plain', 'a\\r\\n\\tb  \\n');
          data.setData('text/html', '<b>a</b>');
          const options = { clipboardData: data, bubbles: true, cancelable: true };
          const event = new ClipboardEvent('paste', options);
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


def test_a_long_text_is_edited_like_a_short_one(page: Page) -> None:
    long = "The walls of the cave.\n" * 2000
    page.focus("#editor")
    page.keyboard.insert_text(long)
    page.keyboard.type("end")
    assert text(page) == long + "end"
    page.keyboard.press("Control+z")
    assert text(page).startswith(long[:-1])


def test_the_caret_is_where_it_was_when_the_focus_comes_back(page: Page) -> None:
    write(page, START)
    page.focus("#sampling-seed")
    page.focus("#editor")
    page.keyboard.type("!")
    assert text(page) == START + "!"


def test_dropped_text_goes_in_where_it_is_dropped(page: Page) -> None:
    write(page, START)
    x, y = point(page, len("Once "))
    page.evaluate(
        """([x, y]) => {
          const data = new DataTransfer();
          data.setData('text/plain', 'not ');
          const place = { clientX: x - 4, clientY: y, dataTransfer: data };
          const event = new DragEvent('drop', { ...place, bubbles: true, cancelable: true });
          document.getElementById('editor').dispatchEvent(event);
        }""",
        [x, y],
    )
    assert text(page) == "Once not upon a time"
