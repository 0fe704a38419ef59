"""The page, in a browser as its users have one: pytest -m browser.

It needs the extra `browser`, and Chromium in the PATH or at QWEN3_CHROMIUM.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from qwen3_mlx import LLM
from tests.server.browsing import at, complete, pages, reload, say, shows
from tests.server.harness import TOOL
from tests.server.serving import Served, serving

pytestmark = pytest.mark.browser
SUM, COUNT = "What is 12 + 34?", "Count from 3 to 9"
MARKDOWN = r"""# Title

Some **bold**, *it*, `code <b>` and [a link](https://example.com/a_(b)) <script>bad()</script>

- one
  - [x] nested

1. first

> quoted

| a | b |
|---|---|
| 1 | 2 |

[odd](javascript:bad()) ![picture](https://example.com/p.png) snake_case_word

```python
print("hi")
"""

_NASTY = [
    *("*" * 20_000, "`" * 9999 + "x", "[" * 20_000, "- " * 9999),
    *("__a" * 9999, "|" * 9999, "**a " * 9999, "(" * 9999, "[a](" * 9999),
]  # what takes a careless pattern for ever


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo."""
    with serving(demo) as running:
        yield running


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page, newly opened; nothing may go wrong on it unseen."""
    with pages(browser, served.url, permissions=["clipboard-read", "clipboard-write"]) as opened:
        yield opened[0]


def test_a_reply_comes_with_its_thinking_folded(page: Any) -> None:
    say(page, SUM)
    assert re.fullmatch(r"12 \+ 34 = \d+", at(page, "answer").inner_text())
    thinking = at(page, "thinking")
    assert thinking.get_attribute("open") is None
    assert re.fullmatch(
        r"Thought for \d+\.\d s · \d+ tokens", thinking.locator("summary").inner_text()
    )
    thinking.locator("summary").click()
    assert "ones: 2 + 4" in thinking.inner_text()
    assert re.fullmatch(
        r"\d+ tokens in.* · \d+ out · [\d.]+ tokens/s", at(page, "stats").inner_text()
    )


def test_a_reply_is_stopped_by_button_or_key(page: Any) -> None:
    page.evaluate("localStorage.setItem('qwen3-temperature', '2')")
    for replies, end in enumerate(
        (lambda: at(page, "stop").click(), lambda: page.keyboard.press("Escape"))
    ):
        at(page, "prompt").fill("Count from 1 to 99, and again, and again, and again. " * 60)
        at(page, "send").click()
        at(page, "stop").wait_for()
        end()
        at(page, "send").wait_for()
        assert at(page, "message-user").count() == replies + 1


def test_settings_hold(page: Any) -> None:
    at(page, "settings").click()
    at(page, "mode").select_option("off")
    say(page, SUM)
    assert at(page, "thinking").is_hidden()
    at(page, "mode").select_option("on")
    at(page, "budget").fill("3")
    say(page, SUM, 2)
    assert "thinking closed by its budget" in at(page, "stats").nth(1).inner_text()
    at(page, "budget").fill("")
    at(page, "max-tokens").fill("5")
    at(page, "temperature").fill("0")
    at(page, "system").fill("You are brief.")
    at(page, "prompt").fill(SUM)
    at(page, "prompt").press("Enter")
    at(page, "stats").nth(2).filter(has_text="cut off at the token limit").wait_for()
    reload(page)
    assert at(page, "system").input_value() == "You are brief."
    at(page, "settings").click()
    page.keyboard.press("Escape")
    assert at(page, "system").is_hidden()


def test_retry_and_edit(page: Any) -> None:
    say(page, SUM)
    say(page, COUNT, 2)
    at(page, "retry").nth(1).click()
    complete(page, 2)
    assert at(page, "message-assistant").count() == 2
    at(page, "edit").first.click()
    field = at(page, "message-user").first.locator("textarea")
    field.fill("What is 5 + 6?")
    field.press("Enter")
    complete(page, 1)
    shows(page, "What is 5 + 6?")
    assert at(page, "answer").inner_text() == "5 + 6 = 11"
    assert at(page, "version").inner_text() == "2/2"
    at(page, "previous").click()  # nothing is lost: both tries of the second question, too
    shows(page, SUM, COUNT)
    assert at(page, "version").all_inner_texts() == ["1/2", "2/2"]


def test_tools_are_called_and_answered(page: Any) -> None:
    at(page, "settings").click()
    at(page, "tools").fill("{")
    at(page, "prompt").fill("What is 345 + 678?")
    at(page, "send").click()
    assert "The tools are not JSON" in at(page, "error").inner_text()
    at(page, "tools").fill(json.dumps([TOOL]))
    at(page, "mode").select_option("off")
    at(page, "temperature").fill("0")
    at(page, "send").click()
    complete(page, 1)
    assert "345 + 678" in at(page, "tool-call").inner_text()
    at(page, "tool-result").fill("1023")
    with page.expect_request("**/chat/completions") as sent:
        at(page, "tool-send").click()
    assert sent.value.post_data_json["messages"][-1]["content"] == "1023"
    complete(page, 2)
    assert "→ 1023" in at(page, "tool-call").inner_text()


def test_a_call_that_is_cut_off_is_shown_as_text(page: Any) -> None:
    at(page, "settings").click()
    at(page, "tools").fill(json.dumps([TOOL]))
    at(page, "mode").select_option("off")
    at(page, "temperature").fill("0")
    at(page, "max-tokens").fill("18")
    say(page, "What is 345 + 678?")
    assert at(page, "tool-call").count() == 0
    assert 'calculator({"expression": "34' in at(page, "answer").inner_text()
    assert "a tool call was cut off" in at(page, "stats").inner_text()
    at(page, "max-tokens").fill("")
    at(page, "prompt").fill("What is 345 + 678?")
    at(page, "send").click()
    complete(page, 2)
    assert "345 + 678" in at(page, "tool-call").inner_text()


def test_what_the_server_refuses_is_told(page: Any) -> None:
    say(page, SUM)
    at(page, "prompt").fill("What is 12 + 34? " * 2000)
    at(page, "send").click()
    at(page, "error").filter(has_text="the context window is 8,192").wait_for()
    assert at(page, "message-assistant").count() == 1


def test_conversations_are_kept_renamed_and_deleted(page: Any) -> None:
    say(page, SUM)
    page.keyboard.press("Control+Shift+O")
    assert at(page, "message-user").count() == 0
    say(page, COUNT)
    reload(page)
    assert at(page, "conversation").all_inner_texts() == [COUNT, SUM]
    at(page, "conversation").nth(1).click()
    assert at(page, "answer").inner_text().startswith("12 + 34")
    page.once("dialog", lambda dialog: dialog.accept("Sums"))
    page.get_by_label(f"Rename {SUM}").click()
    assert at(page, "conversation").all_inner_texts() == [COUNT, "Sums"]
    with page.expect_download() as file:
        page.get_by_label("Save this conversation as a file").click()
    assert file.value.suggested_filename == "Sums.json"
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Delete Sums").click()
    assert at(page, "conversation").all_inner_texts() == [COUNT]


def test_markdown_is_shown_and_never_run(page: Any) -> None:
    say(page, SUM)
    show = """async (text) => {
        const { MarkdownView } = await import("/page/markdown.js");
        const node = document.querySelector("[data-testid=answer]");
        node.replaceChildren();
        new MarkdownView(node).show(text);
    }"""
    page.evaluate(show, MARKDOWN)
    answer = at(page, "answer")
    assert answer.locator("h1").inner_text() == "Title"
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("p code").inner_text() == "code <b>"
    assert answer.locator("a").evaluate_all("links => links.map((link) => link.href)") == [
        "https://example.com/a_(b)",
        "https://example.com/p.png",
    ]
    assert answer.locator("script, img").count() == 0
    assert "<script>bad()</script>" in answer.inner_text()
    assert "[odd](javascript:bad()) " in answer.inner_text()
    assert answer.locator("ul ul input:checked").count() == 1
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    assert answer.locator("blockquote").inner_text() == "quoted"
    assert "snake_case_word" in answer.inner_text()
    answer.get_by_text("Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == 'print("hi")'
    for nasty in _NASTY:
        page.evaluate(show, nasty)


def test_light_dark_and_narrow(page: Any) -> None:
    def back() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="light")
    light = back()
    page.emulate_media(color_scheme="dark")
    dark = back()
    assert light != dark
    at(page, "theme").click()
    assert back() == light
    at(page, "theme").click()
    page.emulate_media(color_scheme="light")
    assert back() == dark
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert at(page, "new").is_hidden()
    page.get_by_label("Conversations", exact=True).and_(page.locator("button")).click()
    at(page, "new").wait_for()
    page.keyboard.press("Escape")
    say(page, SUM)


def test_a_key_is_asked_for(browser: Any, demo: LLM) -> None:
    with serving(demo, api_key="secret") as guarded:
        page = browser.new_page()
        page.once("dialog", lambda dialog: dialog.accept("secret"))
        page.goto(guarded.url)
        at(page, "model").filter(has_text="demo").wait_for()
        say(page, SUM)
        page.close()


def test_a_browser_that_keeps_nothing_still_talks(browser: Any, served: Served) -> None:
    page = browser.new_page()
    page.add_init_script(
        "Storage.prototype.setItem = indexedDB.open = () => { throw new DOMException('full'); }"
    )
    page.goto(served.url)
    say(page, SUM)
    assert "does not keep the conversations" in at(page, "error").inner_text()
    page.close()
