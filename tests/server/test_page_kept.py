"""The page loses nothing: tabs, reloads, edits and stops, in any order. pytest -m browser."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.server.browsing import at, complete, pages, reload, say, send, shows, stored
from tests.server.fake_chat import FakeChat

pytestmark = pytest.mark.browser
_TITLE = "Write a title for this conversation, of at most six words. Answer with the title alone."
_LONG = "".join(f"{number} " for number in range(2000))

# Keeps the database busy until `released`.
_KEEP_BUSY = """() => new Promise((resolve) => {
    const asked = indexedDB.open("qwen3-mlx");
    asked.onsuccess = () => {
        const begun = asked.result.transaction("conversations", "readwrite");
        const table = begun.objectStore("conversations");
        const again = () => {
            if (window.released) asked.result.close();
            else table.get("").onsuccess = again;
        };
        again();
        resolve();
    };
})"""


@pytest.fixture
def chat(server: FakeChat) -> FakeChat:
    """The same, with a slow reply to "long"."""
    server.replies, server.thoughts = {"long": _LONG}, {}
    server.delay, server.hold = 0.005, 0.0
    server.requests.clear()
    return server


@pytest.fixture
def tabs(browser: Any, chat: FakeChat) -> Iterator[list[Any]]:
    """Two tabs of the page."""
    with pages(browser, chat.url, 2) as opened:
        yield opened


def _texts(page: Any) -> dict[str, list[str]]:
    """Return the stored texts of each conversation, in the order in which they were made."""
    made = {}
    for one in stored(page):
        nodes = sorted(one["nodes"].values(), key=lambda node: node["made"])
        made[one["name"]] = [node["content"] for node in nodes]
    return made


def _seen(page: Any, characters: int) -> int:
    """Wait until so much of the last reply is seen; return how much is."""
    page.wait_for_function(
        "(least) => [...document.querySelectorAll('.answer')].at(-1)?.innerText.length > least",
        arg=characters,
    )
    return len(at(page, "answer").last.inner_text())


def test_tabs_see_each_others_changes(tabs: list[Any]) -> None:
    one, other = tabs
    say(one, "in tab one")
    at(other, "conversation").filter(has_text="in tab one").wait_for()
    say(other, "in tab two")
    at(one, "conversation").filter(has_text="in tab two").wait_for()
    reload(one)
    assert sorted(at(one, "conversation").all_inner_texts()) == ["in tab one", "in tab two"]
    at(one, "conversation").filter(has_text="in tab one").click()
    at(other, "conversation").filter(has_text="in tab one").click()
    say(other, "a second question", 2)
    complete(one, 2)
    for page in tabs:
        shows(page, "in tab one", "a second question")
    other.once("dialog", lambda dialog: dialog.accept())
    other.get_by_label("Delete in tab one").click()
    at(one, "message-user").filter(has_text="in tab two").wait_for()


def test_a_reload_keeps_the_partial_answer_and_goes_on(tabs: list[Any], chat: FakeChat) -> None:
    page, _ = tabs
    chat.delay = 0.7  # of two pieces the page saves the first when it comes
    send(page, "long")
    seen = _seen(page, 40)
    reload(page)
    assert len(at(page, "answer").inner_text()) >= seen
    chat.delay = 0
    at(page, "go-on").click()
    complete(page, 1)
    assert _texts(page)["long"] == ["long", _LONG]
    assert (
        chat.requests[-1]["messages"][-1]["content"]
        == _LONG[: len(chat.requests[-1]["messages"][-1]["content"])]
    )
    assert at(page, "go-on").count() == 0


def test_a_reload_while_the_prompt_is_read_leaves_no_empty_reply(
    tabs: list[Any], chat: FakeChat
) -> None:
    page, _ = tabs
    chat.hold = 60
    send(page, "wait")
    page.get_by_role("progressbar").wait_for()
    reload(page)
    shows(page, "wait")
    assert at(page, "message-assistant").count() == 0
    chat.hold = 0
    at(page, "reply").click()
    complete(page, 1)
    say(page, "again", 2)
    sent = [(one["role"], one["content"]) for one in chat.requests[-1]["messages"]]
    assert sent == [("user", "wait"), ("assistant", "Reply to wait"), ("user", "again")]


def test_a_tab_that_crashes_has_saved_what_came_a_second_ago(
    tabs: list[Any], chat: FakeChat
) -> None:
    page, other = tabs
    send(page, "long")
    at(other, "conversation").filter(has_text="long").click()
    _seen(other, 300)
    assert at(other, "message-assistant").filter(has_text="Another tab is writing").count() == 1
    seen = _seen(page, 1000)
    with suppress(Exception):  # that it has crashed
        page.goto("chrome://crash")
    at(other, "go-on").wait_for()
    assert len(_texts(other)["long"][1]) > seen - 800


def test_an_edit_while_a_reply_runs_is_sent(tabs: list[Any], chat: FakeChat) -> None:
    page, _ = tabs
    say(page, "one")
    send(page, "long")
    _seen(page, 100)
    at(page, "edit").first.click()
    page.locator(".message.user textarea").fill("edited")
    page.keyboard.press("Enter")
    complete(page, 1)
    reload(page)
    shows(page, "edited")
    assert at(page, "answer").all_inner_texts() == ["Reply to edited"]
    at(page, "previous").click()
    shows(page, "one", "long")


def test_another_try_while_the_next_prompt_is_read(tabs: list[Any], chat: FakeChat) -> None:
    page, _ = tabs
    say(page, "one")
    chat.hold = 60
    send(page, "two")
    page.get_by_role("progressbar").wait_for()
    chat.hold = 0
    at(page, "retry").first.click()
    complete(page, 1)
    reload(page)
    shows(page, "one")
    assert at(page, "version").inner_text() == "2/2"
    at(page, "previous").click()
    shows(page, "one", "two")


def test_a_reply_goes_on_while_another_conversation_is_open(
    tabs: list[Any], chat: FakeChat
) -> None:
    page, _ = tabs
    say(page, "one")
    at(page, "new").click()
    chat.delay = 0.1
    send(page, "long")
    _seen(page, 20)
    at(page, "conversation").filter(has_text="one").click()
    say(page, "meanwhile", 2)
    at(page, "conversation").filter(has_text="long").click()
    assert at(page, "stop").is_visible()
    chat.delay = 0
    at(page, "conversation").filter(has_text="long").click()
    complete(page, 1)
    assert _texts(page)["long"] == ["long", _LONG]


def test_stop_keeps_what_came_and_the_thinking_can_be_closed(
    tabs: list[Any], chat: FakeChat
) -> None:
    page, _ = tabs
    chat.thoughts["think"] = "hm " * 5000
    send(page, "think")
    at(page, "answer-now").click()
    complete(page, 1)
    last = chat.requests[-1]
    assert last["thinking_budget"] == 0 and last["continue_final_message"] is True
    assert last["messages"][-1]["reasoning_content"].startswith("hm ")
    assert at(page, "answer").inner_text() == "Reply to think"
    send(page, "long")
    _seen(page, 100)
    page.keyboard.press("Escape")
    at(page, "go-on").wait_for()
    assert at(page, "send").is_visible()


def test_old_conversations_move_once(browser: Any, chat: FakeChat) -> None:
    old = [
        {
            "id": "b",
            "name": "newer",
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "", "live": True},
            ],
        },
        {
            "id": "a",
            "name": "older",
            "messages": [
                {"role": "user", "content": "sum"},
                {"role": "assistant", "content": "3", "reasoning_content": "1 + 2", "stats": "s"},
            ],
        },
    ]
    with pages(browser, chat.url) as (page,):
        page.evaluate("(old) => localStorage.setItem('qwen3-conversations', old)", json.dumps(old))
        reload(page)
        page.wait_for_function("() => localStorage.getItem('qwen3-conversations') === null")
        assert at(page, "conversation").all_inner_texts() == ["newer", "older"]
        shows(page, "hi")
        assert at(page, "message-assistant").count() == 0
        at(page, "conversation").nth(1).click()
        assert at(page, "answer").inner_text() == "3"
        reload(page)
        assert at(page, "conversation").all_inner_texts() == ["newer", "older"]


def test_export_import_search_and_titles(browser: Any, chat: FakeChat, tmp_path: Path) -> None:
    with pages(browser, chat.url) as (page,):
        at(page, "settings").click()
        at(page, "system").fill("Be brief.")
        at(page, "temperature").fill("0.3")
        say(page, "apples")
        at(page, "new").click()
        at(page, "system").fill("")
        say(page, "pears")
        at(page, "search").fill("REPLY TO APP")
        assert at(page, "conversation").all_inner_texts() == ["apples"]
        at(page, "search").fill("plums")
        page.get_by_text("Nothing found.").wait_for()
        at(page, "search").fill("reply to app")
        at(page, "conversation").click()
        assert page.get_by_text("Nothing found.").is_hidden()
        assert at(page, "system").input_value() == "Be brief."
        chat.replies[_TITLE] = '"Fruit and more"\n'
        at(page, "search").fill("")
        at(page, "suggest").click()
        at(page, "conversation").filter(has_text="Fruit and more").wait_for()
        with page.expect_download() as file:
            page.get_by_text("Export all").click()
        file.value.save_as(tmp_path / "all.json")
        with page.expect_download() as file:
            page.get_by_label("Save this conversation as a file").click()
        file.value.save_as(tmp_path / "one.json")
    (tmp_path / "bad.json").write_text('{"format": "else"}')
    with pages(browser, chat.url) as (page,):
        at(page, "import-file").set_input_files(tmp_path / "all.json")
        at(page, "conversation").nth(1).wait_for()
        assert sorted(at(page, "conversation").all_inner_texts()) == ["Fruit and more", "pears"]
        at(page, "conversation").filter(has_text="Fruit").click()
        shows(page, "apples")
        assert at(page, "temperature").input_value() == "0.3"
        at(page, "import-file").set_input_files(tmp_path / "all.json")
        at(page, "error").filter(
            has_text="all.json: 2 of 2 conversations are here already"
        ).wait_for()
        assert at(page, "conversation").count() == 2
        at(page, "import-file").set_input_files(tmp_path / "bad.json")
        at(page, "error").filter(has_text="bad.json cannot be imported").wait_for()


def test_a_reply_without_text_is_no_end_of_the_stored_path(tabs: list[Any], chat: FakeChat) -> None:
    page, other = tabs
    say(page, "one")
    at(other, "conversation").click()
    chat.hold = 60
    at(page, "edit").click()
    page.locator(".message.user textarea").fill("two")
    page.keyboard.press("Enter")
    page.get_by_role("progressbar").wait_for()
    at(page, "previous").click()
    for each in tabs:
        shows(each, "one")
    at(page, "next").click()
    for each in tabs:
        shows(each, "two")
    reload(page)
    shows(page, "two")


def test_a_try_that_does_not_come_leaves_the_earlier_reply(tabs: list[Any], chat: FakeChat) -> None:
    page, _ = tabs
    say(page, "one")
    say(page, "two", 2)
    chat.hold = 60
    at(page, "retry").first.click()
    page.get_by_role("progressbar").wait_for()
    shows(page, "one")
    page.keyboard.press("Escape")
    shows(page, "one", "two")
    reload(page)
    shows(page, "one", "two")
    assert at(page, "answer").all_inner_texts() == ["Reply to one", "Reply to two"]


def test_what_two_tabs_say_at_once_can_all_be_reached(tabs: list[Any], chat: FakeChat) -> None:
    page, other = tabs
    chat.hold = 3
    send(page, "one")
    at(other, "conversation").click()
    shows(other, "one")
    chat.hold = 0
    say(other, "two")
    shows(page, "one", "two")
    at(other, "version").filter(has_text="1/2").or_(
        at(other, "version").filter(has_text="2/2")
    ).wait_for()
    at(other, "previous").or_(at(other, "next")).and_(other.locator(":enabled")).click()
    for each in tabs:
        shows(each, "one")
        assert at(each, "answer").all_inner_texts() == ["Reply to one"]


def test_a_reply_that_pauses_is_still_its_tabs(tabs: list[Any], chat: FakeChat) -> None:
    page, other = tabs
    send(page, "long")
    at(other, "conversation").click()
    _seen(other, 300)
    chat.delay = 12
    other.wait_for_timeout(2000)  # all that has come is shown
    seen = _seen(page, 0)
    other.wait_for_timeout(6500)
    assert _seen(page, 0) == seen
    assert at(other, "message-assistant").filter(has_text="Another tab is writing").count() == 1
    other.add_init_script(
        """new MutationObserver(() => {
            window.offered ||= Boolean(document.querySelector("[data-testid=go-on]"));
        }).observe(document, {childList: true, subtree: true});"""
    )
    reload(other)
    _seen(other, 300)
    assert at(other, "message-assistant").filter(has_text="Another tab is writing").count() == 1
    assert not other.evaluate("window.offered")


def test_a_reply_ends_when_another_tab_deletes_its_conversation(
    tabs: list[Any], chat: FakeChat
) -> None:
    page, other = tabs
    send(page, "long")
    _seen(page, 100)
    at(other, "conversation").wait_for()
    other.once("dialog", lambda dialog: dialog.accept())
    with page.expect_event("requestfailed"):
        other.get_by_label("Delete long").click()
    for each in tabs:
        each.locator(".empty").wait_for()
    reload(page)
    page.locator(".empty").wait_for()


def test_a_conversation_that_is_not_stored_stays(tabs: list[Any], chat: FakeChat) -> None:
    page, _ = tabs
    say(page, "kept")
    at(page, "new").click()
    full = "IDBObjectStore.prototype.put = function () { this.transaction.abort(); };"
    page.evaluate(f"() => {{ {full} }}")
    say(page, "one")
    at(page, "error").filter(has_text="does not keep the conversations").wait_for()
    say(page, "two", 2)
    shows(page, "one", "two")
    assert at(page, "answer").all_inner_texts() == ["Reply to one", "Reply to two"]


def test_storage_that_is_cleared_meanwhile_is_told(tabs: list[Any], chat: FakeChat) -> None:
    page, _ = tabs
    say(page, "one")
    cleared = {"origin": chat.url, "storageTypes": "indexeddb"}
    page.context.new_cdp_session(page).send("Storage.clearDataForOrigin", cleared)
    at(page, "error").filter(has_text="it has been cleared").wait_for()
    say(page, "two", 2)
    shows(page, "one", "two")


def test_messages_that_were_not_stored_come_in_their_order(tabs: list[Any], chat: FakeChat) -> None:
    page, other = tabs
    say(page, "one")
    at(other, "conversation").wait_for()
    other.evaluate(_KEEP_BUSY)
    chat.hold = 60
    said = ["one", *(f"message {number}" for number in range(5))]
    for words in said[1:]:
        send(page, words)
        page.keyboard.press("Escape")
        at(page, "send").wait_for()
    shows(page, *said)
    page.reload()
    other.evaluate("window.released = true")
    shows(page, *said)
    assert _texts(page)["one"] == ["one", "Reply to one", *said[1:]]


def test_a_message_and_its_reply_that_were_not_stored_come_back(
    tabs: list[Any], chat: FakeChat
) -> None:
    page, other = tabs
    other.evaluate(_KEEP_BUSY)
    page.evaluate("() => { const now = Date.now(); Date.now = () => now; }")  # all in a millisecond
    chat.delay = 0.3
    asked = [f"long {number}" for number in range(5)]
    chat.replies |= dict.fromkeys(asked, _LONG)
    for words in asked:
        at(page, "new").click()
        send(page, words)
        _seen(page, 5)
    page.reload()
    other.evaluate("window.released = true")
    at(page, "conversation").nth(4).wait_for()
    for words in asked:
        at(page, "conversation").filter(has_text=words).click()
        shows(page, words)
        assert _seen(page, 5)
