"""The page for everybody: roles, contrast, keyboard, a telephone. pytest -m browser."""

from importlib import import_module
from typing import Any

import pytest

from tests.server.browsing import at, complete, pages, say, shows
from tests.server.fake_chat import FakeChat
from tests.server.serving import Served

pytestmark = pytest.mark.browser
_ANSWER = r"""# Title

A [link](https://example.com/) and `code`, \(x^2\).

- [x] done

| a | b |
|---|--:|
| 1 | 2 |

```python
def f(x: int) -> str:  # why
    return "text" + str(1.5)
```

> quoted
"""


@pytest.fixture(scope="module")
def server(server: FakeChat) -> FakeChat:
    """The server, with a scripted reply."""
    server.replies["show"], server.thoughts["show"] = _ANSWER, "Let me see."
    return server


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1080])
def test_axe_finds_no_violation(browser: Any, server: FakeChat, scheme: str, width: int) -> None:
    axe = import_module("axe_playwright_python.sync_playwright").Axe()
    size = {"width": width, "height": 800}
    with pages(browser, server.url, color_scheme=scheme, viewport=size) as (page,):

        def check() -> None:
            found = axe.run(page).response["violations"]
            assert not [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]

        check()
        say(page, "show")
        at(page, "thinking").locator("summary").click()
        at(page, "retry").click()
        at(page, "version").wait_for()
        complete(page, 1)
        check()
        at(page, "settings").click()
        at(page, "edit").click()
        check()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 390:
            at(page, "settings").click()
            page.locator("#menu").click()
            page.wait_for_timeout(300)
            check()


def test_all_is_reached_by_keyboard(browser: Any, server: FakeChat) -> None:
    with pages(browser, server.url) as (page,):
        say(page, "show")
        page.evaluate("document.activeElement.blur()")
        reached = []
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = "document.activeElement.textContent || document.activeElement.ariaLabel"
            reached.append(page.evaluate(f"({focused} || '').trim()"))
            if reached[-1] == "Retry":
                break
        for name in ("New conversation", "show", "Export all", "Edit", "link", "Copy"):
            assert name in reached, reached
        page.keyboard.press("Enter")  # on "Retry"
        at(page, "version").filter(has_text="2/2").wait_for()
        complete(page, 1)
        at(page, "edit").focus()
        page.keyboard.press("Enter")
        page.keyboard.type("! ")
        page.keyboard.press("Enter")
        complete(page, 1)
        assert at(page, "message-user").locator("textarea").count() == 0
        page.keyboard.press("Control+Shift+O")
        page.keyboard.type("from the keyboard")
        page.keyboard.press("Enter")
        shows(page, "from the keyboard")


def test_a_page_without_a_chat_says_what_is_served(browser: Any, embedder: Served) -> None:
    with pages(browser, embedder.url) as (page,):
        page.get_by_text("This is an embedding model").wait_for()
        assert not at(page, "prompt").is_visible() and not at(page, "settings").is_visible()
