"""Preparation of a request: it ends, it can be stopped, and others do not wait for it."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest

from qwen3_mlx import LLM
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.server import preparing
from qwen3_mlx.text import grammar, grammar_compiler, grammar_trial, grammar_worker
from qwen3_mlx.text.fair_queue import LOCAL_CALLER, Caller
from qwen3_mlx.text.grammar_limits import MAX_CHARACTERS
from qwen3_mlx.text.grammar_trial import TrialCompiler
from qwen3_mlx.text.tool_schema import kinds_of
from tests.server.harness import submit_slowly, until
from tests.server.serving import Served, serving

# As many as are let pass; it would take minutes and gigabytes.
_INTERSECTED = " & ".join(f"/.*{chr(97 + n)}.{{{5 + n}}}{chr(97 + n)}.*/" for n in range(14))
_ENDLESS = f"start: X\nX: {_INTERSECTED}"
_NEVER_ENDS = {"allOf": [{"type": "integer", "multipleOf": n} for n in (7919, 7907)]}
_DEEP = "start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(20_000)) + '\nr20000: "a"'
_REFERENCES: dict[str, Any] = {
    "$ref": "#/$defs/d0",
    "$defs": {
        f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(9999)
    }
    | {"d9999": {"type": "integer"}},
}
_DOUBLING = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)}


def tool(name: str = "f", **parameters: Any) -> dict[str, Any]:
    function = {"name": name, "parameters": {"type": "object", **parameters}}
    return {"type": "function", "function": function}


def schema(wanted: Any) -> dict[str, Any]:
    """Return the fields that ask for an answer of a schema."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": wanted}}
    return {"response_format": form}


def structured(**form: Any) -> dict[str, Any]:
    return {"structured_outputs": form}


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo."""
    with serving(demo) as running:
        yield running


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[grammar_trial._Lane]]:
    """Lanes of this test's own, in which nothing may take long."""
    made = [grammar_trial._Lane(0.05, 2), grammar_trial._Lane(0.2, 1)]
    monkeypatch.setattr(grammar_trial, "_lanes", lambda: made)
    yield made
    for lane in made:
        with ExitStack() as all_of_them:
            for _ in range(lane._free.qsize()):
                all_of_them.enter_context(lane.helper(LOCAL_CALLER))._end()


@contextmanager
def occupied(lanes: list[grammar_trial._Lane]) -> Iterator[None]:
    """Occupy each process for trials, as if it compiled for others."""
    with ExitStack() as stack:
        for lane in lanes:
            for _ in range(lane._free.qsize()):
                stack.enter_context(lane.helper(LOCAL_CALLER))
        yield


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (schema(_NEVER_ENDS), "schema: multipleOf is supported up to 100,000"),
        (structured(grammar=_ENDLESS), "grammar: it takes more than 2 s to compile; try a simpler"),
        (structured(grammar=_DEEP), "grammar: it takes more memory than there is, or is too deep"),
        (schema(_REFERENCES), "schema: it takes more memory than there is, or is too deep"),
        (structured(choice=[f"{n}" for n in range(100_000)]), "at most 50,000 texts, not 100,000"),
        (structured(choice=["a" * 30] * 40_000), "choice may have at most 1,000,000 characters"),
        (structured(regex="a" * MAX_CHARACTERS + "b"), "regex may have at most 1,000,000 char"),
        (structured(grammar='start: "' + r"\"" * 200_000), "grammar: "),
        (
            schema({"const": "a" * MAX_CHARACTERS}),
            "a schema may have at most 1,000,000 characters",
        ),
        ({"tools": [tool(f"f{n}") for n in range(1001)]}, "not 1001"),
        ({"tools": [tool(title="a" * MAX_CHARACTERS)]}, "all tools together may have at most 1,0"),
        (
            {"tools": [tool(properties={f"a{n}": {} for n in range(5001)})]},
            "all tools together may have at most 5,000 parameters, not 5,001",
        ),
    ],
)
def test_what_takes_too_much_is_refused(
    served: Served, lanes: list[grammar_trial._Lane], fields: dict[str, Any], complaint: str
) -> None:
    if "memory" in complaint:
        lanes[1].seconds = 10.0  # or a busy machine runs out of time first
    response = served.chat("Hi", enable_thinking=False, max_tokens=4, **fields)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert complaint in message and len(message) < 600
    again = served.chat("Hi", enable_thinking=False, max_tokens=4, **fields)
    assert (again.status_code, again.json()["error"]["message"]) == (400, message)
    assert served.chat("Hi", max_tokens=4).status_code == 200


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|b)*a(a|b){20}", "(.*a){50}", "(a*)*" * 30 + "b"])
def test_what_other_engines_choke_on_is_quick(served: Served, pattern: str) -> None:
    response = served.chat("Hi", enable_thinking=False, max_tokens=8, **structured(regex=pattern))
    assert response.status_code == 200


def test_tools_are_bounded_for_the_library_too(demo: LLM) -> None:
    with pytest.raises(ValueError, match="at most 1,000 tools can be given, not 1,001"):
        demo.chat("Hi", tools=[tool(f"f{n}") for n in range(1001)])


def test_what_was_refused_is_not_tried_again(
    lanes: list[grammar_trial._Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llguidance import LLTokenizer

    compiler = TrialCompiler(lambda: LLTokenizer("byte"))
    for _ in range(2):
        with pytest.raises(ValueError, match="more than 2 s"):
            compiler.compile(_ENDLESS, LOCAL_CALLER)
        monkeypatch.setattr(grammar_trial, "_lanes", lambda: pytest.fail("it is tried again"))


def test_types_are_gathered_through_each_reference_once() -> None:
    root = {"$defs": {**_DOUBLING, "d60": {"type": "integer"}}}
    assert kinds_of({"$ref": "#/$defs/d0"}, root) == {"integer"}
    wide = {"anyOf": [{"const": n} for n in range(3000)]}
    assert kinds_of(wide, wide) == frozenset()  # too many to be looked at, so anything may come


@pytest.mark.parametrize("form", ["schema", "tools"])
def test_a_request_compiles_each_grammar_once(
    demo: LLM, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    made = TrialCompiler.compile_trusted

    def counted(compiler: TrialCompiler, text: str) -> Any:
        compiled.append(text)
        return made(compiler, text)

    monkeypatch.setattr(TrialCompiler, "compile_trusted", counted)
    wanted: dict[str, Any] = {"schema": {"enum": [1, 2, form]}}
    if form == "tools":
        wanted = {"tools": [tool(properties={"a": {"enum": [1, 2, 3]}})]}
    demo.chat("Hi", thinking=False, max_tokens=8, **wanted)
    assert len(compiled) == len(set(compiled)) == (1 if form == "schema" else 2)
    compiled.clear()
    demo.chat("Hi", thinking=False, max_tokens=8, **wanted)
    assert len(compiled) == 1  # what a tool's own schema can do is known


def test_nobody_waits_for_what_compiles_for_others(
    served: Served, lanes: list[grammar_trial._Lane]
) -> None:
    known = structured(regex="(known|words)")
    assert served.chat("Hi", enable_thinking=False, **known).status_code == 200
    answers: list[httpx.Response] = []
    count = preparing._MAX_COMPUTING + 1

    def ask(number: int) -> None:
        form = structured(regex=f"(new|words){number}")
        answers.append(served.chat("Hi", enable_thinking=False, **form))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(count)]
    with occupied(lanes):
        for thread in threads:
            thread.start()
        until(lambda: served.get("/health").json()["preparing"]["requests"] == count)
        assert served.chat("Hi", max_tokens=4).status_code == 200
        assert served.chat("Hi", enable_thinking=False, **known).status_code == 200
        health = served.get("/health").json()
        assert (health["active"], health["preparing"]["stuck"]) == (count, 0)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * count
    said = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert len(said) == count and all(text[:-1] in ("new", "words") for text in said)


def test_only_a_few_compute_at_once(
    served: Served, lanes: list[grammar_trial._Lane], demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait for a grammar do not count; the others wait until it is their turn."""
    at_work, most, prepare = [], [], demo.prepare

    def slow(*arguments: Any, **options: Any) -> Any:
        at_work.append(1)
        most.append(len(at_work))
        threading.Event().wait(0.02)
        at_work.pop()
        return prepare(*arguments, **options)

    monkeypatch.setattr(demo, "prepare", slow)
    ask = [threading.Thread(target=served.chat, kwargs={"max_tokens": 1}) for _ in range(12)]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert max(most) <= preparing._MAX_COMPUTING and len(most) == 12


def test_a_client_that_goes_away_gives_its_place_back(
    served: Served, lanes: list[grammar_trial._Lane]
) -> None:
    address = urlparse(served.url)
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]} | structured(regex="gone?"))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    health = lambda: served.get("/health").json()  # noqa: E731
    with occupied(lanes):
        with socket.create_connection((address.hostname, address.port)) as client:
            client.sendall(f"{head}\r\n\r\n{body}".encode())
            until(lambda: health()["preparing"]["requests"] == 1)
        until(lambda: health()["active"] == 0 and health()["preparing"]["requests"] == 0)


def test_a_request_that_waits_too_long_is_told_to_come_again(
    served: Served, lanes: list[grammar_trial._Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.server.service.preparing, "_timeout", 0.2)
    with occupied(lanes):
        response = served.chat("Hi", **structured(regex="patience"))
    assert (response.status_code, response.headers["Retry-After"]) == (503, "10")
    assert "could not be prepared within 0.2 s" in response.json()["error"]["message"]


def test_a_shutdown_does_not_wait_for_what_is_prepared(
    demo: LLM, lanes: list[grammar_trial._Lane]
) -> None:
    answers: list[httpx.Response] = []
    with occupied(lanes):
        with serving(demo, shutdown=0.1) as ending:
            asking = threading.Thread(
                target=lambda: answers.append(ending.chat("Hi", **structured(regex="shut")))
            )
            asking.start()
            until(lambda: ending.get("/health").json()["preparing"]["requests"] == 1)
        asking.join()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["message"] == "the server is shutting down"


def test_work_that_cannot_be_given_up_is_seen(
    served: Served, demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(served.server.service.preparing, "_timeout", 0.1)
    monkeypatch.setattr(demo, "prepare", lambda *_, **__: go_on.wait())
    try:
        assert served.chat("Hi").status_code == 503
        until(lambda: served.get("/health").json()["preparing"]["stuck"] == 1)
        assert served.get("/health").json()["active"] == 0
    finally:
        go_on.set()
    until(lambda: served.get("/health").json()["preparing"]["requests"] == 0)


# --- the process for trials ---------------------------------------------------------------------


class Leaving(Caller):
    """A caller that is gone when it is looked for, or is interrupted then."""

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error

    @property
    def gone(self) -> bool:
        if self._error:
            raise self._error
        return True


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_a_trial_ends_with_its_caller(error: BaseException | None) -> None:
    helper = grammar_trial._TrialProcess()
    assert helper.check('start: "a"', 5, LOCAL_CALLER) == ""
    process = helper._process
    assert process and process.poll() is None
    with pytest.raises(KeyboardInterrupt if error else Qwen3Error):
        helper.check(_ENDLESS, 30, Leaving(error))
    assert process.poll() is not None
    assert helper.check("start: 1", 5, LOCAL_CALLER)  # by the next one
    helper._end()


def test_a_process_that_was_idle_is_replaced() -> None:
    helper = grammar_trial._TrialProcess()
    assert helper.check('start: "a"', 5, LOCAL_CALLER) == ""
    process, connection = helper._process, helper._connection
    assert process and connection
    connection.shutdown(socket.SHUT_WR)  # so that it has nothing to wait for
    assert helper.check('start: "b"', 5, LOCAL_CALLER) == ""
    assert process.returncode == 0 and helper._process is not process
    helper._end()


def test_a_trial_does_not_outlive_a_program_that_was_killed() -> None:
    program = (
        "from qwen3_mlx.text import fair_queue, grammar_trial;"
        "helper = grammar_trial._TrialProcess();"
        "helper.check('start: \"a\"', 5, fair_queue.LOCAL_CALLER);"
        "print(helper._process.pid, flush=True); input()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout
        number = int(parent.stdout.readline())
        parent.kill()

    def ended() -> bool:
        listed = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True, check=False
        )
        return listed.stdout.strip()[:1] in ("", "Z")

    until(ended)


def test_where_no_process_can_be_started_grammars_are_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for command in ([], [sys.executable, "-c", "raise SystemExit(3)"]):
        monkeypatch.setattr(grammar_trial, "_command", lambda command=command: command)
        assert grammar_trial._TrialProcess().check('start: "a"', 5, LOCAL_CALLER) == ""
        assert "a grammar is compiled without a trial" in caplog.text
        caplog.clear()


def test_the_program_for_trials_answers_until_the_other_end_is_closed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for text in ('start: "a"', "start: 1"):
            asked = {"grammar": text, "seconds": 5, "limits": grammar_trial._LIMITS}
            ours.sendall(grammar_worker.framed(json.dumps(asked).encode()))
        ours.shutdown(socket.SHUT_WR)
        grammar_worker.serve(theirs)
        assert json.loads(grammar_worker.receive(ours)) == ""
        assert "Expected" in json.loads(grammar_worker.receive(ours))


# --- while a text is followed -------------------------------------------------------------------


def test_a_grammar_that_takes_long_at_each_token_ends_the_reply(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_AT_FIRST", 0.02)
    monkeypatch.setattr(grammar, "_A_STEP", 0.0005)
    tokenizer = demo.tokenizer
    ends = [n for n in range(len(tokenizer)) if b"!" in tokenizer.token_bytes(n)]
    options: dict[str, Any] = {"logit_bias": dict.fromkeys(ends, -100.0), "thinking": False}
    ambiguous = 'start: s "!"\ns: s s s | s s | "a" | "b"'
    with pytest.raises(ValueError, match=r"grammar: it has taken .* s for \d+ steps, too long"):
        demo.chat("Hi", grammar=ambiguous, seed=1, loop_guard=False, **options)


def test_all_schemas_together_are_bounded(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "_MAX_WRITTEN", 200)
    tools = [tool(f"f{n}", properties={"a": {"enum": [n]}}) for n in range(5)]
    reply = demo.chat("Hi", tools=tools, thinking=False, max_tokens=4)
    warned = reply.details["warning"]
    assert "the tool f4 is not enforced: all schemas together are too large" in warned
    assert "f0" not in warned


def test_a_reply_that_fails_while_it_is_submitted_says_why(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(demo) as served:
        submit_slowly(monkeypatch, BaseException)
        response = served.chat("Hi", structured_outputs={"regex": "^(a{800}){800}$"})
        assert response.status_code == 400 and "too many expressions" in response.text
