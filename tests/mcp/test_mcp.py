"""Tools of MCP servers, and what servers that misbehave cost."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import qwen3_mlx
from qwen3_mlx import LLM, Qwen3Error, SamplingParams
from qwen3_mlx.mcp import Call, Servers, connect, process
from qwen3_mlx.text.tool_calls import Tool
from tests.mcp.harness import by_hand, call
from tests.mcp.server import answer
from tests.text.harness import calculator

GREEDY = SamplingParams(temperature=0.0)
TOOLS = ["calculator", "hostile", "long", "nothing", "kinds", "noise", "refuse", "structured"]
TOOLS += ["fail", "broken_schema", "self", "a.b", "a_b", "x" * 80]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """Two servers, of which the second has a tool of the first."""
    entries = {"one": by_hand(*TOOLS), "the other": by_hand("calculator")}
    with connect({"mcpServers": entries}) as servers:
        yield servers


def test_the_model_calls_a_tool_of_a_server_by_the_public_names(demo: LLM, tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"sums": by_hand("calculator")}}))
    calls: list[Call] = []

    def approve(call: Call) -> bool:
        calls.append(call)
        return len(calls) == 1

    options: Any = {"thinking": False, "sampling": GREEDY}
    with qwen3_mlx.mcp.connect(file, approve=approve) as mcp:
        reply = demo.run("What is 1234 + 4321?", tools=mcp.tools, **options)
        assert reply.text == "1234 + 4321 = 5555"
        assert calls == [Call("sums", "calculator", {"expression": "1234 + 4321"})]
        reply = demo.run("What is 1234 + 4321?", tools=mcp.tools, **options)
        assert reply.messages[1]["content"] == "Error: the user declined this call"
    assert call(mcp, "calculator", expression="1").startswith("Error:")


def test_names_are_allowed_and_unique(demo: LLM, servers: Servers) -> None:
    tools: list[Tool] = [calculator, *servers.tools]
    names = [tool["function"]["name"] for tool in demo.prepare("Hi", tools=tools).tools]
    assert names[0] == "calculator"  # the user's own function keeps its name
    assert names[1] == "one__calculator" and names[-1] == "the_other__calculator"
    assert names[2:5] == ["hostile", "long", "nothing"]
    assert names[-4:-1] == ["one__a_b", "one__a_b_2", "x" * 64]
    assert demo.render("Hi", tools=servers.tools).count('"the_other__calculator"') == 1


def test_hostile_words_are_no_control_tokens(demo: LLM, servers: Servers) -> None:
    """Neither those of a description nor those of a result."""
    counts = []
    for tool in ("nothing", "hostile"):
        tools = [each for each in servers.tools if each.name == tool]
        reply = demo.run(
            "What is 12 + 34?", tools=tools, tool_choice=tool, thinking=False, sampling=GREEDY
        )
        assert reply.messages[1]["role"] == "tool"
        messages = [{"role": "user", "content": "What is 12 + 34?"}, *reply.messages[:2]]
        ids = demo.tokenizer.encode(demo.render(messages, tools=tools))
        control = [demo.tokenizer.id_of(name) for name in demo.tokenizer.added_tokens]
        counts.append([ids.count(token) for token in control if token is not None])
    assert "<|im_start|>system" in reply.messages[1]["content"]
    assert counts[0] == counts[1]


def test_results_of_all_kinds_are_text(servers: Servers) -> None:
    assert call(servers, "kinds").splitlines() == [
        "[image, image/png, 5 bytes: only text can be read]",
        "[audio, audio/wav, 0 bytes: only text can be read]",
        "[link to file:///a.txt: a, text/plain]",
        "[file:///b.txt, unknown type]",
        "words",
        "[file:///c, unknown type, 3 bytes: only text can be read]",
    ]
    assert call(servers, "structured") == '{"sum": 3}'
    assert call(servers, "nothing") == "(no content)"
    assert call(servers, "self", self=1, tool={"a": [None]}) == '{"self": 1, "tool": {"a": [null]}}'
    long = call(servers, "long")
    assert long.endswith("x\n[cut off: the first 50,000 of 100,000 characters]")


def test_what_fails_is_told_to_the_model(servers: Servers) -> None:
    assert call(servers, "fail") == "Error: it went wrong"
    refused = call(servers, "refuse")
    assert refused == "Error: the MCP server one: no such tool ]0;title [31mred 2J look"
    assert "one: Invalid structured content" in call(servers, "broken_schema")
    assert call(servers, "noise") == "went on"
    assert call(servers, "self", half="\ud800").startswith("Error: the arguments cannot be sent: ")


def test_a_server_inherits_little_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("PORT", "8080")
    env = {"A": "${SECRET}", "B": "${NONE:-b}", "C": "${env:PORT}", "D": 4, "E": "${NONE:-}"}
    with connect({"servers": {"one": by_hand("environment", env=env)}}) as mcp:
        seen = json.loads(call(mcp, "environment"))
    assert {"PATH", "A"} < seen.keys() and "SECRET" not in seen
    assert [seen[name] for name in "ABCDE"] == ["x", "b", "8080", "4", ""]


def test_a_server_that_fails_costs_a_sentence_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crash = {"command": "sh", "args": ["-c", "echo first; echo oh $HOME >&2; exit 3"]}
    entries = {
        "one": by_hand("calculator", autoApprove=[], description=""),
        "silent": by_hand(timeout=0.2),
        "crash": crash | {"env": {"HOME": "\x1b[31mno"}},
        "none": {"command": "no-such-command"},
        "nowhere": by_hand("calculator", cwd=str(tmp_path / "none")),
        "unreachable": {"url": "http://127.0.0.1:9/mcp"},
        "neither": {"args": []},
        "both": {"command": "a", "url": "b"},
        "unset": {"command": "a", "env": {"A": "${NO_SUCH_VARIABLE}"}},
        "odd": {"url": "http://a", "type": "telepathy"},
        "bare": {"url": "a"},
        "number": {"command": 5},
        "words": {"command": "a", "args": "b c"},
        "echo": {"command": "cat"},
        "wrong": {"command": ["a"]},
        "text": "a",
        "off": {"command": "${NO_SUCH_VARIABLE}", "disabled": True},
        "much": by_hand(*(f"t{number}" for number in range(60))),
    }
    with connect({"mcpServers": entries}) as mcp:
        assert [tool.name for tool in mcp.tools][:2] == ["calculator", "t0"]
        assert len(mcp.tools) == 51
        assert call(mcp, "calculator", expression="1+2") == "3"
    reasons = {
        "silent": "it did not answer within 0.2 s",
        "crash": "it has closed the connection: oh [31mno",
        "none": "No such file or directory: no-such-command",
        "nowhere": f"No such file or directory: {tmp_path / 'none'}",
        "unreachable": "All connection attempts failed",
        "neither": "its entry needs a command or a url, one of them",
        "both": "its entry needs a command or a url, one of them",
        "unset": "it needs the environment variable NO_SUCH_VARIABLE, which is not set",
        "odd": "its type must be stdio, http or sse, not 'telepathy'",
        "wrong": "command: Input should be a valid string",
        "text": "its entry must be an object",
        "bare": "url: it must begin with http:// or https://, not 'a'",
        "number": "command: Input should be a valid string",
        "words": "args: Input should be a valid list",
        "echo": "it sends back what it is sent: it is no MCP server",
    }
    assert mcp.failed == reasons
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for name, reason in reasons.items():
        assert f"the MCP server {name} did not start: {reason}" in said
    assert "the MCP server one: ignored: autoApprove, description" in said
    assert "the MCP server much: its list of tools does not end" in said


@pytest.mark.parametrize(
    ("tool", "why"),
    [
        ("crash", "it has closed the connection: out of luck"),
        ("deaf", "it did not answer within 2 s"),
        ("hang", "it did not answer within 2 s"),
        ("flood", "it wrote over 10,000 lines without an answer"),
        ("endless_line", "it wrote a line of more than 16,777,216 bytes"),
    ],
)
def test_a_call_that_goes_wrong_costs_a_sentence(tool: str, why: str) -> None:
    entries = {"bad": by_hand(tool, timeout=2), "good": by_hand("calculator")}
    with connect({"mcpServers": entries}) as mcp:
        assert call(mcp, tool, words="x" * 200_000) == f"Error: the MCP server bad: {why}"
        assert call(mcp, "calculator", expression="1+2") == "3"
        if "answer within" not in why:
            assert call(mcp, tool) == f"Error: the MCP server bad: {why}"


def test_ctrl_c_cancels_the_call_and_the_server_goes_on(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    server = by_hand("hang", "calculator", env={"TRACE": str(trace)})
    with connect({"mcpServers": {"one": server}}) as mcp:

        def interrupt() -> None:
            while not trace.exists():
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            call(mcp, "hang")
        assert call(mcp, "calculator", expression="1+2") == "3"
    assert json.loads(trace.read_text())["method"] == "notifications/cancelled"


def test_ctrl_c_ends_a_start_that_takes_long() -> None:
    threads = threading.active_count()
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        connect({"mcpServers": {"silent": by_hand(), "one": by_hand("calculator")}})
    timer.join()
    assert threading.active_count() == threads


def test_nothing_is_left_of_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor of their children."""
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.1)
    pids = tmp_path / "pids"
    line = f"sleep 60 & echo $! >{pids}; exec {sys.executable} -S {by_hand('x')['args'][1]} x"
    before = threading.active_count()
    with connect({"mcpServers": {"one": {"command": "sh", "args": ["-c", line]}}}):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    shown = subprocess.run(
        ["ps", "-o", "stat=", "-p", pids.read_text().strip()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.stdout.strip()[:1] in ("", "Z")  # gone, or dead and not yet fetched by its parent


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON: "),
        ("[]", "needs an object mcpServers, with an entry for each server"),
        ('{"mcpServers": []}', "needs an object mcpServers"),
        ('{"mcpServers": {" ": {"command": "a"}}}', "an entry of mcpServers has an empty name"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_configuration_is_refused(
    tmp_path: Path, content: str | None, complaint: str
) -> None:
    file = tmp_path / "mcp.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(Qwen3Error, match=complaint):
        connect(file)


def test_two_servers_of_one_name_are_refused() -> None:
    config = {"mcpServers": {"one": by_hand("calculator")}}
    with pytest.raises(Qwen3Error, match="two MCP servers are called one"):
        connect(config, config)


def test_without_the_extra_a_sentence_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(Qwen3Error, match="MCP servers need more packages: .* install"):
        connect({"mcpServers": {}})


# --- HTTP ----------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """Streamable HTTP by hand: an answer is a JSON document."""

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        allowed = self.headers["Authorization"] == "Bearer key"
        body = b""
        if allowed and "id" in message:
            found = answer(message, ["calculator"])
            body = json.dumps({"jsonrpc": "2.0", "id": message["id"], **found}).encode()
        self.send_response((200 if body else 202) if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_error(405)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def test_servers_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "key")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{http.server_port}/mcp"
        headers = {"Authorization": "Bearer ${KEY}"}
        entries = {"one": {"url": url, "headers": headers}, "denied": {"type": "http", "url": url}}
        try:
            with connect({"mcpServers": entries}) as mcp:
                assert call(mcp, "calculator", expression="1+2") == "3"
                assert "HTTP 401 Unauthorized" in mcp.failed["denied"]
        finally:
            http.shutdown()
