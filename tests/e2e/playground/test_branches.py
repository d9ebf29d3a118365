"""Versions beside each other."""

import re
from pathlib import Path

import pytest

from tests.e2e.playground.fake_server import FakeServer
from tests.e2e.playground.window import START, Page, draw, drawn_by, settings, text, write

RANDOM_EDITS = Path(__file__).with_name("random_edits.js")


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


def test_branches_within_branches_are_found_again(page: Page) -> None:
    settings(page, max_tokens=5)
    write(page, START)
    draw(page)
    second = draw(page, "Control+Shift+Enter")
    longer = [draw(page), draw(page, "Control+Shift+Enter")]
    assert all(each.startswith(second) for each in longer)
    assert len(page.query_selector_all("#gutter .fork")) == 2
    page.keyboard.press("Alt+ArrowUp")
    page.keyboard.press("Alt+ArrowRight")
    assert not text(page).startswith(second)
    page.keyboard.press("Alt+ArrowRight")
    assert text(page) == longer[1]
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.press("Alt+ArrowLeft")
    assert text(page) == longer[0]
    rows = page.query_selector_all("#branches [role=treeitem]")
    assert [row.get_attribute("aria-level") for row in rows] == ["1", "2", "2", "3", "3"]
    rows[1].click()
    assert not text(page).startswith(second)


def test_the_figures_are_those_of_the_branch_on_show(page: Page) -> None:
    write(page, START)
    settings(page, max_tokens=4, seed=10)
    draw(page)
    settings(page, max_tokens=9, seed=20)
    draw(page, "Control+Shift+Enter")
    assert re.match(r"drew 9 .* seed 21 ", page.inner_text("#status"))
    page.keyboard.press("Alt+ArrowLeft")
    assert re.match(r"drew 4 .* seed 10 ", page.inner_text("#status"))


def test_a_retry_with_a_fixed_seed_moves_the_seed_on(page: Page, server: FakeServer) -> None:
    settings(page, max_tokens=4, seed=50)
    write(page, START)
    draw(page)
    draw(page, "Control+Shift+Enter")
    draw(page, "Control+Shift+Enter")
    assert [body["seed"] for body in server.bodies] == [50, 51, 52]


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


@pytest.mark.parametrize("seed", range(5))
def test_random_edits_never_lose_what_was_drawn(page: Page, seed: int) -> None:
    assert page.evaluate(RANDOM_EDITS.read_text(), seed) == []
