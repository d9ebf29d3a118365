"""What outlives the page: texts, files, commands."""

import json
import shlex
import urllib.request
from pathlib import Path

from tests.e2e.playground.fake_server import FakeServer
from tests.e2e.playground.window import (
    START,
    Page,
    alternatives,
    draw,
    point,
    settings,
    text,
    until,
    write,
)


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
    titles = page.eval_on_selector_all(
        "#documents-menu span", "all => all.map((e) => e.textContent)"
    )
    assert "first second" in titles
    assert text(page) == "first third"


def test_another_text_ends_and_keeps_what_is_drawn(page: Page, server: FakeServer) -> None:
    server.token_seconds = 0.03
    settings(page, max_tokens=300)
    write(page, START)
    page.keyboard.press("Control+Enter")
    until(page, "document.getElementById('editor').firstChild.data.length > 40")
    page.click("#documents")
    page.click("text=New text")
    until(page, "document.getElementById('editor').firstChild.data === ''")
    page.click("#documents")
    page.click(f"#documents-menu >> text={START}")
    until(page, "document.getElementById('editor').firstChild.data.length > 40")
    assert text(page).startswith(START)


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
