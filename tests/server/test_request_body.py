"""How requests come in: what a body may cost, what is said of one that cannot be read, long texts.

How long others wait is measured in CPU time of the process, which other programs do not change.
"""

import gc
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.openapi import utils
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_mlx import LLM, ContextError
from qwen3_mlx.api import generation
from qwen3_mlx.server import openapi
from qwen3_mlx.text.splitting import pieces
from qwen3_mlx.text.tokenizer import Tokenizer
from tests.server.harness import endless, message_of, until_idle
from tests.server.serving import Served, serving
from tests.text.harness import TOKENIZER

CHAT, TEXT, MESSAGES, OLLAMA = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/api/chat",
)
COUNT = "/v1/messages/count_tokens"
_LONGEST = 0.3  # CPU seconds that anybody may wait for others
_USER = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo."""
    with serving(demo) as running:
        yield running


def send(served: Served, path: str, content: bytes | str, **headers: str) -> httpx.Response:
    """Send bytes as they are, with no Content-Type unless one is given."""
    return httpx.post(f"{served.url}{path}", content=content, headers=headers, timeout=120)


class Waiting:
    """Measures the most CPU time of the process that passes during something, again and again."""

    def __init__(self, something: Callable[[], object]) -> None:
        self._something, self.longest, self._over = something, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._wait)

    def _wait(self) -> None:
        while not self._over.is_set():
            before = time.process_time()
            self._something()
            self.longest = max(self.longest, time.process_time() - before)

    def __enter__(self) -> "Waiting":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def asking_for_health(served: Served) -> Iterator[Waiting]:
    """Ask for /health all the time."""
    gc.freeze()  # a server has not the million objects of all tests, whose collection takes 0.4 s
    with httpx.Client(base_url=served.url, timeout=120) as client:

        def ask() -> None:
            client.get("/health")
            time.sleep(0.01)

        with Waiting(ask) as waiting:
            yield waiting


# --- what a body may cost -----------------------------------------------------------------------


def turns(count: int) -> list[dict[str, str]]:
    """Return so many messages of a conversation."""
    return [{"role": ("user", "assistant")[n % 2], "content": "hi"} for n in range(count)]


def said(content: Any, **fields: Any) -> bytes:
    """Return the body of a request with one message."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 5, **fields}
    return json.dumps(body).encode()


BODIES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "1M bad messages": (
        CHAT,
        lambda: b'{"messages":[' + b"0," * 999_999 + b"0]}",
        "1,000,001 commas and brackets, and at most 250,000 are read",
    ),
    "100,000 bad messages": (
        CHAT,
        lambda: b'{"messages":[' + b"0," * 99_999 + b"0]}",
        "messages: Input should be an object",
    ),
    "100,000 prompts": (
        TEXT,
        lambda: json.dumps({"n": 32, "prompt": ["a"] * 100_000}).encode(),
        "3,200,000 replies are requested, and at most 64 are possible",
    ),
    "400,000 nulls": (
        TEXT,
        lambda: json.dumps({"prompt": [None] * 400_000}).encode(),
        "400,001 commas",
    ),
    "200,000 nulls": (
        TEXT,
        lambda: json.dumps({"prompt": [None] * 200_000}).encode(),
        "prompt: Input should be",
    ),
    "500,000 unknown fields": (
        CHAT,
        lambda: said("hi", **dict.fromkeys(map(str, range(500_000)), 0)),
        "500,005 commas",
    ),
    "200,000 unknown fields": (
        CHAT,
        lambda: said("hi", **dict.fromkeys(map(str, range(200_000)), 0)),
        "the request has 200,000 fields that are not known, and at most 1,000 are ignored",
    ),
    "100,000 turns": (
        CHAT,
        lambda: json.dumps({"messages": turns(100_000)}).encode(),
        "300,001 commas",
    ),
    "20,000 turns": (
        CHAT,
        lambda: json.dumps({"messages": turns(20_000)}).encode(),
        "tokens or more and the context window is 8,192; shorten the prompt",
    ),
    "20,000 turns counted": (
        COUNT,
        lambda: json.dumps({"messages": turns(20_000)}).encode(),
        "tokens or more and the context window is 8,192",
    ),
    "120,000 parts": (CHAT, lambda: said([{}] * 120_000), "at most 10000 items"),
    "10M objects": (CHAT, lambda: b'{"messages":[' + b"{}," * 9_999_999 + b"{}]}", "20,000,001"),
    "100,000 stops": (
        CHAT,
        lambda: said("hi", stop=["q"] * 100_000),
        "stop: List should have at most 64 items",
    ),
    "100,000 biases": (
        CHAT,
        lambda: said("hi", logit_bias={str(n): None for n in range(100_000)}),
        "logit_bias",
    ),
    "30 MB of words": (CHAT, lambda: said("x " * 15_000_000), "tokens or more"),
    "30 MB, one word, counted": (COUNT, lambda: said("x" * 30_000_000), "tokens or more"),
    "30 MB of raw text": (
        TEXT,
        lambda: json.dumps({"prompt": "x " * 15_000_000}).encode(),
        "tokens or more",
    ),
    "a name of 10 MB": (
        CHAT,
        lambda: said("hi", model="m" * 10_000_000, tool_choice="required"),
        "needs tools",
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", BODIES)
def test_no_body_holds_up_the_others(name: str, served: Served) -> None:
    path, make, complaint = BODIES[name]
    body = make()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    waits = list[float]()
    while not waits or (waits[-1] >= _LONGEST and len(waits) < 3):  # on a busy machine, all wait
        with asking_for_health(served) as waiting:
            response = send(served, path, body)
        assert response.status_code == 400 and complaint in message_of(response)
        waits.append(waiting.longest)
    assert min(waits) < _LONGEST
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
    assert grown * (1 if sys.platform == "darwin" else 1024) < 300e6
    until_idle(served)


def test_a_request_is_counted_before_its_body_is_read(demo: LLM) -> None:
    with serving(demo, max_requests=1) as running:
        stream = {**endless(), "stream": True}
        with httpx.stream("POST", f"{running.url}{TEXT}", json=stream) as begun:
            lines = begun.iter_lines()  # kept: its end closes the connection
            assert next(lines)
            for path in (CHAT, TEXT, MESSAGES, COUNT, OLLAMA):
                response = send(running, path, b"{" * 100_000)
                assert response.status_code == 429, path
            kinds = [running.post(path, {}).json()["error"] for path in (CHAT, MESSAGES)]
            assert [kind["type"] for kind in kinds] == ["rate_limit_error"] * 2
        until_idle(running)
        for body in (b"{", b"[]", b"{}", said("x", n=2)):
            assert send(running, CHAT, body).status_code == 400
            assert running.server.service.active == 0
        assert running.post(COUNT, {"messages": _USER}).status_code == 200
        assert running.server.service.active == 0


def test_the_description_is_written_beside_the_loop(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, threads = utils.get_openapi, list[threading.Thread]()

    def written(**about: Any) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return write(**about)

    monkeypatch.setattr(openapi, "get_openapi", written)
    with serving(demo) as running:
        described = [running.get("/openapi.json").json() for _ in range(2)]
        assert described[0] == described[1] and len(threads) == 1
        assert threads[0].name.startswith("asyncio_")  # a thread of the loop's, and not its own
    for path, name in ((CHAT, "ChatRequest"), (COUNT, "PromptBody"), (OLLAMA, "OllamaChatRequest")):
        content = described[0]["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
        assert "messages" in described[0]["components"]["schemas"][name]["properties"]


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("path", [CHAT, MESSAGES, OLLAMA, COUNT, TEXT])
def test_json_is_read_whatever_its_type(path: str, served: Served) -> None:
    asked: dict[str, Any] = {"messages": _USER, "stream": False}
    if path == OLLAMA:
        asked["options"] = {"num_predict": 3}
    body = json.dumps({"max_tokens": 3, **(asked if path != TEXT else {"prompt": "x"})})
    kinds = ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/x")
    for headers in ({}, *({"Content-Type": kind} for kind in kinds)):
        assert send(served, path, body, **headers).status_code == 200, headers
    assert send(served, path, b"\xef\xbb\xbf" + body.encode()).status_code == 200


def test_pages_from_elsewhere_cannot_send_plain_text(served: Served) -> None:
    plain = {"Content-Type": "text/plain"}
    for origin in ("http://evil.com", "null", "http://[", "http://"):
        response = send(served, CHAT, said("x"), Origin=origin, **plain)
        assert response.status_code == 403, origin
    for site in ("cross-site", "same-site"):  # where a browser leaves the origin out
        assert send(served, CHAT, said("x"), **plain, **{"Sec-Fetch-Site": site}).status_code == 403
    assert served.get("/", **{"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link
    same = {"Origin": served.url, "Sec-Fetch-Site": "same-origin"}
    assert send(served, CHAT, said("x"), **plain, **same).status_code == 200


def test_an_origin_that_is_no_address_is_no_error(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert served.get("/v1/models", Origin="http://[").status_code == 403
    assert not caplog.records


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "this one is empty"),
        (b" \n", "this one is empty"),
        ("{}".encode("utf-16"), "it is not in UTF-8"),
        ("{}".encode("utf-16-be"), "it is not in UTF-8"),
        ("{}".encode("utf-32"), "it is not in UTF-8"),
        (b"[1]", "send the request as a JSON object, {...}; this is a list"),
        (b'"x"', "this is a string"),
        (b"null", "this is something else"),
        (b'{"messages": ', "cannot be read as JSON: EOF while parsing a value at line 1 column 13"),
        (b"{'messages': []}", "cannot be read as JSON: key must be a string at line 1 column 2"),
        (b'{"a": 1,\n}', "trailing comma at line 2 column 1"),
        (b"\xff\xfe{\x00}\x00", "cannot be read as JSON"),
        (b'{"a": "\xff"}', "cannot be read as JSON: invalid unicode code point"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it is nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "a number has too many digits"),
        (said("x", logit_bias={"1" * 5000: 1}), "is not a token id"),
    ],
)
def test_what_cannot_be_read_is_said(served: Served, body: bytes, complaint: str) -> None:
    for path in (CHAT, MESSAGES, OLLAMA):
        if b"logit_bias" not in body or path == CHAT:
            message = message_of(response := send(served, path, body))
            assert response.status_code == 400 and complaint in message
            assert "Content-Type" not in message and len(message) < 300


@pytest.mark.parametrize("coding", ["gzip", "identity, zstd"])
def test_a_body_that_is_packed_is_refused_as_such(served: Served, coding: str) -> None:
    for path in (CHAT, MESSAGES, OLLAMA):
        response = send(served, path, said("x"), **{"Content-Encoding": coding})
        assert response.status_code == 415 and repr(coding) in message_of(response)
    assert send(
        served, CHAT, said("x", max_tokens=3), **{"Content-Encoding": "Identity"}
    ).is_success


def test_of_unknown_fields_the_first_are_named(served: Served) -> None:
    fields: dict[str, Any] = {f"field{n}": n for n in range(1000)}
    warnings = served.chat(max_tokens=3, **fields).headers["warnings"]
    assert "'field0' was ignored" in warnings and "'field9' was ignored" in warnings
    assert "'field10'" not in warnings and warnings.endswith("; and 990 more unknown fields")
    part = {"type": "text", "text": "x", **fields, "one": 1}
    response = send(served, CHAT, said([part]))
    assert "messages[0].content[0] has 1,001 fields that are not known" in message_of(response)


# --- long texts ---------------------------------------------------------------------------------


_BITS = [
    "a",
    "Word",
    "é",
    "e\u0301",
    "中文",
    "한",
    "7",
    "42",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\xa0",
]
_BITS += [
    "!",
    "...",
    "'s",
    "_",
    "</",
    "<|im_end|>",
    "<think>",
    "\u3000",
    "\u200b",
    "\x1c",
    "²",
    "😀",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(_BITS), max_size=40).map("".join), st.integers(1, 8))
def test_pieces_have_the_tokens_of_the_whole(text: str, size: int) -> None:
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    words = TOKENIZER._inner.pre_tokenizer.pre_tokenize_str
    split = [word for piece in cut for word, _ in words(piece)]
    assert split == [word for word, _ in words(text)]
    ids = [token for piece in cut for token in TOKENIZER.encode(piece)]
    assert ids == TOKENIZER.encode(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*_BITS, "<|im_", "<<"]), max_size=60).map("".join))
def test_added_tokens_are_found_in_windows(text: str) -> None:
    longest = max(map(len, TOKENIZER.added_tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOKENIZER.__dict__, "_window", None)
        whole = TOKENIZER.added_spans(text)
        for window in (longest + 1, longest + 7):
            patch.setitem(TOKENIZER.__dict__, "_window", window)
            assert TOKENIZER.added_spans(text) == whole


def test_long_texts_are_cut(demo: LLM) -> None:
    text = Path(__file__).read_text() * 30
    assert len(list(pieces(text))) > 3
    assert len(list(pieces("x" * 1_000_000))) == 1
    ids = demo.tokenizer.encode(text)
    assert demo.tokenizer.decode(ids) == text
    line = demo.tokenizer.encode(Path(__file__).read_text())
    assert ids[: len(line) - 1] == line[:-1]


def check_others_go_on(tokenizer: Tokenizer, text: str) -> None:
    """Encoding must let other threads run: none waits for a good part of the time it takes."""
    began = time.process_time()
    with Waiting(lambda: time.sleep(0.001)) as waiting:
        tokenizer.encode(text)
        tokenizer.added_spans(text)
    took = time.process_time() - began
    assert waiting.longest < max(0.05, took / 4), (waiting.longest, took)


def test_encoding_holds_up_no_other_thread() -> None:
    check_others_go_on(TOKENIZER, Path(__file__).read_text() * 40)
    check_others_go_on(TOKENIZER, "<" + "x" * 400_000)  # which cannot be cut


@pytest.mark.parametrize("text", ["x " * 1_000_000, "x" * 2_000_000, "中" * 1_000_000])
def test_what_cannot_fit_is_refused_early(text: str, demo: LLM) -> None:
    began = time.thread_time()
    for ask in (demo.chat, demo.complete, demo.stream, demo.count_tokens):
        with pytest.raises(ContextError, match="tokens or more and the context window is 8,192"):
            ask(text)
    for role in ("system", "tool"):
        with pytest.raises(ContextError, match="tokens or more"):
            demo.chat([{"role": role, "content": text}, *_USER])
    assert time.thread_time() - began < 2


def test_what_templates_leave_out_may_be_long(demo: LLM) -> None:
    thought = f"<think>{'x' * 300_000}</think>"
    history = [*_USER, {"role": "assistant", "content": f"{thought}\n\n hi"}, *_USER]
    assert demo.chat(history, max_tokens=1, thinking=False).usage.prompt_tokens < 100


def test_tokens_are_counted_as_they_are_used(demo: LLM) -> None:
    counted = demo.count_tokens("What is 12 + 34?", thinking=False)
    assert (
        counted == demo.chat("What is 12 + 34?", thinking=False, max_tokens=1).usage.prompt_tokens
    )
    assert demo.count_tokens("x y " * 4000) > demo.context  # to know how much is too much


def test_a_long_conversation_is_read_ahead_beside_the_engine(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = demo._open().engine
    found: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(
        engine, "prefetch", lambda ids, _: found.append((threading.current_thread().name, ids))
    )
    for longest in (generation._LONG, 1):
        monkeypatch.setattr(generation, "_LONG", longest)
        demo.chat("What is 12 + 34?", seed=1, prefetch_next_turn=True)
        end = time.monotonic() + 60
        while len(found) < (1 if longest > 1 else 2) and time.monotonic() < end:
            time.sleep(0.01)
    (one, ids), (other, same) = found
    assert ids == same and (one, other) == ("qwen3-mlx", "qwen3-ahead")


@pytest.mark.published
def test_a_long_prompt_holds_up_no_other_stream() -> None:
    tokenizer = Tokenizer(Path(os.environ["QWEN3_FILES"]) / "tokenizer.json")
    text = (Path(__file__).read_text() * 100)[:1_000_000]
    with Waiting(lambda: time.sleep(0.001)) as waiting:
        ids = tokenizer.encode(text)
    assert waiting.longest < 0.2
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer._inner.encode(text, add_special_tokens=False).ids
