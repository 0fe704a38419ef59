"""The page reads files that are attached, dropped or pasted. pytest -m browser."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfWriter

from tests.pdf import PICTURE, SONG, make_document, make_pdf
from tests.server.browsing import at, pages, reload, say, send, shows
from tests.server.fake_chat import FakeChat

pytestmark = pytest.mark.browser
_REPORT = make_pdf("A report\non two lines", "and a second page")
_REPORT_TEXT = "A report\non two lines\n\nand a second page"
# A page of 780 lines of 800 characters.
_SMALL_PRINT = b"BT /F1 1 Tf 1 TL 0 790 Td " + b"(%s) Tj T* " % (b"word " * 160) * 780 + b"ET"
# Gives a file to the page as a drop or a paste does.
_GIVE = """([event, name, content]) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name));
    const options = {bubbles: true, cancelable: true};
    const made = event === "drop"
        ? new DragEvent(event, {...options, dataTransfer: data})
        : new ClipboardEvent(event, {...options, clipboardData: data});
    document.querySelector("[data-testid=prompt]").dispatchEvent(made);
}"""


@pytest.fixture
def asked() -> list[str]:
    """The addresses that the page requests."""
    return []


@pytest.fixture
def page(browser: Any, server: FakeChat, asked: list[str]) -> Iterator[Any]:
    """The page; the server has all that it requests."""
    server.requests.clear()
    missing: list[str] = []

    def check(response: Any) -> None:
        if not response.ok:
            missing.append(response.url)

    with pages(browser, server.url) as (opened,):
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("response", check)
        reload(opened)
        yield opened
    assert not missing


def _attach(page: Any, name: str, content: bytes) -> None:
    """Choose a file."""
    kind = "application/octet-stream"
    file = {"name": name, "mimeType": kind, "buffer": content}
    at(page, "attach-file").set_input_files(file)


def _refused(page: Any, text: str) -> None:
    """Wait for an error, which leaves no file attached."""
    at(page, "error").filter(has_text=text).wait_for(timeout=60_000)
    page.locator("#files").wait_for(state="hidden")
    assert at(page, "send").is_enabled()


def _encrypted() -> bytes:
    writer = PdfWriter(io.BytesIO(_REPORT))
    writer.encrypt("a password")
    made = io.BytesIO()
    writer.write(made)
    return made.getvalue()


def test_files_are_sent_with_the_message(page: Any, server: FakeChat) -> None:
    _attach(page, "a.py", b"print('```')\r\n")
    at(page, "file").wait_for()
    at(page, "tokens").filter(has_text="of 8,192 tokens").wait_for()
    _attach(page, "c.bin", b"\x00\xff")
    at(page, "error").filter(has_text="c.bin is not text").wait_for()
    say(page, "what is this?")
    sent = "a.py:\n````\nprint('```')\n````\n\nwhat is this?"
    assert server.requests[-1]["messages"][0]["content"] == sent
    shows(page, "what is this?")
    reload(page)
    page.locator(".file summary").filter(has_text="a.py").wait_for()
    assert at(page, "file").count() == 0


@pytest.mark.parametrize("way", ["attach", "drop", "paste"])
def test_the_text_of_a_pdf_is_sent(page: Any, server: FakeChat, way: str, asked: list[str]) -> None:
    assert not [address for address in asked if "pdf" in address]  # it is not loaded yet
    if way == "attach":
        _attach(page, "report.pdf", _REPORT)
    else:
        page.evaluate(_GIVE, [way, "report.pdf", base64.b64encode(_REPORT).decode()])
    at(page, "file").filter(has_text="report.pdf").wait_for()
    at(page, "tokens").filter(has_text="of 8,192 tokens").wait_for()
    say(page, "sum up")
    sent = f"report.pdf:\n```\n{_REPORT_TEXT}\n```\n\nsum up"
    assert server.requests[-1]["messages"][0]["content"] == sent
    assert [address for address in asked if address.endswith("/page/vendor/pdf.worker.js")]


def test_a_pdf_is_known_by_its_content_and_read_again(page: Any, server: FakeChat) -> None:
    for name in ("one", "two"):
        _attach(page, name, _REPORT)
        at(page, "file").filter(has_text=name).wait_for()
    page.get_by_label("Remove one").click()
    say(page, "sum up")
    sent = server.requests[-1]["messages"][0]["content"]
    assert sent == f"two:\n```\n{_REPORT_TEXT}\n```\n\nsum up"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (_encrypted(), "a.pdf is encrypted: save it without its password"),
        (b"%PDF-1.7 and nothing else", "a.pdf cannot be read as a PDF: "),
        (_REPORT[:150], "a.pdf cannot be read as a PDF: "),
        (b"", "a.pdf cannot be read as a PDF: "),
        (make_document(PICTURE), "a.pdf has no text: its pages may be pictures"),
        (
            make_document(b"BT /F1 12 Tf <4F60597D> Tj ET", font=SONG),
            "a.pdf has an encoding of Chinese, Japanese or Korean text that this page cannot read",
        ),
        (_REPORT.ljust(51 << 20), "a.pdf is too large: a PDF may have 50 MiB"),
        (make_document(*[_SMALL_PRINT] * 14), "a.pdf has too much text: a file may have 8 MiB"),
    ],
    ids=["encrypted", "broken", "cut", "empty", "scanned", "chinese", "large", "long"],
)
def test_a_pdf_that_cannot_be_read_is_one_sentence(
    page: Any, tmp_path: Path, content: bytes, told: str
) -> None:
    (tmp_path / "a.pdf").write_bytes(content)
    at(page, "attach-file").set_input_files(tmp_path / "a.pdf")
    _refused(page, told)
    _attach(page, "report.pdf", _REPORT)
    at(page, "file").filter(has_text="report.pdf").wait_for()


def test_a_browser_without_the_newest_functions_reads_it(page: Any) -> None:
    page.evaluate("() => { delete Math.sumPrecise; delete Map.prototype.getOrInsertComputed; }")
    _attach(page, "a.pdf", _REPORT)
    at(page, "file").filter(has_text="a.pdf").wait_for()


def test_nothing_is_sent_while_a_pdf_is_read(page: Any, server: FakeChat) -> None:
    held: list[Any] = []
    page.route("**/page/vendor/pdf.worker.js", lambda route: held.append(route))
    _attach(page, "a.pdf", _REPORT)
    at(page, "file-being-read").filter(has_text="Reading a.pdf…").wait_for()
    send(page, "too early")
    assert at(page, "send").is_disabled()
    assert at(page, "prompt").input_value() == "too early"
    page.evaluate("() => { Worker.prototype.terminate = () => { window.ended = true; }; }")
    page.get_by_label("Remove a.pdf").click()
    page.wait_for_function("() => window.ended")
    page.locator("#files").wait_for(state="hidden")
    assert at(page, "error").is_hidden()
    page.unroute("**/page/vendor/pdf.worker.js")
    _attach(page, "b.pdf", _REPORT)
    at(page, "file").filter(has_text="b.pdf").wait_for()
    say(page, "now")
    assert server.requests[-1]["messages"][0]["content"].startswith("b.pdf:\n")
    assert len(server.requests) == 1 and held
