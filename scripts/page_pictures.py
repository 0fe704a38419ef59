"""Takes the screenshots of the server's chat page in docs/, with the demo model and Chromium.

Usage: python scripts/page_pictures.py   (needs the extra `browser`, and Chromium on the PATH)
"""

import asyncio
import shutil
import socket
from threading import Event, Thread

from playwright.sync_api import Page, sync_playwright

from qwen3_mlx import load
from qwen3_mlx.server.run import Server
from qwen3_mlx.server.settings import Settings


def main() -> None:
    """Start the server and take the screenshots."""
    listener, ready = socket.create_server(("127.0.0.1", 0)), Event()
    with load() as llm, sync_playwright() as playwright:
        server = Server(llm, Settings(model="qwen3-demo"), ready.set)
        thread = Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        ready.wait()
        try:
            chromium = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = chromium.new_page(viewport={"width": 1080, "height": 640}, color_scheme="light")
            page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}")
            take_pictures(page)
        finally:
            server.should_exit = True
            thread.join()


def take_pictures(page: Page) -> None:
    """Hold a short conversation; take screenshots in light and dark mode and in phone size."""
    for count, words in enumerate(("What is 123 + 456?", "Reverse the list: 4 8 1")):
        page.get_by_test_id("prompt").fill(words)
        page.keyboard.press("Enter")
        page.get_by_test_id("stats").nth(count).filter(has_text="tokens/s").wait_for()
    page.get_by_test_id("thinking").first.locator("summary").click()
    page.screenshot(path="docs/page.png")
    page.emulate_media(color_scheme="dark")
    page.get_by_test_id("settings").click()
    page.screenshot(path="docs/page-dark.png")
    page.get_by_test_id("settings").click()
    page.set_viewport_size({"width": 390, "height": 640})
    page.screenshot(path="docs/page-narrow.png")


if __name__ == "__main__":
    main()
