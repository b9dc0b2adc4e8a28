"""The page in a real browser: type once, several answers side by side; by keyboard, on a phone, under its policy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import without_template
from tests.serve.server import Server, make_token, wait_for

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs the extra `browser`: pip install 'budwood[browser]'"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """An installed Chromium, otherwise playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except sync_api.Error as error:
            if "Executable doesn't exist" not in str(error):
                raise
            pytest.skip("needs Chromium: none is installed")
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, server) -> Iterator[Any]:
    """Function (**options of the context) -> the page, opened; at the end, nothing may have failed in it."""
    contexts, faults = [], []

    def make(url: str = "", allowed: str = "", **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" and (
            not allowed or not re.search(allowed, line.text)) else None)  # fmt: skip
        page.on("request", lambda sent: faults.append(sent.url) if not sent.url.startswith(
            (url or server.url, "data:")) else None)  # fmt: skip
        page.goto(url or server.url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert not faults, "errors, or requests to elsewhere"


def choose(page: Any, *names: str) -> None:
    for box in page.locator("#choices input").all():
        box.set_checked(box.get_attribute("value") in names)


def texts(page: Any) -> dict[str, str]:
    """Return the last turn's answers by name."""
    cards = page.locator(".turn").last.locator(".answer").all()
    return {card.locator("h2").text_content(): card.locator("pre").text_content() for card in cards}


def finished(page: Any) -> None:
    page.locator("#send").wait_for(state="visible", timeout=60_000)


def picture(page: Any, folder: Path, name: str) -> None:
    page.screenshot(path=folder / f"{name}.png")
    assert (folder / f"{name}.png").stat().st_size > 5000


def test_two_adapters_answer_side_by_side_what_each_answers_alone(server, reference, open_page, tmp_path):
    page = open_page(viewport={"width": 1280, "height": 800})
    page.locator(".choice").first.wait_for()
    assert page.locator("#choices input").count() == 9
    choose(page, "lora-8", "dora-4")
    page.locator("summary").click()
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("System prompt").fill("")
    (case,) = [c for c in reference.cases("lora-8", 2, 12) if c.chat]
    page.get_by_label("Prompt", exact=True).fill(case.prompt)
    page.get_by_role("button", name="Send").click()
    finished(page)
    expected = {name: reference.answer(name, case.prompt, 12, chat=True)[0] for name in ("lora-8", "dora-4")}
    assert texts(page) == expected
    left, right = (card.bounding_box() for card in page.locator(".answer").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"], "side by side"
    for foot in page.locator(".answer footer").all():
        assert re.fullmatch(r"\d+ tokens? · .*first after \d+\.\d\d s.*", foot.text_content())
    picture(page, tmp_path, "desktop")


def test_the_page_is_used_by_keyboard_alone(server, open_page):
    page = open_page()
    page.locator(".choice").first.wait_for()
    assert page.evaluate("document.activeElement.id") == "prompt", "one can type at once"
    order = []
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        order.append(page.evaluate("document.activeElement.value || document.activeElement.tagName"))
    assert "SUMMARY" in order and {"tiny", "lora-4", "head"} <= set(order)
    page.evaluate("document.querySelector('#choices input').focus()")
    for box in page.locator("#choices input").all():  # only lora-4 and lora-8 stay
        if box.is_checked() != (box.get_attribute("value") in ("lora-4", "lora-8")):
            page.keyboard.press("Space")
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the settings open
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "max"
    page.keyboard.press("Control+A")
    page.keyboard.type("4096")
    page.locator("#prompt").focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator(".turn").count() == 0, "Shift+Enter begins a line"
    page.keyboard.press("Enter")
    page.locator(".answer pre:not(:empty)").first.wait_for()
    page.keyboard.press("Escape")
    finished(page)
    assert set(texts(page)) == {"lora-4", "lora-8"}
    assert page.locator(".asked").text_content() == "one\ntwo"
    if "stopped" in page.locator(".answers").text_content():
        wait_for(lambda: server.rows() == 0)  # cancelled, unless the answer had just ended
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("again")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert page.locator(".turn").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(server, open_page, tmp_path, scheme):
    page = open_page(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True, is_mobile=True)
    page.locator(".choice").first.wait_for()
    choose(page, "tiny", "lora-32", "head")
    page.locator("summary").click()
    page.get_by_label("Max tokens").fill("60")
    page.locator("summary").click()
    page.locator("#prompt").fill("x" * 300)
    page.locator("#send").tap()
    finished(page)
    cards = [card.bounding_box() for card in page.locator(".answer").all()]
    assert len(cards) == 3
    assert all(card["x"] >= 0 and card["x"] + card["width"] <= 360 for card in cards)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        assert box["x"] + box["width"] <= 360 and box["height"] >= 24
    picture(page, tmp_path, scheme)


def test_text_is_never_html_and_the_policy_forbids_scripts(server, open_page):
    page = open_page()
    page.locator(".choice").first.wait_for()
    choose(page, "tiny")
    attack = "<img src=x onerror=\"document.title='caught'\"><script>document.title='caught'</script>"
    page.locator("#prompt").fill(attack)
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".asked").text_content() == attack
    assert page.locator("#turns img, #turns script").count() == 0 and page.title() == "Budwood"
    policy = page.request.get(server.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe-inline" not in policy


def test_a_conversation_goes_on_and_starts_anew(server, reference, open_page):
    page = open_page()
    page.locator(".choice").first.wait_for()
    choose(page, "lora-8")
    page.evaluate("document.getElementById('max').value = 6")
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    for text in ("one", "two"):
        page.locator("#prompt").fill(text)
        page.keyboard.press("Enter")
        finished(page)
    first = page.locator(".answer pre").first.text_content()
    roles = [message["role"] for message in sent[1]["messages"]]
    assert roles == (["user", "assistant", "user"] if first else ["user"])
    page.get_by_role("button", name="New conversation").click()
    page.locator("#prompt").fill("three")
    page.keyboard.press("Enter")
    finished(page)
    assert [message["content"] for message in sent[2]["messages"]] == ["three"]
    page.evaluate("document.getElementById('blend').value = 'lora-8=0.5 lora-4=0.5'")
    page.locator("#prompt").fill("four")
    page.keyboard.press("Enter")
    finished(page)
    assert set(texts(page)) == {"lora-8", "lora-8=0.5 lora-4=0.5"}


def test_a_server_with_tokens_asks_for_one_and_errors_are_plain(tiny_base, root, tmp_path, open_page):
    token = make_token(tmp_path / "tokens.json", "acme", "--adapter", "lora-4", "--per-minute", 4)
    bare = without_template(tiny_base, tmp_path / "bare")
    with Server(bare, root, tmp_path) as server:
        page = open_page(server.url, allowed="Failed to load resource")
        page.get_by_text("This server needs a token: enter yours under Settings.").wait_for()
        page.get_by_label("Access token").fill(token)
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.locator(".choice").first.wait_for()
        assert page.locator("#choices input").count() == 2
        page.reload()
        page.locator(".choice").first.wait_for()
        assert page.evaluate("Object.keys(localStorage).length") == 0
        choose(page, "lora-4")
        asked = []
        page.on("request", lambda request: asked.append(request.url) if request.method == "POST" else None)
        for _ in range(4):
            page.locator("#prompt").fill("x")
            page.keyboard.press("Enter")
            finished(page)
        assert set(asked) == {f"{server.url}/v1/completions"}, "without a chat template, as plain text"
        assert re.search(r"most of this token\. Try again in \d+ s\.", page.locator(".turn").last.text_content())
        server.end()
        page.locator("#prompt").fill("x")
        page.keyboard.press("Enter")
        page.get_by_text("The server cannot be reached. Is it still running?").wait_for()
