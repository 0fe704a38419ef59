"""The hello and the loading, with followers that say wrong things; and the watchdog."""

import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qwen3_mlx import Qwen3Error, load
from qwen3_mlx.cluster import crew as crew_module
from qwen3_mlx.cluster import wire
from qwen3_mlx.cluster.crew import Crew, Peer
from qwen3_mlx.cluster.wire import Channel, Listener, WireError, join
from qwen3_mlx.errors import ClusterError
from qwen3_mlx.processes import module_command

LOOPBACK = "127.0.0.1"
HELLO = {"name": "mac2", "rank": None, "memory": 8_000_000_000}
CHECKED = {"weights": {}, "commit": "", "port": 20_001}


def load_with(
    follower: Callable[[Channel], None],
    caplog: pytest.LogCaptureFixture,
    hello: dict[str, Any] = HELLO,
    **options: Any,
) -> str:
    """Lead a follower that joins by hand and does as it likes; return the error of `load`."""

    def follow() -> None:
        while not (found := re.search(r"--join \S+:(\d+) --key (\S+)", caplog.text)):
            time.sleep(0.01)
        channel = join(LOOPBACK, int(found[1]), found[2], hello, 5)
        with suppress(OSError, EOFError):
            follower(channel)
        channel.close()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        with pytest.raises(Qwen3Error) as raised:
            load(**{"source": "demo", "hosts": [LOOPBACK, "join"], **options})
    finally:
        thread.join()
    return str(raised.value)


def test_a_follower_with_other_weights_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def follow(channel: Channel) -> None:
        channel.receive(5)
        channel.send({"alive": 1})
        channel.send({"checked": {**CHECKED, "weights": {"model.safetensors": "other"}}})
        channel.receive(5)

    error = load_with(follow, caplog)
    assert error.startswith("mac2 (rank 1) has another model.safetensors of ")


def test_a_follower_with_another_commit_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def follow(channel: Channel) -> None:
        channel.receive(5)
        channel.send({"checked": {**CHECKED, "commit": "0123456789abcdef"}})
        channel.receive(5)

    error = load_with(follow, caplog)
    assert error.startswith("mac2 (rank 1) has commit 0123456789ab of ")


@pytest.mark.heavy
def test_a_follower_by_hand_is_told_that_others_failed(caplog: pytest.LogCaptureFixture) -> None:
    """It waits to be connected then."""
    ended: list[subprocess.CompletedProcess[str]] = []

    def fail(channel: Channel) -> None:
        while "setup" not in channel.receive(30):
            pass
        channel.send({"failed": "no disk"})
        channel.receive(30)

    def follow() -> None:
        while not (found := re.search(r"--join \S+ --key \S+", caplog.text)):
            time.sleep(0.01)
        command = module_command("qwen3_mlx", "follow", *found[0].split(), "--rank", "1")
        ended.append(subprocess.run(command, capture_output=True, text=True, timeout=60))

    thread = threading.Thread(target=follow)
    thread.start()
    error = load_with(fail, caplog, {**HELLO, "rank": 2}, hosts=[LOOPBACK, "join", "join"])
    thread.join()
    assert "(rank 2): no disk" in error
    assert ended[0].returncode == 1
    assert ended[0].stderr == "qwen3: the leader has ended before all computed; it says why\n"


def test_an_error_of_a_follower_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    def follow(channel: Channel) -> None:
        channel.receive(5)
        channel.send({"failed": "the disk is full"})

    assert load_with(follow, caplog) == "mac2 (rank 1): the disk is full"


def test_a_follower_that_goes_while_loading_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def follow(channel: Channel) -> None:
        channel.receive(5)

    assert load_with(follow, caplog).startswith("mac2 (rank 1) is gone (")


def test_a_follower_with_too_little_memory_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    error = load_with(lambda channel: None, caplog, {**HELLO, "memory": 400_000_000}, layers=[1, 3])
    assert re.search(r"mac2: weights .* = 0\.\d GB of 0\.4 GB", error)


def test_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Qwen3Error, match="adapters run on one machine: merge it first"):
        load("demo", hosts="local:2", adapter=tmp_path)


# --- strangers ------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener(LOOPBACK, "key")
    yield found
    found.close()


def accepted(listener: Listener) -> tuple[list[Any], threading.Thread]:
    """Accept in the background; the list has the hello in the end."""
    found: list[Any] = []

    def accept() -> None:
        channel, hello = listener.accept(5)
        found.append(hello)
        channel.close()

    thread = threading.Thread(target=accept)
    thread.start()
    return found, thread


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + bytes(200),  # a TLS handshake
        struct.pack(">I", 5) + b"[1,2]",
        struct.pack(">I", 9) + b"{broken}}",
        struct.pack(">I", 2) + b"{}",
        struct.pack(">I", 200_000) + b"[" * 200_000,
        struct.pack(">I", 14) + '{"proof":"\u00e9"}'.encode(),
        struct.pack(">I", 18) + rb'{"proof":"\ud800"}',
        struct.pack(">I", 0xFFFFFFFF),
        b"",
    ],
)
def test_garbage_is_refused_and_the_next_is_accepted(
    garbage: bytes, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    found, thread = accepted(listener)
    with socket.create_connection((LOOPBACK, listener.port), 5) as stranger:
        stranger.sendall(garbage)
        with suppress(OSError):  # it may be refused already
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(1000):
                pass
    channel = join(LOOPBACK, listener.port, "key", HELLO, 5)
    thread.join()
    assert found[0]["name"] == "mac2"
    channel.close()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith("127.0.0.1: a connection of a stranger was refused: ")


def test_who_sends_a_byte_at_a_time_is_not_waited_for(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_HELLO_SECONDS", 0.5)
    found, thread = accepted(listener)
    stranger = socket.create_connection((LOOPBACK, listener.port), 5)
    stranger.sendall(struct.pack(">I", 1000))
    with suppress(OSError):
        for _ in range(30):
            stranger.sendall(b" ")
            time.sleep(0.05)
    stranger.close()
    join(LOOPBACK, listener.port, "key", HELLO, 5).close()
    thread.join()
    assert found[0]["name"] == "mac2"


@pytest.mark.parametrize(
    ("versions", "key", "reason"),
    [
        (wire.VERSIONS, "wrong", "its key is not that of this cluster"),
        (("0.0.1", "0.32.4"), "key", "it has qwen3-mlx 0.0.1 with MLX 0.32.4, the leader "),
    ],
)
def test_a_follower_that_does_not_fit_is_told_why(
    versions: tuple[str, str],
    key: str,
    reason: str,
    listener: Listener,
) -> None:
    refusing = threading.Thread(target=lambda: pytest.raises(TimeoutError, listener.accept, 1))
    refusing.start()
    hello = dict(zip(("version", "mlx"), versions, strict=True))
    channel = join(LOOPBACK, listener.port, key, {**HELLO, **hello}, 5)
    assert str(channel.receive(5)["refused"]).startswith(reason)
    channel.close()
    refusing.join()


def test_the_port_is_bound_to_the_address_of_the_link_alone() -> None:
    listener = Listener("127.0.0.2", "key")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, listener.port), 1)
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", listener.port), 1)


def test_a_process_that_connects_ends_with_the_leader_that_has_started_it() -> None:
    connects = """
import os, time
from qwen3_mlx.cluster import ring
with ring._ended_if_it_hangs(is_led=True):
    print(os.getpid(), flush=True)
    time.sleep(60)
"""
    leads = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {connects!r}])"
    leader = subprocess.Popen([sys.executable, "-c", leads], stdout=subprocess.PIPE, text=True)
    assert leader.stdout
    follower = int(leader.stdout.readline())
    try:
        leader.kill()
        leader.communicate(timeout=15)  # until nothing has its output open; alone it takes 20 s
    finally:
        with suppress(ProcessLookupError):
            os.kill(follower, signal.SIGKILL)
        leader.wait()


def test_a_process_that_cannot_connect_ends_though_nobody_reads_its_errors() -> None:
    connects = """
import time
from qwen3_mlx.cluster import ring
ring._CONNECT_SECONDS = 1
with ring._ended_if_it_hangs(is_led=False):
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", connects], stderr=subprocess.PIPE)
    assert process.stderr
    process.stderr.close()
    try:
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


def test_a_follower_without_a_leader_gives_up() -> None:
    port = wire.free_port(LOOPBACK)
    with pytest.raises(Qwen3Error, match=f"no leader answers at 127.0.0.1, port {port} "):
        join(LOOPBACK, port, "key", HELLO, 0.3)


# --- the watchdog ---------------------------------------------------------------------------------


class Fake:
    """The other end of a follower's connection."""

    def __init__(self) -> None:
        listener = socket.create_server((LOOPBACK, 0))
        theirs = socket.create_connection(listener.getsockname())
        ours = listener.accept()[0]
        listener.close()
        self.peer_channel, self.channel = Channel(ours), Channel(theirs)
        self.answers_pings = True
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with suppress(OSError, EOFError, WireError):
            while True:
                if "ping" in self.channel.receive() and self.answers_pings:
                    self.channel.send({"pong": 1})


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    monkeypatch.setattr(crew_module, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(crew_module, "_PING_SECONDS", 0.2)
    found = [Fake(), Fake()]
    yield found
    for fake in found:
        fake.channel.close()
        fake.peer_channel.close()
        fake.thread.join()


def crew_of(fakes: list[Fake], limit: float = 0.3) -> tuple[Crew, list[ClusterError]]:
    peers = [Peer(f"mac{n}", n, fake.peer_channel) for n, fake in enumerate(fakes, 1)]
    crew, failures = Crew(peers, limit), list[ClusterError]()
    crew.on_failure(failures.append)
    return crew, failures


def wait_for(failures: list[ClusterError], seconds: float = 5) -> str:
    end = time.monotonic() + seconds
    while not failures:
        assert time.monotonic() < end
        time.sleep(0.01)
    return str(failures[0])


def test_the_silent_one_of_those_that_wait_is_named(fakes: list[Fake]) -> None:
    crew, failures = crew_of(fakes)
    fakes[1].answers_pings = False
    crew.begin(1, 1)
    error = wait_for(failures)
    assert error == "mac2 (rank 2) has not answered for 0 s; the cluster is down, start it again"
    with pytest.raises(ClusterError, match="mac2"):
        crew.send({"plan": 1})
    crew.close()


def test_one_that_answers_but_does_not_compute_is_named(fakes: list[Fake]) -> None:
    crew, failures = crew_of(fakes)
    crew.begin(1, 1)
    fakes[0].channel.send({"ack": 1})
    assert wait_for(failures).startswith("mac2 (rank 2) has not answered")
    crew.close()


def test_steps_that_are_done_or_acknowledged_raise_no_alarm(fakes: list[Fake]) -> None:
    crew, failures = crew_of(fakes)
    crew.begin(1, 1)
    crew.done()
    time.sleep(0.5)
    crew.begin(2, 1)
    for fake in fakes:
        fake.channel.send({"ack": 2})  # the leader is slow by itself
    time.sleep(0.8)
    assert not failures
    crew.close()
    assert crew.failure is None


def test_the_limit_follows_the_steps(fakes: list[Fake]) -> None:
    crew, _ = crew_of(fakes, limit=0.1)
    assert crew.limit == 0.1
    crew.begin(1, 64)
    for fake in fakes:
        fake.channel.send({"ack": 1})
    time.sleep(0.05)
    crew.done()
    crew.begin(2, 1)
    assert 1.0 <= crew.limit < 4  # 20 times the longest
    crew.begin(3, 2048)
    assert crew.limit >= 32  # 20 times what so many tokens take
    crew.close()


def test_a_connection_that_ends_is_noticed_while_nothing_runs(fakes: list[Fake]) -> None:
    crew, failures = crew_of(fakes)
    fakes[0].channel.close()
    assert wait_for(failures, 1).startswith("mac1 (rank 1) is gone (")
    with pytest.raises(ClusterError):
        crew.ask({"read": 1})
    crew.close()
