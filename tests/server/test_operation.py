"""Operation: what the log and health tell, who has a key, and what the server is called."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen3_mlx import LLM
from qwen3_mlx.engine.activity import Meter
from qwen3_mlx.server import keys as keys_module
from qwen3_mlx.server.keys import Key, Keys
from qwen3_mlx.server.settings import Settings, check_certificate
from tests.cli.harness import piped
from tests.server.harness import until, write_certificate
from tests.server.serving import serving

CHAT = "/v1/chat/completions"
SECRET = "Geheimnis"


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the lines of the log of requests."""
    return [json.loads(r.message) for r in caplog.records if r.name.endswith(".access")]


@pytest.fixture(autouse=True)
def all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Take what the server says."""
    caplog.set_level(logging.INFO, logger="qwen3_mlx.server")


# --- the log ------------------------------------------------------------------------------------


def test_a_line_says_who_asked_and_how_it_went(demo: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with serving(demo) as served:
        response = served.chat(seed=1)
        stream = served.chat(seed=1, stream=True)
        assert stream.text.endswith("[DONE]\n\n")
    line, streamed = lines_of(caplog)
    assert line["client"] == "127.0.0.1" and line["model"] == "demo" and line["status"] == 200
    assert line["id"] == response.headers["x-request-id"] != stream.headers["x-request-id"]
    assert 0 < line["first_ms"] < line["ms"] and line["tokens_per_second"] > 0
    assert "error" not in line and "error" not in streamed
    assert line["finish"] == streamed["finish"] == ["stop"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "reason"),
    [
        (CHAT, {"messages": []}, {}, 400, "messages: "),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 33}, {}, 400, "n: "),
        ("/v1/nothing", {}, {}, 404, "there is nothing at this address"),
        (CHAT, {}, {"Host": "evil.com"}, 403, "is not a name of this server"),
        (CHAT, {}, {"Origin": "http://evil.com"}, 403, "may not use this server"),
        (CHAT, {"x": "y" * 2000}, {}, 413, "larger than 1,000 bytes"),
        (CHAT, {}, {"Authorization": "Bearer x"}, 401, "a key is needed"),
        ("/v1/messages", {"messages": [], "max_tokens": 1}, {}, 400, "messages: "),
        ("/api/chat", {"messages": "x"}, {}, 400, "messages: "),
    ],
)
def test_a_line_says_why_a_request_was_refused(
    demo: LLM,
    caplog: pytest.LogCaptureFixture,
    path: str,
    body: Any,
    headers: dict[str, str],
    status: int,
    reason: str,
) -> None:
    with serving(demo, max_body=1000, api_key="k") as served:
        assert served.post(path, body, **{"x-api-key": "k", **headers}).status_code == status
    (line,) = lines_of(caplog)
    assert line["status"] == status and reason in line["error"]
    assert "finish" not in line, "it never ran"


@pytest.mark.heavy
def test_nothing_that_was_sent_is_in_the_reason(
    demo: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    quoted = f"it's \"{SECRET}\" and '{SECRET}'"
    message = {"role": "user", "content": quoted}
    good = {"messages": [message], "max_tokens": 3}
    wrong: list[dict[str, Any]] = [
        {"messages": [{**message, "role": SECRET}]},
        {"messages": quoted},
        {"messages": [{"role": "user", "content": {"a": quoted}}]},
        {"messages": [{"role": "user", "content": [{"type": quoted}]}]},
        {"messages": [{"role": "assistant", "tool_calls": quoted}]},
        {
            "messages": [
                {"role": "assistant", "content": quoted},
                {"role": "tool", "content": SECRET},
            ]
        },
        {**good, "stop": [SECRET, ""]},
        {**good, "stop": {SECRET: 1}},
        {**good, "logit_bias": {SECRET: 1}},
        {**good, "tools": [{"type": "function", "function": {"name": quoted}}] * 2},
        {**good, "tools": quoted},
        {**good, "tool_choice": quoted},
        {**good, "response_format": {"type": SECRET}},
        {**good, "structured_outputs": {"regex": f"({SECRET}"}},
        {**good, "structured_outputs": {"choice": [quoted], "regex": SECRET}},
        {**good, "structured_outputs": {"grammar": f"start: {SECRET}"}},
        {**good, "structured_outputs": {"json": {"type": SECRET}}},
        {**good, "structured_outputs": {"json": {SECRET: 1, "not": {"const": quoted}}}},
        {**good, "thinking_budget_message": [quoted]},
        {**good, "seed": SECRET},
        {**good, "reasoning_effort": quoted},
        {**good, "modalities": [quoted]},
    ]
    with serving(demo) as served, httpx.Client(base_url=served.url, timeout=60) as client:
        refused = 0
        for path in (CHAT, "/v1/messages", "/api/chat", "/v1/completions"):
            short = {"options": {"num_predict": 3}} if path.startswith("/api") else {}
            for body in wrong:
                response = client.post(path, json={**body, **short, "prompt": [quoted, -1]})
                refused += response.status_code >= 400
            broken = f'{{"messages": "{SECRET}", {SECRET}'
            client.post(path, content=broken, headers={"Content-Type": "application/json"})
    lines = lines_of(caplog)
    assert refused > 40 and sum("error" in line for line in lines) == refused + 4
    assert not {line.get("error") for line in lines if SECRET in json.dumps(line)}


def test_what_fails_is_no_cancelled_reply(
    demo: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    with serving(demo) as served:
        with monkeypatch.context() as patched:
            patched.setattr("qwen3_mlx.engine.step_builder.forward", fail)
            served.chat()
            assert "the device failed" in served.chat(stream=True).text
    for line in lines_of(caplog):
        assert line["finish"] == ["error"] and "the device failed" in line["error"]


def test_requests_have_numbers(demo: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with serving(demo) as served:
        for sane in ("abc-123", "01J/x.y_z:4=", "a" * 128):
            given = served.get("/health", **{"X-Request-Id": sane})
            assert given.headers["x-request-id"] == sane
        for odd in ("a b", '"', "a" * 129, "", "{}"):
            found = served.get("/health", **{"X-Request-Id": odd}).headers["x-request-id"]
            assert re.fullmatch("req_[0-9a-f]{24}", found)
        refused = served.post("/v1/messages", {})
        assert refused.headers["request-id"] == refused.headers["x-request-id"]
    assert lines_of(caplog)[0]["id"] == "abc-123"


def test_the_client_of_a_trusted_proxy_is_logged(
    demo: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    through = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    with serving(demo, trusted_proxies=["127.0.0.0/8"], allowed_hosts=["chat.example"]) as served:
        names = {"Host": "chat.example", "Origin": "https://chat.example"}
        assert served.get("/v1/models", **through, **names).status_code == 200
    with serving(demo) as served:
        host = served.url.removeprefix("http://")
        assert served.get("/v1/models", **through, Origin=f"https://{host}").status_code == 403
    assert [line["client"] for line in lines_of(caplog)] == ["203.0.113.9", "127.0.0.1"]


# --- health -------------------------------------------------------------------------------------


def test_health_tells_what_is_being_done(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(demo) as served:
        before = served.get("/health").json()
        assert before["status"] == "ok" and before["version"] and before["uptime_seconds"] >= 0
        assert (before["active"], before["running"], before["waiting"]) == (0, 0, 0)
        assert served.chat(max_tokens=20).status_code == 200
        after = served.get("/health").json()
        assert after["tokens_per_second"] > 0
        assert after["memory"]["used"] > 0 and after["memory"]["caches_limit"] > 0
        release = threading.Event()

        def hold() -> None:
            release.wait(60)

        demo.call_soon(hold)
        try:
            asking = threading.Thread(target=served.chat, kwargs={"max_tokens": 3})
            asking.start()
            end = time.monotonic() + 20
            while (found := served.get("/health").json())["waiting"] != 1:
                assert time.monotonic() < end, found
            assert found["active"] == 1 and found["running"] == 0 and found["status"] == "ok"
            with monkeypatch.context() as patch:
                patch.setattr("qwen3_mlx.server.health._STUCK", 0)
                stuck = served.get("/health")
            assert stuck.status_code == 503 and stuck.json()["status"] == "stuck"
        finally:
            release.set()
        asking.join()
        # It reads ahead for a moment, which takes longer than no time.
        until(lambda: served.get("/health").json()["status"] == "ok")
        served.server.service.stopping = True
        stopping = served.get("/health")
        assert stopping.status_code == 503 and stopping.json()["status"] == "stopping"


def test_a_speed_is_that_of_the_last_seconds() -> None:
    now = 100.5
    meter = Meter(lambda: now)
    assert meter.rate == 0
    for second in range(20):
        now = 100.5 + second
        meter.add(30)
        meter.add(20)
    assert meter.rate == pytest.approx(50, rel=0.1)
    now += 5
    assert meter.rate == pytest.approx(25, rel=0.2)
    now += 60
    assert meter.rate == 0


# --- keys ---------------------------------------------------------------------------------------


def test_keys_of_a_file(
    demo: LLM, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "_POLL_SECONDS", 0)
    file = tmp_path / "keys"
    file.write_text("# those of the house\n\nfirst\n  second  \n")
    file.chmod(0o600)
    with serving(demo, key_file=file, max_per_client=1) as served:

        def status(key: str) -> int:
            return served.get("/v1/models", Authorization=f"Bearer {key}").status_code

        assert [status(key) for key in ("first", "second", "third", "x", "#")] == [
            *(200, 200),
            *(401, 401, 401),
        ]
        file.write_text("third\n")
        assert [status(key) for key in ("first", "third")] == [401, 200]
        for wrong in ("", "name third many\n"):
            file.write_text(wrong)
            assert status("third") == 200  # as it was, and a word in the log
        file.unlink()
        assert status("third") == 200
    assert [line.get("key") for line in lines_of(caplog)][:3] == ["1", "2", None]
    assert caplog.text.count("the keys stay as they were") == 3
    assert "third" not in caplog.text and "can be read by others" not in caplog.text


def test_a_key_file_for_all_to_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file := tmp_path / "keys").write_text("secret\n")
    file.chmod(0o644)
    assert Keys(None, file).find(" secret ") == Key("1", b"secret")
    assert f"chmod 600 {file}" in caplog.text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "there is no key in"),
        (b"# none\n", "there is no key in"),
        (b"good\nname key 5 many", "line 2 of .* is not KEY, or NAME KEY"),
        (b"name key 0", "line 1 of"),
        (b"name key 1 2 3", "line 1 of"),
        (b"name key\nname other", "line 2 of .* repeats the name name"),
        ("schlüssel".encode(), "line 1 of"),
        (b"\xff\xfe", "cannot be read: it is not text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_key_files_that_cannot_be(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        Keys(None, file)


# --- certificates -------------------------------------------------------------------------------


def test_certificates_that_cannot_be(tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path)
    check_certificate(cert, key)
    (other := tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=f"{cert} and {other}/key.pem have no certificate with"):
        check_certificate(cert, write_certificate(other)[1])
    with pytest.raises(ValueError, match=f"{cert} has no certificate with its key"):
        check_certificate(cert, None)
    both = tmp_path / "both"
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    check_certificate(both, None)
    for files in ((tmp_path / "none", key), (cert, tmp_path / "none")):
        with pytest.raises(ValueError, match=f"{tmp_path}/none cannot be read: No such file"):
            check_certificate(*files)
    locked = ["ec", "-in", str(key), "-aes128", "-passout", "pass:word", "-out", f"{key}.locked"]
    subprocess.run(["openssl", *locked], check=True, capture_output=True)
    with pytest.raises(ValueError, match=r"key.pem.locked has a password"):
        check_certificate(cert, Path(f"{key}.locked"))


# --- names --------------------------------------------------------------------------------------


def test_hosts_and_origins_are_whole_names(demo: LLM) -> None:
    with serving(demo) as served:
        for bad in ("evil.com@127.0.0.1", "127.0.0.1#x", "127.0.0.1/x", "[::1", "a b", "x:y@[::1]"):
            assert served.get("/health", Host=bad).status_code == 403
        host = served.url.removeprefix("http://")
        own = {f"http://{host}": 200, f"https://{host}": 403, f"ftp://{host}": 403}
        for origin, status in {**own, "http://[": 403, host: 403, f"http://{host}/": 403}.items():
            assert served.get("/v1/models", Origin=origin).status_code == status, origin


def test_the_networks_names_of_this_machine_are_ours(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Studio.evil.com")
    with serving(demo, host="0.0.0.0") as served:
        for name, status in (
            ("studio", 200),
            ("STUDIO.local:8080", 200),
            ("studio.evil.com", 403),  # which somebody else may have given to this machine
            ("other.local", 403),
        ):
            assert served.get("/health", Host=name).status_code == status
    with serving(demo) as served:  # to this machine alone
        assert served.get("/health", Host="studio.local").status_code == 403


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"cors_origins": ["foo"]}, "'foo' is not an origin; write https://"),
        ({"cors_origins": ["http://a.test/"]}, "not an origin"),
        ({"cors_origins": ["*", "null"]}, "'null' is not an origin"),
        ({"allowed_hosts": ["http://a.test"]}, "not a host name"),
        ({"allowed_hosts": ["a.test:8080"]}, "without a port"),
        ({"shutdown": -1}, "shutdown must be 0 seconds or more, not -1"),
        ({"shutdown": float("nan")}, "shutdown must be 0 seconds or more, not nan"),
        ({"trusted_proxies": ["proxy"]}, "'proxy' is not an address"),
        ({"key_file": Path("x"), "api_key": "y"}, "two sources of keys"),
        ({"tls_key": Path("x")}, "tls_key is the key of a certificate"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        Settings(model="demo", **settings)


@pytest.mark.parametrize(
    "origin", ["*", "http://localhost:3000", "https://a.b", "tauri://localhost", "http://[::1]:8"]
)
def test_origins_that_are_some(origin: str) -> None:
    assert Settings(model="demo", cors_origins=[origin]).cors_origins == [origin]


# --- the command ----------------------------------------------------------------------------------


def serve(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `qwen3 serve` as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", "qwen3_mlx", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "QWEN3_MODEL": "", "NO_COLOR": "1", **environment},
    )


@pytest.mark.heavy
def test_the_start_says_how_the_network_finds_it(tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_text("secret\n")
    file.chmod(0o600)
    with serve("--host", "0.0.0.0", "--key-file", str(file)) as process:
        assert process.stderr
        told = [process.stderr.readline() for _ in range(3)]
        process.terminate()
        told.append(process.stderr.read())
    port = re.findall(r"http://127.0.0.1:(\d+)", told[0])[0]
    name = socket.gethostname().split(".")[0].lower()
    assert f"http://{name}.local:{port}" in told[2] and told[2].startswith("from the network: ")
    assert "--api-key" not in "".join(told)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--key-file", "/nowhere/keys"],
            "the key file /nowhere/keys cannot be read: No such file",
        ),
        (["--cors-origin", "foo"], "'foo' is not an origin"),
        (["--request-timeout", "0"], "--request-timeout must be more than 0 seconds"),
    ],
)
def test_what_cannot_be_is_a_line_before_anything_is_loaded(
    arguments: list[str], complaint: str
) -> None:
    done = piped(["serve", "--port", "0", "--model", "./nowhere", *arguments])
    assert done.returncode == (2 if complaint.startswith("--") else 1)
    assert done.stderr.count("\n") == 1 and complaint in done.stderr
