"""The page in Chromium, as tests use it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

# What the browser logs when the server refuses a request; the page shows why.
_REFUSED = "Failed to load resource: the server responded with a"
_STORED = """() => new Promise((resolve) => {
    const asked = indexedDB.open("qwen3-mlx");
    asked.onsuccess = () => {
        const all = asked.result.transaction("conversations").objectStore("conversations").getAll();
        all.onsuccess = () => { asked.result.close(); resolve(all.result); };
    };
})"""


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium, without a window."""
    playwright = import_module("playwright.sync_api")
    path = os.environ.get("QWEN3_CHROMIUM") or shutil.which("chromium")
    with playwright.sync_playwright() as library:
        started = library.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def pages(browser: Any, url: str, count: int = 1, **options: Any) -> Iterator[list[Any]]:
    """Open the page in some tabs of one new profile; no error and no other host may be seen."""
    context = browser.new_context(**options)
    trouble: list[str] = []

    def opened() -> Any:
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda line: trouble.append(line.text) if line.type == "error" else None)
        page.on("request", lambda asked: trouble.append(asked.url))
        page.goto(url)
        connected(page)
        return page

    try:
        yield [opened() for _ in range(count)]
    finally:
        context.close()
    fine = (url, "data:", "blob:", _REFUSED)
    assert not [line for line in trouble if not line.startswith(fine)]


def connected(page: Any) -> None:
    """Wait until the page knows the server's model and tools."""
    at(page, "model").filter(has_text="demo").wait_for()


def reload(page: Any) -> None:
    """Load the page again."""
    page.reload()
    connected(page)


def at(page: Any, name: str) -> Any:
    """Find what the page calls by a name."""
    return page.get_by_test_id(name)


def send(page: Any, words: str) -> None:
    """Send a message."""
    at(page, "prompt").fill(words)
    at(page, "prompt").press("Enter")


def say(page: Any, words: str, replies: int = 1) -> None:
    """Send a message, and wait until so many replies are complete."""
    send(page, words)
    complete(page, replies)


def complete(page: Any, replies: int) -> None:
    """Wait for replies."""
    at(page, "stats").nth(replies - 1).filter(has_text="tokens/s").wait_for()


def stored(page: Any) -> list[dict[str, Any]]:
    """Return the conversations that the browser keeps."""
    return list(page.evaluate(_STORED))


def words(page: Any) -> list[str]:
    """Return what the user said in the conversation that is shown."""
    return list(page.locator(".message.user div.words").all_inner_texts())


def shows(page: Any, *expected: str) -> None:
    """Wait until these are the user's words in the conversation that is shown."""
    page.wait_for_function(
        """(expected) => expected === JSON.stringify(
            [...document.querySelectorAll(".message.user div.words")].map((one) => one.innerText)
        )""",
        arg=json.dumps(expected, separators=(",", ":")),
    )
