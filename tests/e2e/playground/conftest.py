"""A browser and a server with a script; both once for all tests of a file."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.playground import fake_server
from tests.e2e.playground.fake_server import FakeServer
from tests.e2e.playground.window import Page, Visit

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="package")
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    running, thread = fake_server.start(fake)
    yield fake
    running.should_exit = True
    thread.join(10)


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("needs chromium on the PATH")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


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
