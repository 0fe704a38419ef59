"""The programs that attack a server and look at what stays behind: that they work, and can fail."""

import random
import sys

import pytest

from benchmarks import hostile, payloads, server_soak
from benchmarks.served import Serve, serve
from qwen3_mlx import LLM
from tests.server.serving import serving


@pytest.mark.parametrize(
    ("path", "status", "said", "fault"),
    [
        ("/v1/chat/completions", 200, b"data: [DONE]", None),
        ("/v1/completions", 500, b"{}", "answers 500"),
        ("/v1/completions", 400, b'{"error": {"type": "a", "message": "b (a bug?)"}}', "a bug"),
        ("/v1/completions", 400, b'{"error": {"type": "a", "message": "b"}}', "another form"),
        (
            "/v1/completions",
            400,
            b'{"error": {"type": "a", "message": "b", "code": null, "param": null}}',
            None,
        ),
        ("/v1/messages", 400, b'{"error": "b"}', "another form"),
        ("/v1/messages", 400, b'{"type": "error", "error": {"type": "a", "message": "b"}}', None),
        ("/api/chat", 400, b'{"error": "b"}', None),
        ("/api/chat", 400, b"sorry", "another form"),
    ],
)
def test_what_is_wrong_with_an_answer_is_seen(
    path: str, status: int, said: bytes, fault: str | None
) -> None:
    found = hostile.fault_of(path, status, said)
    assert (found is None) if fault is None else (found and fault in found)


@pytest.mark.heavy
def test_what_is_mutated_was_valid_and_is_the_same_each_time(demo: LLM) -> None:
    with serving(demo) as served:
        statuses = {
            path: served.post(path, body).status_code for path, body in payloads.VALID.items()
        }
    assert set(statuses.values()) == {200}, statuses
    made = [payloads.mutated_request(random.Random(seed)) for seed in range(200)]
    assert made == [payloads.mutated_request(random.Random(seed)) for seed in range(200)]
    assert len({content for _, content in made}) > 100


@pytest.mark.heavy
def test_an_attack_is_a_row_and_a_server_that_dies_is_a_fault(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hostile.row(hostile.Attack("some", hostile.mutations(20), SMALL, wait=300))
    assert not hostile.row(hostile.Attack("end", _end, SMALL))
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("some ") and "400:" in rows[0]
    assert rows[1].startswith("end ") and any("FAULT the server is dead" in row for row in rows)


SMALL = ("--context", "512")


def _end(target: hostile.Target) -> None:
    target.faults["it is ended by the test"] += 0
    _SERVERS[target.port].stop(10)


_SERVERS: dict[int, Serve] = {}


@pytest.fixture(autouse=True)
def known_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the servers by their ports, so that an attack can end one."""

    def warm_up(served: Serve) -> None:
        _SERVERS[served.port] = served

    monkeypatch.setattr(hostile, "warm_up", warm_up)
    for name in ("_PATIENCE", "_MARGIN"):  # the machine may be busy
        monkeypatch.setattr(hostile, name, 300.0)


@pytest.mark.slow
def test_a_soak_tells_whether_memory_grows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["soak", "8"])
    monkeypatch.setattr(server_soak, "_LOOKS", 4)
    monkeypatch.setattr(server_soak, "_LIMIT", -10.0)  # whatever it does
    monkeypatch.setattr(server_soak, "_AT_ONCE", 4)
    with pytest.raises(SystemExit) as ended:
        server_soak.main()
    assert ended.value.code == "memory grows"
    assert "memory has grown in the second half by" in capsys.readouterr().out


@pytest.mark.heavy
def test_the_options_of_a_server_are_its_own() -> None:
    with serve(("--api-key", "k"), "-n 256") as served:
        target = hostile.Target(served.port)
        target.expect(401, "/v1/models", {}, "GET")
        target.expect(200, "/v1/models", {"x-api-key": "k"}, "GET")
        assert not target.faults and served.alive
        assert served.stop(20) < 20 and not served.alive
