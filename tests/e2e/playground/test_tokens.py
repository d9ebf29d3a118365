"""Tokens, their alternatives and their scores."""

from tests.e2e.playground import fake_server
from tests.e2e.playground.fake_server import FakeServer
from tests.e2e.playground.window import (
    START,
    Page,
    alternatives,
    draw,
    point,
    rest,
    settings,
    text,
    until,
    write,
)


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


def test_all_text_can_be_scored_and_coloured(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=6, seed=6)
    write(page, START)
    shown = draw(page)
    page.keyboard.press("Alt+p")
    page.wait_for_selector("#score:not([disabled])")
    assert text(page) == shown
    assert server.bodies[-1]["echo"] and server.bodies[-1]["max_tokens"] == 0
    numbers = page.evaluate(
        "[...CSS.highlights.keys()].filter((name) => name.startsWith('heat')).length"
    )
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
