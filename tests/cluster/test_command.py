"""The command on several ranks: serve, ask, follow by hand and by ssh, and under mlx.launch."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen3_mlx import Qwen3Error, load
from qwen3_mlx.cluster.joining import control_of
from qwen3_mlx.cluster.wire import free_port
from tests.cli.harness import piped
from tests.cluster.harness import end_group
from tests.embedding_twins import write_twin

QWEN3 = [sys.executable, "-P", "-m", "qwen3_mlx"]
LOCAL = ["--hosts", "local:2", "--no-dequantize"]


@contextmanager
def running(
    *arguments: str, cwd: Path | None = None, **variables: str
) -> Iterator["subprocess.Popen[str]"]:
    """Run the command for the block; none of its processes is left after it."""
    process = subprocess.Popen(
        [*QWEN3, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **variables},
        cwd=cwd,
    )
    try:
        yield process
    finally:
        end_group(process)


def run(*arguments: str, seconds: float = 60, **variables: str) -> tuple[int, str]:
    with running(*arguments, cwd=None, **variables) as process:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said


def line_with(process: "subprocess.Popen[str]", text: str) -> str:
    """Return the next line of a process that has a text."""
    assert process.stdout
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"ended without {text}")


def follower_of(process: "subprocess.Popen[str]") -> int:
    """Return the process of the only follower that a leader has started."""
    found = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    (pid,) = (
        int(line.split()[0])
        for line in found.stdout.splitlines()
        if line.split()[1] == str(process.pid) and " follow " in line
    )
    return pid


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < end, f"process {pid} is left after {seconds} s"
        time.sleep(0.05)


@contextmanager
def serving(
    *arguments: str, cwd: Path | None = None
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    with running("serve", *LOCAL, "--port", "0", *arguments, cwd=cwd) as process:
        line = line_with(process, "is served at")
        yield process, re.search(r"http://[\d.:]+", line)[0]  # type: ignore[index]


def chat(url: str, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "What is 12 + 34?"}], **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)


@pytest.mark.heavy
def test_a_server_whose_follower_is_killed_says_so_and_ends(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('a module of the folder was imported')")
    with serving(cwd=tmp_path) as (process, url):
        assert chat(url, seed=1).json()["choices"][0]["message"]["content"] == "12 + 34 = 46"
        asked = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
        assert httpx.post(f"{url}/api/chat", json=asked, timeout=30).status_code == 200
        follower = follower_of(process)
        body = {"prompt": "What is 1 + 1? " * 30, "max_tokens": 4000, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(follower, signal.SIGKILL)
            killed_at = time.monotonic()
            last = [line for line in lines if line.startswith("data: ")][-1]
        assert time.monotonic() - killed_at < 10
        assert (
            "local (rank 1) is gone" in json.loads(last.removeprefix("data: "))["error"]["message"]
        )
        refused, health = chat(url), httpx.get(f"{url}/health")
        assert refused.status_code == 503 and "the cluster is down" in refused.text
        assert health.status_code == 503 and health.json()["status"] == "down"
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 1
        assert re.fullmatch(r"qwen3: local \(rank 1\) is gone .*", said.splitlines()[-1])


@pytest.mark.heavy
def test_a_leader_that_is_killed_takes_its_followers_along() -> None:
    with serving() as (process, _):
        follower = follower_of(process)
        process.kill()
        process.wait()
        wait_until_gone(follower, 10)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_stops_lets_its_followers_end(number: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the reply that runs is finished all the same."""
    with serving() as (process, url):
        follower = follower_of(process)
        body = {"prompt": "What is 1 + 1? " * 30, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        process.communicate(timeout=20)
        assert process.returncode == 0 and not is_alive(follower)


@pytest.mark.slow
def test_idle_ranks_take_no_time() -> None:
    with serving() as (process, url):
        chat(url, seed=1)
        ranks = [process.pid, follower_of(process)]
        time.sleep(1)
        before = [cpu_seconds(pid) for pid in ranks]
        time.sleep(3)
        used = [cpu_seconds(pid) - start for pid, start in zip(ranks, before, strict=True)]
        assert used[1] < 0.03  # of the follower
        assert used[0] < 0.3  # the leader's event loop ticks as without a cluster


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- how followers come ---------------------------------------------------------------------------


def stand_in(folder: Path, script: str) -> str:
    """Put an `ssh` of our own first in the path; return that."""
    (folder / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ssh").chmod(stat.S_IRWXU)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.heavy
def test_followers_are_started_by_ssh(tmp_path: Path) -> None:
    path = stand_in(tmp_path, f'echo "$@" >> {tmp_path}/called\nfor last; do :; done\neval "$last"')
    hosts = ["--hosts", "127.0.0.1,user@mac2", "--layers", "2,2", "--no-dequantize"]
    code, said = run("What is 12 + 34?", *hosts, "--no-thinking", "-q", PATH=path)
    assert code == 0 and said.startswith("12 + 34 = ")
    called = (tmp_path / "called").read_text()
    assert called.startswith("-T -o BatchMode=yes user@mac2 if [ -x ")
    assert "--key - " in called  # the key itself is on no command line


def test_an_ssh_that_fails_is_reported(tmp_path: Path) -> None:
    path = stand_in(tmp_path, "exit 255")
    code, said = run("Hello", "--hosts", "127.0.0.1,mac2", PATH=path)
    assert code == 1
    assert said == (
        "qwen3: mac2 (rank 1): the follower ended with exit code 255; see whether `ssh mac2 qwen3 "
        "doctor` works without a password; qwen3-mlx must be installed there\n"
    )


@pytest.mark.heavy
def test_a_follower_joins_by_hand() -> None:
    """What is no follower of this cluster is refused, and those that wait go on."""
    hosts = ["--hosts", "127.0.0.1,join", "--no-dequantize", "-q", "--no-thinking"]
    with running("What is 12 + 34?", *hosts) as leader:
        line = line_with(leader, "waiting for a follower")
        command = line.partition("run: qwen3 ")[2].split()
        port = int(command[2].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.settimeout(5)
            with suppress(ConnectionResetError):
                while stranger.recv(1000):
                    pass
        wrong = [*command[:-1], "wrong"]
        assert run(*wrong) == (
            1,
            "qwen3: the leader refuses this machine: its key is not that of this cluster\n",
        )
        assert "refused: what it sends is no message" in line_with(leader, "refused")
        with running(*command) as follower:
            said, _ = leader.communicate(timeout=30)
            assert leader.returncode == 0
            assert said.splitlines()[-1].startswith("12 + 34 = ")
            assert follower.wait(10) == 0


@pytest.mark.slow
def test_ranks_of_mlx_launch(tmp_path: Path) -> None:
    ports = [free_port("127.0.0.1") for _ in range(2)]
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    command = ["What is 12 + 34?", "--hosts", "env", "--no-thinking", "-q", "--no-dequantize"]
    with running(*command, MLX_RANK="1", MLX_HOSTFILE=str(file)) as follower:
        code, said = run(*command, MLX_RANK="0", MLX_HOSTFILE=str(file))
        assert code == 0 and said.startswith("12 + 34 = ")
        assert follower.wait(10) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": "mac1"}, "hosts must be this machine and at least another"),
        ({"hosts": "a,a"}, "hosts must be different names"),
        ({"hosts": ["a", "b"], "split": "rows"}, "must be pipeline or tensor, not 'rows'"),
        ({"split": "tensor"}, "split: it divides a model among hosts; name those as well"),
        ({"layers": "2,2"}, "layers: it divides a model among hosts"),
        ({"hosts": "local:99"}, "4 layers are too few for 99 hosts"),
        ({"hosts": "local:9", "split": "tensor"}, "2 key/value heads are too few for 9 hosts"),
        ({"hosts": f"local:{10**30}"}, "hosts must be at most 100 machines"),
        ({"hosts": "mac1,-oProxyCommand=x"}, "hosts: '-oProxyCommand=x' is no name of a machine"),
        ({"hosts": 5}, "hosts must be a list of names, or a text such as local:2, not 5"),
        ({"hosts": ["mac1", 2]}, "hosts must be a list of names"),
        ({"hostfile": 5}, "hostfile must be the path of a file, not 5"),
        ({"hosts": "local:2", "layers": [1.5, 2.5]}, "must be a number for each host"),
        ({"hosts": "local:2", "layers": "2,x"}, "must be a number for each host"),
        ({"hosts": "env"}, "needs the variables of mlx.launch"),
        ({"hosts": "local:2", "hostfile": "x"}, "hostfile: it names the machines, as hosts does"),
        ({"hostfile": "/nowhere.json"}, "is no hostfile of mlx.launch: No such file"),
        ({"hosts": ["192.0.2.1", "join"]}, "192.0.2.1 is no address of this machine; the"),
        ({"hosts": ["no.such.name.invalid", "join"]}, "no address is known for no.such"),
    ],
)
def test_wrong_hosts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, Qwen3Error), match=message):
        load("demo", **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"ssh": "mac1", "ips": ["192.0.2.1"]}], "hostfile must be this machine and at least"),
        ([{"ssh": "mac1", "ips": "192.0.2.1"}, {"ssh": "mac2"}], "must be a list of objects with"),
        (
            [{"ssh": "mac1", "ips": [5]}, {"ssh": "mac2", "ips": [None]}],
            "must be a list of objects",
        ),
        ([{"ssh": 5}, {"ssh": "mac2"}], "must be a list of objects"),
        ([{"ssh": "mac1"}, {"ssh": "-F/x"}], "hostfile: '-F/x' is no name of a machine"),
    ],
)
def test_wrong_hostfiles_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(content))
    with pytest.raises((ValueError, Qwen3Error), match=message):
        load("demo", hostfile=file)


@pytest.mark.parametrize(
    ("rank", "content", "message"),
    [
        ("0", [["127.0.0.1:23111"]], "MLX_RANK is 0, and .* has 1 hosts"),
        ("5", [["127.0.0.1:23111"], ["127.0.0.1:23112"]], "MLX_RANK is 5, and .* has 2 hosts"),
        ("0", [[5], [6]], "is no file of mlx.launch"),
        ("0", [["127.0.0.1"], ["127.0.0.1"]], "addresses and ports are expected"),
        ("0", {"hosts": []}, "is no file of mlx.launch"),
    ],
)
def test_wrong_variables_of_mlx_launch_are_refused(
    rank: str, content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(content))
    monkeypatch.setenv("MLX_RANK", rank)
    monkeypatch.setenv("MLX_HOSTFILE", str(file))
    with pytest.raises(Qwen3Error, match=message):
        load("demo", hosts="env")


def test_a_control_port_lies_beside_those_of_mlx_launch() -> None:
    ports = [control_of({"hosts": [f"127.0.0.1:{port}"]})[1] for port in (5000, 65_400)]
    assert ports == [5500, 64_900]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["embedding", "reranker"])
def test_what_is_no_chat_model_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(Qwen3Error, match="embedding and reranking run on one machine"):
        load(write_twin(name, tmp_path / name), hosts="local:2")


@pytest.mark.heavy
def test_a_chat_keeps_its_model() -> None:
    said = "What is 12 + 34?\n/model 8B\nWhat is 1 + 2?\n"
    done = subprocess.run(
        [*QWEN3, "chat", "-m", "demo", *LOCAL, "--no-thinking", "-q"],
        input=said,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1  # one of its commands failed
    assert "this model stays until the end of the chat" in done.stderr
    assert "12 + 34 = " in done.stdout and "1 + 2 = " in done.stdout


@pytest.mark.heavy
def test_a_program_that_closes_nothing_ends_in_silence() -> None:
    program = (
        "import sys; from qwen3_mlx import load; "
        "print(load('demo', hosts='local:2').chat('What is 12 + 34?', thinking=False).text); "
        "sys.exit(3)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "") and "12 + 34 = " in done.stdout


def test_what_runs_on_one_machine_is_refused() -> None:
    for words in (["eval", "perplexity"], ["convert", "demo", "x"], ["tune", "demo"]):
        done = piped([*words, "--hosts", "local:2"])
        assert done.returncode == 2 and "--hosts" in done.stderr
    done = piped(["serve", "-m", "demo", "-m", "0.6B", "--hosts", "local:2"])
    assert done.returncode == 2 and "--hosts serves one model" in done.stderr


def test_doctor_looks_for_the_model_first() -> None:
    code, said = run("doctor", "--hosts", "local:2", "nowhere")
    assert code == 1 and said.startswith("qwen3: 'nowhere' is no folder here")


@pytest.mark.slow
def test_doctor_examines_hosts() -> None:
    code, said = run("doctor", "--hosts", "local:2", "demo")
    assert code == 0
    assert re.search(r"local  127\.0\.0\.1  [\d.]+ GB  leads       complete\n", said)
    assert re.search(r"local  127\.0\.0\.1  [\d.]+ GB  [\d.]+ ms +complete\n", said)
    assert "All have qwen3-mlx" in said


@pytest.mark.heavy
def test_plan_shows_each_host() -> None:
    done = piped(["plan", "32B", "--hosts", "24,36", "--json"])
    found = {(one["fmt"], one["split"]): one for one in json.loads(done.stdout)}
    small, large = found["4 bits", "pipeline"]["hosts"]
    assert small["total"] <= small["available"] == 17_179_869_184
    assert "head" in small["share"] and "embedding" in large["share"]
    assert large["weights"] > small["weights"]
    assert found["4 bits", "pipeline"]["messages"] == 2
    assert found["4 bits", "tensor"]["messages"] == 129
    assert "does not fit" in found["bf16", "pipeline"]["reason"]
    # A Mac reads 2,048 tokens at once, whatever machine plans.
    assert large["activations"] == pytest.approx(1.55e9, rel=0.01)
    shown = piped(["plan", "32B", "--hosts", "24,36", "--layers", "24,40"]).stdout
    assert "0: 24 GB, layers 40-63 + head" in shown
    alone = piped(["plan", "32B", "--hosts", "24"])
    assert alone.returncode == 2 and "--hosts need the memory of two machines" in alone.stderr


def test_what_cannot_be_divided_is_refused_before_anything_starts() -> None:
    done = piped(["Hello", "--hosts", "local:2", "--split", "tensor", "--layers", "1,3"])
    assert done.returncode == 2 and "--layers: they belong to a pipeline" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("split", "moved"), [("pipeline", "2 .* 0.8"), ("tensor", "9 .* 6.0")])
def test_bench_shows_what_goes_between_hosts(split: str, moved: str) -> None:
    small = ["--prompts", "8", "--together", "2", "--decode", "3", "--split", split]
    code, said = run("bench", "demo", "--hosts", "local:2", "--against", "mlx-lm", *small)
    assert code == 0 and "8 together" not in said
    assert re.search(rf"Between the hosts: {moved} KiB a token, \d+ bytes", said)
    assert re.search(r"\d+% of the time was spent waiting for them", said)
