"""The page as a whole: errors, keys, phones, the dark."""

from typing import Any

from tests.e2e.playground.fake_server import FakeServer
from tests.e2e.playground.window import (
    START,
    Page,
    draw,
    drawn_by,
    no_sideways,
    point,
    rest,
    settings,
    text,
    until,
    write,
)

PHONE = {"width": 360, "height": 740}


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
    assert "loading" not in page.inner_text("#model")
    context.close()


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
    ends = page.eval_on_selector_all(
        "#chat button", "all => all.map((button) => button.getBoundingClientRect().right)"
    )
    assert max(ends) <= PHONE["width"]


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
        """() => [...document.querySelectorAll('button, input, textarea, [role]')]
          .filter((e) => !e.matches('[aria-label], [aria-labelledby]'))
          .filter((e) => !e.textContent.trim() && !e.labels?.length && e.tabIndex >= 0)
          .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    page.keyboard.press("Control+/")
    page.wait_for_selector("#help-sheet[open]")
    assert "Retry" in page.inner_text("#keys")
    page.keyboard.press("Escape")
    page.wait_for_selector("#help-sheet", state="hidden")
