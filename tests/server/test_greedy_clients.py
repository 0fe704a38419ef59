"""The cost of a greedy client to others: a few requests, or a few bytes, that would take long."""

import json
import logging
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest
from pydantic import ValidationError

from qwen3_mlx import LLM, Finish
from qwen3_mlx.api.llm import LLM as Llm
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai.schema import ChatRequest
from qwen3_mlx.server.request_body import parse_body
from qwen3_mlx.text import grammar_trial
from qwen3_mlx.text.fair_queue import LOCAL_CALLER, Caller, FairQueue
from qwen3_mlx.text.stop_strings import StopStrings
from qwen3_mlx.text.tool_schema import Kinds
from tests.server.harness import submit_slowly, until
from tests.server.serving import Served, serving

_MB = 1 << 20


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo, that takes bodies of 1 MB."""
    with serving(demo, max_body=_MB) as running:
        yield running


# --- bodies -------------------------------------------------------------------------------------


def held_back(served: Served, size: int) -> socket.socket:
    """Send nearly all of a body, and no more."""
    url = urlparse(served.url)
    client = socket.create_connection((url.hostname, url.port), timeout=60)
    head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
    client.sendall(head.encode() + b" " * (size - 1))
    return client


def large(served: Served, client: str = "127.0.0.1") -> httpx.Response:
    """Ask something in half a megabyte."""
    messages = [{"role": "user", "content": "Hi"}]
    body = {"messages": messages, "max_tokens": 1, "unknown": "x" * (_MB // 2)}
    return served.post("/v1/chat/completions", body, **{"x-forwarded-for": client})


def fill(served: Served, stack: ExitStack) -> None:
    """Hold back bodies until there is room for no more."""

    def full() -> bool:
        stack.enter_context(held_back(served, _MB))
        return large(served).status_code == 503

    until(full)


def test_large_bodies_have_room_together_and_small_ones_always(served: Served) -> None:
    with ExitStack() as stack:
        fill(served, stack)
        refused = large(served)
        assert "large requests have" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "5"
        assert served.chat("Hi", max_tokens=1).status_code == 200
    until(lambda: large(served).status_code == 200)


def test_one_client_leaves_room_for_the_large_bodies_of_another(demo: LLM) -> None:
    with serving(demo, trusted_proxies=("127.0.0.1",), max_body=_MB) as served:
        with ExitStack() as stack:
            fill(served, stack)
            assert large(served, "203.0.113.7").status_code == 200


# --- turns --------------------------------------------------------------------------------------


class _Client(Caller):
    def __init__(self, client: str) -> None:
        self.client = client


def test_a_client_with_fewer_turns_is_next() -> None:
    turns, order = FairQueue(2), list[str]()
    first, second = _Client("greedy"), _Client("greedy")
    turns.acquire(first)
    turns.acquire(second)
    threads = []
    for number, name in enumerate(["greedy"] * 5 + ["other"]):

        def wait(name: str = name) -> None:
            caller = _Client(name)
            turns.acquire(caller)
            order.append(name)
            turns.release(caller)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
        until(lambda number=number: len(turns._waiting) == number + 1)  # type: ignore[misc]
    turns.release(first)
    for thread in threads:
        thread.join(60)
    assert order == ["other"] + ["greedy"] * 5
    turns.release(second)
    assert not turns._turns_of and not turns._waiting


# --- several replies to a prompt ----------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_prompt_is_prepared_once_for_all_replies(
    served: Served, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = list[str]()
    for name in ("prepare", "prepare_text"):
        real = getattr(Llm, name)

        def counted(*given: Any, real: Any = real, **options: Any) -> Any:
            prepared.append(real.__name__)
            return real(*given, **options)

        monkeypatch.setattr(Llm, name, counted)
    messages = [{"role": "user", "content": "Name a number"}]
    said = {"messages": messages} if "chat" in path else {"prompt": "Once"}
    body = {**said, "n": 3, "seed": 7, "max_tokens": 6, "temperature": 1.5}
    together = served.post(path, body).json()["choices"]
    assert len(prepared) == 1
    alone = [
        served.post(path, {**body, "n": 1, "seed": 7 + number}).json()["choices"][0]
        for number in range(3)
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.get("message", one.get("text")) == other.get("message", other.get("text"))


def test_no_grammar_is_made_for_a_prompt_that_does_not_fit(
    demo: LLM, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial.TrialCompiler, "compile", lambda *_: pytest.fail("compiled"))
    form = {"structured_outputs": {"regex": "not yet seen"}}
    words = "hello " * 9000
    words = words[: len(words) * 10_000 // len(demo.tokenizer.encode(words))]  # which are counted
    large = {"type": "function", "function": {"name": "f", "description": words}}
    response = served.chat("Hi", max_tokens=4, tools=[large], **form)
    assert "context window" in response.json()["error"]["message"]


def test_a_place_is_given_back_where_a_reply_ends_before_it_is_counted(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(demo) as served:
        ended = submit_slowly(monkeypatch, Finish)
        url = urlparse(served.url)
        body = b'{"prompt":"x","max_tokens":1}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        with socket.create_connection((url.hostname, url.port)) as client:
            client.sendall(head % len(body) + body)
            assert ended.wait(60)
        until(lambda: served.get("/health").json()["active"] == 0)


# --- what a text costs --------------------------------------------------------------------------


def _first(strings: list[str], text: str) -> tuple[str, str | None]:
    """Return what is shown of a text, and the string that ends it, the plain way."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in strings if text[:end].endswith(stop)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("seed", range(300))
def test_stop_strings_are_found_however_the_text_is_cut(seed: int) -> None:
    draw = random.Random(seed)
    strings = ["".join(draw.choices("ab", k=draw.randint(1, 7))) for _ in range(draw.randint(1, 4))]
    text = "".join(draw.choices("aabbc", k=draw.randint(0, 24)))
    found, shown, place = StopStrings(strings), "", 0
    while place < len(text) and found.found is None:
        size = draw.randint(1, 5)
        shown += found.add(text[place : place + size])
        place += size
    if found.found is None:
        shown += found.flush()
    assert (shown, found.found) == _first(strings, text)


def test_a_long_text_that_is_held_back_costs_nothing_more() -> None:
    """The engine does this in its step, for which all replies wait."""
    found = StopStrings(["1 " * 100_000, *(f"q{n}" * 50_000 for n in range(63))])
    found.add("1 " * 10_000)
    began = time.thread_time()
    for _ in range(50):
        assert found.add("1 ") == ""
    assert time.thread_time() - began < 0.5  # 20 s where each beginning is compared


def test_what_a_reference_says_is_gathered_once_for_all_parameters() -> None:
    looked = Counter[str]()

    class Watched(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            looked[key] += key == "anyOf"
            return super().get(key, default)

    wide = {"anyOf": [Watched(type="integer") for _ in range(1900)]}
    kinds = Kinds({"$defs": {"wide": wide}})
    for _ in range(100):
        assert kinds.of({"$ref": "#/$defs/wide"}) == {"integer"}
    assert looked["anyOf"] <= 1900


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"logit_bias": {str(n): "x" for n in range(10_001)}},
            "logit_bias: at most 10,000 tokens can have a bias, not 10,001",
        ),
        ({"structured_outputs": {"choice": [0] * 10_000}}, "structured_outputs.choice: Input"),
    ],
)
def test_a_form_or_a_bias_that_is_wrong_throughout_is_refused_at_once(
    fields: dict[str, Any], complaint: str
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    with pytest.raises(ApiError, match=re.escape(complaint)) as caught:
        parse_body(json.dumps(body).encode(), ChatRequest, 8192)
    wrong = caught.value.__cause__
    assert isinstance(wrong, ValidationError) and wrong.error_count() == 1  # each takes its time


# --- the process that tries grammars ------------------------------------------------------------


def test_a_trial_that_is_killed_from_outside_is_made_again() -> None:
    helper = grammar_trial._TrialProcess()
    assert helper.check('start: "a"', 5, LOCAL_CALLER) == ""
    assert helper._process
    helper._process.kill()  # it may be found dead before it is asked, or later
    assert helper.check('start: "b"', 5, LOCAL_CALLER) == ""
    helper._end()


def test_what_kills_each_trial_refuses_the_request_and_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    real = grammar_trial._answer

    def killed(connection: socket.socket, message: bytes, caller: Caller) -> bytes:
        for lane in lanes:
            for helper in all_of[lane]:
                if helper._process:
                    helper._process.kill()
        return b""

    lanes = [grammar_trial._Lane(0.5, 1)]
    all_of = {lane: list(lane._free.queue) for lane in lanes}
    monkeypatch.setattr(grammar_trial, "_lanes", lambda: lanes)
    monkeypatch.setattr(grammar_trial, "_answer", killed)
    form = {"structured_outputs": {"regex": "[0-9]{3}"}, "max_tokens": 9, "enable_thinking": False}
    response = served.chat("Hi", **form)
    assert "keeps failing; try again" in response.json()["error"]["message"]
    monkeypatch.setattr(grammar_trial, "_answer", real)
    assert served.chat("Hi", **form).status_code == 200
    for lane in lanes:
        for helper in all_of[lane]:
            helper._end()


# --- the log ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"logit_bias": {"what was said, again and again, " * 3: 1}}),
        ("/v1/messages", {"tools": [{"name": "what was said", "type": "what was said"}]}),
        ("/api/chat", {"model": "it's what was said " * 50}),
        ("/" + "%00" * 20_000, {}),
    ],
)
def test_a_line_of_the_log_is_short_and_cites_nothing(
    served: Served, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    with caplog.at_level(logging.INFO, "qwen3_mlx.server.access"):
        messages = [{"role": "user", "content": "Hi"}]
        assert served.post(path, {"messages": messages, "max_tokens": 1, **body}).is_error
        until(lambda: any(record.name.endswith("access") for record in caplog.records))
    (line,) = [one.message for one in caplog.records if one.name.endswith("access")]
    assert "what was said" not in line and "\n" not in line and len(line) < 2000
