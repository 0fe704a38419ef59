"""Tools of MCP servers on the page, in a browser: pytest -m browser."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from qwen3_mlx import LLM
from qwen3_mlx.mcp import connect
from qwen3_mlx.text.described_tool import DescribedTool
from tests.mcp.harness import by_hand
from tests.server.browsing import at, complete, connected, pages, reload, say, send
from tests.server.harness import PARAMETERS, TOOL, until
from tests.server.serving import Served, serving

pytestmark = pytest.mark.browser
QUESTION, ANSWER = "What is 345 + 678?", "345 + 678 = 1023"


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with a calculator."""
    with connect({"mcpServers": {"sums": by_hand("calculator")}}) as mcp:
        with serving(demo, tools=mcp.tools) as running:
            yield running


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page, newly opened, with a deterministic model."""
    yield from opened(browser, served)


def opened(browser: Any, served: Served) -> Iterator[Any]:
    """Open the page; nothing may go wrong on it unseen."""
    with pages(browser, served.url) as tabs:
        at(tabs[0], "settings").click()
        at(tabs[0], "temperature").fill("0")
        at(tabs[0], "settings").click()
        yield tabs[0]


def slow(began: Callable[[Future[str]], None]) -> DescribedTool:
    """Return a calculator whose calls take until they are stopped."""

    def start(_: dict[str, Any]) -> Future[str]:
        future = Future[str]()
        began(future)
        return future

    return DescribedTool("calculator", "slow", "Calculates.", PARAMETERS, start, start)


def test_a_call_is_made_when_it_is_allowed(page: Any) -> None:
    say(page, QUESTION)
    assert "sums: calculator" in at(page, "tool-call").inner_text()
    assert "345 + 678" in at(page, "tool-call").inner_text()
    at(page, "tool-once").click()
    complete(page, 2)
    assert "→ 1023" in at(page, "tool-call").inner_text()
    assert at(page, "answer").last.inner_text() == ANSWER
    say(page, QUESTION, 3)  # the next one is asked for again
    at(page, "tool-once").wait_for()


def test_a_tool_may_be_allowed_until_the_page_is_loaded_again(page: Any) -> None:
    say(page, QUESTION)
    at(page, "tool-always").click()
    complete(page, 2)
    say(page, QUESTION, 4)
    assert at(page, "answer").last.inner_text() == ANSWER
    reload(page)
    say(page, QUESTION, 5)
    at(page, "tool-once").wait_for()
    reload(page)  # and what waits for an answer waits on
    at(page, "tool-once").click()
    complete(page, 6)
    assert at(page, "answer").last.inner_text() == ANSWER


def test_a_declined_call_is_told_to_the_model(page: Any) -> None:
    say(page, QUESTION)
    at(page, "tool-decline").click()
    complete(page, 2)
    assert "→ Error: the user declined this call" in at(page, "tool-call").inner_text()


def test_served_tools_may_be_left_out(page: Any) -> None:
    at(page, "settings").click()
    assert "sums: calculator" in page.locator("#tool-names").inner_text()
    at(page, "served-tools").select_option("off")
    at(page, "settings").click()
    say(page, QUESTION)
    assert at(page, "tool-call").count() == 0


def test_a_call_is_stopped_and_made_again(browser: Any, demo: LLM) -> None:
    calls: list[Future[str]] = []
    with serving(demo, tools=[slow(calls.append)]) as served:
        for page in opened(browser, served):
            say(page, QUESTION)
            at(page, "tool-once").click()
            at(page, "tool-stop").click()
            at(page, "tool-once").wait_for()
            until(calls[0].cancelled)
            at(page, "tool-once").click()
            at(page, "tool-stop").wait_for()
            at(page, "new").click()  # the result comes while another conversation is shown
            calls[1].set_result("1023")
            until(lambda: served.server.service.active == 0)
            at(page, "conversation").click()
            complete(page, 2)
            assert at(page, "answer").last.inner_text() == ANSWER


def test_a_call_that_cannot_be_made_costs_a_message(page: Any) -> None:
    lost = {"status": 503, "json": {"error": {"message": "it is lost"}}}
    page.route("**/v1/mcp/call", lambda route: route.fulfill(**lost))
    say(page, QUESTION)
    at(page, "tool-once").click()
    at(page, "error").filter(has_text="it is lost").wait_for()
    page.unroute("**/v1/mcp/call")
    at(page, "tool-once").click()
    complete(page, 2)
    assert not at(page, "error").is_visible()


def test_nothing_in_the_arguments_is_hidden(page: Any) -> None:
    shown = page.evaluate(
        """async () => {
            const { callView } = await import("/page/tools.js");
            const written = JSON.stringify({ path: "a\\u202eb\\u200bc\\u2028d\\u{e0041}é" });
            return callView({ id: "1", function: { name: "x", arguments: written } }).textContent;
        }"""
    )
    assert shown == 'x{\n  "path": "a\\u202eb\\u200bc\\u2028d\\udb40\\udc41é"\n}'


def test_two_clicks_are_one_call(browser: Any, demo: LLM) -> None:
    calls: list[Future[str]] = []
    with serving(demo, tools=[slow(calls.append)]) as served:
        for page in opened(browser, served):
            say(page, QUESTION)
            at(page, "tool-once").dblclick()
            at(page, "tool-stop").wait_for()
            send(page, "and now?")
            at(page, "error").filter(has_text="A tool is being called").wait_for()
            assert at(page, "prompt").input_value() == "and now?"
            other = page.context.new_page()
            other.goto(served.url)
            connected(other)
            other.get_by_text("Another tab calls it.").wait_for()
            calls[0].set_result("1023")
            complete(page, 2)
            at(other, "answer").filter(has_text=ANSWER).wait_for()
            assert len(calls) == 1


def test_the_users_own_tool_of_a_name_is_theirs(page: Any) -> None:
    at(page, "settings").click()
    at(page, "tools").fill(json.dumps([TOOL]))
    at(page, "settings").click()
    say(page, QUESTION)
    assert at(page, "tool-once").count() == 0
    at(page, "tool-result").fill("1023")
    at(page, "tool-send").click()
    complete(page, 2)


def test_numbers_are_sent_as_they_were_written(browser: Any, demo: LLM) -> None:
    sent: list[dict[str, Any]] = []

    def start(arguments: dict[str, Any]) -> Future[str]:
        sent.append(arguments)
        future = Future[str]()
        future.set_result("done")
        return future

    tool = DescribedTool("calculator", "exact", "Calculates.", PARAMETERS, start, start)
    with serving(demo, tools=[tool]) as served:
        for page in opened(browser, served):
            shown = page.evaluate(
                """async () => {
                    const { callView } = await import("/page/tools.js");
                    const { callTool } = await import("/page/client.js");
                    const written = '{"n": 1234567890123456789, "x": 1.50, "s": "7 \\\\"8\\\\""}';
                    const call = { id: "1", function: { name: "calculator", arguments: written } };
                    await callTool("calculator", written);
                    return callView(call, undefined, {}).textContent;
                }"""
            )
            assert '"n": 1234567890123456789' in shown and '"x": 1.50' in shown
            assert '"s": "7 \\"8\\""' in shown
            assert sent == [{"n": 1234567890123456789, "x": 1.5, "s": '7 "8"'}]


def test_what_a_file_has_is_checked_before_it_is_kept(page: Any, tmp_path: Path) -> None:
    call = {"id": "c1", "function": {"name": "calculator", "arguments": {"expression": "1 + 2"}}}
    user, asked = {"role": "user", "content": "?"}, {"role": "assistant", "content": None}
    result = {"role": "tool", "tool_call_id": "c1", "content": "3"}
    kept = {"format": "qwen3-mlx conversation", "version": 1}
    cycle = {"a": {**user, "parent": "b", "made": 1}, "b": {**user, "parent": "a", "made": 2}}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"messages": [user, {**asked, "tool_calls": [{}]}]}, "a tool call has no name"),
        ({"messages": [user, {**asked, "tool_calls": "abc"}]}, "is no list"),
        ({"messages": [{**user, "content": 5}]}, "is no text"),
        ({"page": {"name": "", "nodes": cycle, "leaf": "a"}}, "its messages are incomplete"),
    ]
    for number, (content, words) in enumerate(wrong):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({**kept, **content}))
        at(page, "import-file").set_input_files(file)
        at(page, "error").filter(has_text=words).wait_for()
    whole = tmp_path / "whole.json"
    messages = [user, {**asked, "tool_calls": [call]}, result]
    whole.write_text(json.dumps({**kept, "messages": messages}))
    at(page, "import-file").set_input_files(whole)
    at(page, "tool-call").filter(has_text="→ 3").wait_for()
    reload(page)
    assert at(page, "conversation").count() == 1
    at(page, "go-on").click()
    complete(page, 2)
