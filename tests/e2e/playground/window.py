"""The playground in a browser window, and what one does there."""

from typing import Any

from tests.e2e.playground import fake_server

Page = Any
START = "Once upon a time"


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


def text(page: Page) -> str:
    return page.evaluate("document.getElementById('editor').firstChild.data")


def write(page: Page, words: str) -> None:
    page.focus("#editor")
    page.keyboard.type(words)


def draw(page: Page, keys: str = "Control+Enter") -> str:
    page.keyboard.press(keys)
    rest(page)
    return text(page)


def point(page: Page, offset: int, box: str = "#editor") -> tuple[float, float]:
    """The middle of a character on the screen."""
    place = page.evaluate(
        """([offset, box]) => {
          const range = new Range(), node = document.querySelector(box).firstChild;
          range.setStart(node, offset);
          range.setEnd(node, offset + 1);
          const { left, top, width, height } = range.getClientRects()[0];
          return [left + width / 2, top + height / 2];
        }""",
        [offset, box],
    )
    return place[0], place[1]


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


def say(page: Page, words: str) -> None:
    page.fill("#say", words)
    page.keyboard.press("Enter")
    rest(page, "chat")


def answers(page: Page) -> list[str]:
    return page.eval_on_selector_all(".assistant .body", "all => all.map((e) => e.textContent)")


def no_sideways(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")
