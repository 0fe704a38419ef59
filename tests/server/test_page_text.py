"""The page shows formulas, tables, code, and far too much text. pytest -m browser."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.browsing import at, pages, say
from tests.server.fake_chat import FakeChat

pytestmark = pytest.mark.browser
_FORMULAS = r"""The quadratic formula: \( x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a} \).

As follows:
\[
\int_0^1 x_1^2 \, dx_1
= \frac{1}{3}
\]

1. So $a_1 + b_1 = c_1$ and $$\sum_{i=1}^{n} i = \frac{n(n+1)}{2}$$.
2. It costs $5, and $6 for two.

Therefore \( \boxed{42} \), \(\mathbf{x} \pmb{y} {}_a^b X\), and \(\wrong{\), and `\(code\)`."""
_TABLE = """| Name | Value | Note |
|:-----|------:|:----:|
| Nameless | 12345678 | centred and so long that it does not fit in a narrow window at all |
"""
_WIDE_TABLE = f"\n|{' wide |' * 20}\n|{'---|' * 20}\n"
_RESPONSIVE = 1.5  # seconds that a click may take while a text is rendered, on a busy machine


@pytest.fixture
def page(browser: Any, server: FakeChat) -> Iterator[Any]:
    """The page."""
    with pages(browser, server.url) as opened:
        yield opened[0]


def _show(page: Any, server: FakeChat, text: str, replies: int = 1) -> Any:
    """Let the model write a text; return where it is shown."""
    server.replies["show"] = text
    say(page, "show", replies)
    return at(page, "answer").last


def test_formulas_are_formulas_and_prices_are_not(page: Any, server: FakeChat) -> None:
    answer = _show(page, server, _FORMULAS)
    assert answer.locator("math").count() == 6
    assert r"\wrong" in answer.locator(".temml-error").inner_text()
    assert answer.locator("mfrac").count() == 3
    assert answer.locator("math.tml-display").count() == 2
    assert "$5, and $6 for two" in answer.inner_text()
    assert answer.locator("code").inner_text() == r"\(code\)"
    assert answer.locator("[style]").count() == answer.locator("[data-style]").count() > 0


def test_script_letters_and_primes_have_the_font_of_formulas(page: Any, server: FakeChat) -> None:
    answer = _show(page, server, r"\( \mathscr{L}\{f'\} \)")  # Temml has a font of its own for them
    font = "node => getComputedStyle(node).fontFamily"
    wanted = answer.locator("math").evaluate(font)
    assert answer.locator("mi").first.text_content() == "ℒ"
    for name in ("mi.mathscr", "mo.tml-prime"):
        assert answer.locator(name).evaluate(font) == wanted


def test_tables_align_and_break_no_words(page: Any, server: FakeChat) -> None:
    page.set_viewport_size({"width": 390, "height": 640})
    answer = _show(page, server, _TABLE + _WIDE_TABLE)
    aligned = "cells => cells.map((cell) => getComputedStyle(cell).textAlign)"
    assert answer.locator("td").evaluate_all(aligned) == ["left", "right", "center"]
    lines = "cell => cell.getClientRects().length && cell.offsetHeight"
    first, second, _ = (answer.locator("td").nth(index).evaluate(lines) for index in range(3))
    assert first == second
    heights = answer.locator("td").first.evaluate(
        "cell => { const range = document.createRange(); range.selectNodeContents(cell); "
        "return range.getClientRects().length; }"
    )
    assert heights == 1
    fits = "node => node.scrollWidth <= node.clientWidth"
    assert page.locator("#messages").evaluate(fits)


def test_code_is_highlighted_and_copied_over_plain_http(page: Any, server: FakeChat) -> None:
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    answer = _show(page, server, "```python\nprint('a &amp; b')  # why\n```\n\nA &amp; B &lt;")
    assert answer.locator(".hljs-comment").inner_text() == "# why"
    assert "A & B <" in answer.inner_text()
    answer.get_by_text("Copy").click()
    answer.get_by_text("Copied").wait_for()
    at(page, "prompt").focus()
    page.keyboard.press("Control+V")
    assert at(page, "prompt").input_value() == "print('a &amp; b')  # why"


@pytest.mark.parametrize(
    "text",
    [
        *("> " * 8000 + "deep", ">" * 8000 + " deep", "- " * 8000, "[" * 8000, "*a " * 8000),
        *("\\(" * 8000, "$x" * 8000 + "$", "$$\n" * 3000, "\\[ " + "{" * 8000, "|" * 8000),
        *("<div>" * 8000, "`" * 8000, "```" + "\n" * 8000, "&lt;" * 8000, "\\sqrt{" * 8000),
        "$" + "\\sqrt{" * 600 + "}" * 600 + "$",
        "| a " * 2000 + "|\n" + "|---" * 2000 + "|\n" + "| b " * 2000 + "|\n",
    ],
    ids=lambda text: text[:8].strip() + str(len(text)),
)
def test_nasty_texts_are_shown_in_time(page: Any, server: FakeChat, text: str) -> None:
    began = time.monotonic()
    _show(page, server, text)
    at(page, "new").click()
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "text",
    ["A word and *another*. " * 20 + "\n\n", "word ", "x", "```\ncode\n```\n\n", "- item\n"],
    ids=["paragraphs", "one paragraph", "one word", "code", "list"],
)
def test_a_megabyte_keeps_the_page_responsive(page: Any, server: FakeChat, text: str) -> None:
    server.replies["show"] = (text * (1_000_000 // len(text) + 1))[:1_000_000]
    server.piece, server.delay = 20_000, 0.02
    page.evaluate(
        """() => { window.longest = 0; let last = performance.now();
        setInterval(() => { const now = performance.now();
            window.longest = Math.max(window.longest, now - last); last = now; }, 20); }"""
    )
    try:
        say(page, "show")
        page.wait_for_timeout(3000)  # the last slices
    finally:
        server.piece, server.delay = 12, 0
    assert page.evaluate("window.longest") / 1000 < _RESPONSIVE


def test_a_megabyte_is_sent(page: Any, server: FakeChat) -> None:
    text = "y" * 1_000_000
    server.replies[text] = "ok"
    at(page, "prompt").fill(text)
    began = time.monotonic()
    at(page, "prompt").press("Enter")
    page.get_by_text("Show all 1,000,000 characters").wait_for()
    assert time.monotonic() - began < 5
