"""Attacks of hostile clients on a server: python -m benchmarks.hostile [--count N] [CLASS ...]

Each row is an attack on its own `qwen3 serve` with the demo, watched from another process. The
columns are: the longest wait for /health in seconds (`own` is the server's part: at most the time
its threads ran, without the time they waited for a core), the longest gap in a reply streamed
meanwhile, the resident memory, the seconds from SIGTERM to exit, and the answers by status. Faults
are: /health or the stream waits longer than 0.3 s of the server's own part; 300 MB more are held;
an answer does not have its protocol's form or reports a bug; the log has a traceback or the text of
a prompt; an ordinary request is not answered afterwards; threads or files are left open; SIGTERM
does not end the server.
"""

import argparse
import http.client
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks import payloads, sockets
from benchmarks.served import ENDS, Held, Serve, held, serve, watched

_WAIT = 0.3  # seconds of the server's own
_WAITS = (_WAIT, 0.5)  # several requests: the masks of all their grammars are computed in one step
_MEMORY = 300_000_000  # bytes above the start
_PATIENCE = 30.0  # seconds for an answer
_MARGIN = 10.0  # seconds to exit in, beyond those of --shutdown
_SETTLE = 20.0  # seconds in which threads and files must be closed
_AT_ONCE = 8
_KEY = "a-key-of-its-own"
_FINE = frozenset((200, 400, 404, 405, 413, 429, 503))


@dataclass(slots=True)
class Target:
    """A server under attack, its answers by status, and the faults found."""

    port: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def send(
        self, path: str, body: Any, headers: Mapping[str, str] | None = None, method: str = "POST"
    ) -> int:
        """Send a request, check the answer, and return its status, or 0 without an answer."""
        content = payloads.encoded(body)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        fields = {"Content-Type": "application/json", "Connection": "close", **(headers or {})}
        try:
            with suppress(ConnectionError):  # the server stops reading early, but may answer
                connection.request(method, path, content, fields)
            answer = connection.getresponse()
            status, said = answer.status, answer.read()
        except TimeoutError:
            self.outcomes["none"] += 1
            self.faults[f"no answer in {_PATIENCE:.0f} s"] += 1
            return 0
        except (OSError, http.client.HTTPException):
            self.outcomes["closed"] += 1
            return 0
        finally:
            connection.close()
        self.outcomes[str(status)] += 1
        if fault := fault_of(path, status, said):
            self.faults[fault] += 1
        return status

    def expect(self, wanted: int, path: str, headers: Mapping[str, str], method: str) -> None:
        """Send a request and record a fault if the status is not `wanted`."""
        status = self.send(path, b"", headers, method)
        if status != wanted:
            self.faults[f"{method} {path} {dict(headers)} answers {status}, not {wanted}"] += 1


def fault_of(path: str, status: int, said: bytes) -> str | None:
    """Return the fault of an answer, or None."""
    if status not in _FINE | {401, 403}:
        return f"{path} answers {status}: {said[:120]!r}"
    if b"Traceback" in said or b"(a bug?)" in said:
        return f"{path} tells of a bug: {said[:120]!r}"
    if status == 200 or not path.startswith(("/v1/", "/api/")):
        return None
    with suppress(ValueError, KeyError, TypeError):
        error = json.loads(said)["error"]
        if path.startswith("/api/"):
            right = isinstance(error, str)
        else:
            right = bool(error["type"] and error["message"])
            right &= path.startswith(payloads.ANTHROPIC) or {"code", "param"} <= set(error)
        if right:
            return None
    return f"{path}: an error {status} of another form: {said[:120]!r}"


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack, and the options of the server that it runs against.

    Attributes:
        name: the label of the row.
        run: sends the requests.
        options: options of `qwen3 serve`.
        files: arguments of `ulimit` before the server starts, for file descriptors.
        streamed: True if a reply is streamed meanwhile, to measure gaps.
        wait: seconds of the server's own part that /health may take.
        shutdown: the value of --shutdown, in seconds.
        signals: number of SIGTERMs sent while the attack goes on; 0 sends one afterwards.
    """

    name: str
    run: Callable[[Target], None]
    options: tuple[str, ...] = ()
    files: str = ""
    streamed: bool = False
    wait: float = _WAIT
    shutdown: int = 1
    signals: int = 0


def main() -> None:
    """Run the named classes of attacks, or all, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--count", type=int, default=10_000, help="of requests that are mutated")
    options = parser.parse_args()
    classes = attacks(options.count)
    for name in options.classes:
        if name not in classes:
            parser.error(f"no class {name!r}: there are {', '.join(classes)}")
    print(
        f"{'':27}{'/health waits':>15}{'stream':>8}{'resident, MB':>21}{'out':>6}\n"
        f"{'':27}{'own':>8}{'all':>7}{'gap':>8}{'before':>7}{'peak':>7}{'after':>7}{'s':>6}"
        "  answers"
    )
    faulty = 0
    for name in options.classes or classes:
        for attack in classes[name]:
            faulty += not row(attack)
    print(f"\n{faulty} with faults" if faulty else "\nno faults")
    sys.exit(bool(faulty))


def row(attack: Attack) -> bool:
    """Run an attack, print its row and faults, and return whether there were no faults."""
    options = ("--shutdown", str(attack.shutdown), *attack.options)
    with serve(options, attack.files) as served:
        target = Target(served.port)
        warm_up(served)
        before = held(served.pid)
        if attack.signals:
            attack.run(target)
            seen, after = {}, held(served.pid)
        else:
            with watched(served, stream=attack.streamed) as seen:
                attack.run(target)
            after = settled(served, before, target) if served.alive else before
        judge(attack, served, target, before, seen)
        out = served.stop(attack.shutdown + _MARGIN, attack.signals or 1)
        allowed = _MARGIN if attack.signals > 1 else attack.shutdown + _MARGIN
        if out > allowed:
            target.faults[f"SIGTERM does not end it in {allowed:.0f} s"] += 1
        check_log(served.log(), target)
    answers = " ".join(f"{end}:{n:,}" for end, n in sorted(target.outcomes.items()))
    peak = max(seen.get("peak", 0.0), after.resident)
    print(
        f"{attack.name:27}{seen.get('own', 0.0):8.2f}{seen.get('wait', 0.0):7.2f}"
        f"{seen.get('gap', 0.0):8.2f}{before.resident / 1e6:7.0f}{peak / 1e6:7.0f}"
        f"{after.resident / 1e6:7.0f}{out:6.1f}  {answers}"
    )
    for fault, times in target.faults.most_common(5):
        print(f"{'':27}FAULT {fault}" + f" ({times:,} times)" * (times > 1))
    sys.stdout.flush()
    return not target.faults


def warm_up(served: Serve) -> None:
    """Send ordinary requests, so that lazy imports are done and all usual threads exist."""
    target = Target(served.port)
    key = {"x-api-key": _KEY}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for path, body in list(payloads.VALID.items()) * 3:
            pool.submit(target.send, path, body, key)
    target.send("/openapi.json", b"", key, "GET")


def settled(served: Serve, before: Held, target: Target) -> Held:
    """Wait until threads and files are as before; return what the process holds then."""
    started = time.perf_counter()
    while True:
        after = held(served.pid)
        kept = after.files > before.files + 2 or after.threads > before.threads + 4
        if not kept:
            return after
        if time.perf_counter() - started > _SETTLE:
            threads = f"{before.threads} -> {after.threads}"
            target.faults[f"threads {threads}, files {before.files} -> {after.files}"] += 1
            return after
        time.sleep(0.2)


def judge(
    attack: Attack, served: Serve, target: Target, before: Held, seen: Mapping[str, float]
) -> None:
    """Record the faults during the attack, and whether ordinary requests work afterwards."""
    if not served.alive:
        target.faults["the server is dead"] += 1
    for name, what in (("own", "/health waits"), ("gap", "a stream stands still for")):
        if seen.get(name, 0.0) > attack.wait:
            target.faults[f"{what} {seen[name]:.2f} s"] += 1
    if seen.get("failed"):
        target.faults["/health is not answered"] += round(seen["failed"])
    if (more := seen.get("peak", 0.0) - before.resident) > _MEMORY:
        target.faults[f"{more / 1e6:,.0f} MB more are held"] += 1
    if attack.signals or not served.alive:
        return
    after = Target(served.port)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}
    for words, fields in (("a chat", {}), ("a form", {"response_format": form})):
        if after.send(payloads.CHAT, payloads.chat(**fields), {"x-api-key": _KEY}) != 200:
            target.faults[f"{words} is not answered afterwards"] += 1


def check_log(log: str, target: Target) -> None:
    """Record faults in the log: tracebacks, prompts, too many lines."""
    lines = log.count("\n")
    if "Traceback" in log:
        target.faults["tracebacks in the log"] += log.count("Traceback")
    if payloads.SECRET in log:
        target.faults["what was said is in the log"] += log.count(payloads.SECRET)
    if lines > 10 * (target.outcomes.total() + 1000):
        target.faults[f"{lines:,} lines in the log"] += 1


def attacks(count: int) -> dict[str, list[Attack]]:
    """Return all attacks by class; `count` is the number of mutated requests."""
    small = ("--context", "512")
    key = ("--api-key", _KEY)
    bombs = [
        Attack(name, at_once(payloads.CHAT, made, n), streamed=True, wait=_WAITS[n > 1])
        for name, (made, n) in payloads.BOMBS.items()
    ]
    compiling = in_background(payloads.CHAT, payloads.BOMBS["2^18 ways"][0], _AT_ONCE)
    choosing = in_background(payloads.CHAT, *payloads.BOMBS["8 x 100,000 choices"])
    return {
        "mutated": [Attack(f"{count:,} mutated requests", mutations(count), small)],
        "oddities": [Attack(f"{len(payloads.ODDITIES)} oddities", oddities, small)],
        "large": [
            Attack(name, at_once(path, made, 1), streamed=True)
            for name, (path, made) in payloads.LARGE.items()
        ],
        "bombs": bombs,
        "sockets": [
            Attack(f"{len(sockets.FRAMES)} frames, 100 piped", on_sockets(sockets.frames)),
            Attack("headers without end", on_sockets(sockets.headers)),
            Attack("bodies without end", on_sockets(sockets.bodies)),
            Attack("500 half-open", on_sockets(sockets.half_open)),
            Attack(
                "500 half-open, 256 files",
                on_sockets(sockets.half_open),
                files="-n 256",
                wait=5.0,  # until half-open connections time out and free a descriptor
            ),
            Attack("the same, soft limit", on_sockets(sockets.half_open), files="-S -n 256"),
            Attack(
                "slow readers, no slots",
                on_sockets(sockets.slow_readers),
                ("--max-requests", str(sockets.SLOTS)),
            ),
        ],
        "doors": [Attack("hosts, origins, keys, paths", doors, key)],
        "signals": [
            Attack("SIGTERM, forms compile", compiling, signals=1),
            Attack("SIGTERM, choices compile", choosing, signals=1),
            Attack("SIGTERM, replies run", running, signals=1),
            Attack("SIGTERM twice, replies run", running, shutdown=60, signals=2),
        ],
    }


def mutations(count: int) -> Callable[[Target], None]:
    """Return an attack with `count` mutated requests, 8 at once; the same in every run."""

    def run(target: Target) -> None:
        def one(seed: int) -> None:
            draw = random.Random(seed)
            path, content = payloads.mutated_request(draw)
            kind = draw.choice(("application/json", "application/json", "text/plain", "x"))
            target.send(path, content, {"Content-Type": kind})

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(one, range(count)))

    return run


def oddities(target: Target) -> None:
    """Send each of the odd bodies."""
    for path, body in payloads.ODDITIES:
        target.send(path, body)


def at_once(path: str, made: Callable[[], Any], times: int) -> Callable[[Target], None]:
    """Return an attack that sends one body `times` times at once."""

    def run(target: Target) -> None:
        content = payloads.encoded(made())
        with ThreadPoolExecutor(times) as pool:
            list(pool.map(lambda _: target.send(path, content), range(times)))

    return run


def in_background(path: str, made: Callable[[], Any], times: int) -> Callable[[Target], None]:
    """Return an attack that sends a body `times` times without waiting for answers."""

    def run(target: Target) -> None:
        content = payloads.encoded(made())
        for _ in range(times):
            connection = http.client.HTTPConnection("127.0.0.1", target.port)
            connection.request("POST", path, content, {"Content-Type": "application/json"})
            _KEPT.append(connection)
        target.outcomes["sent"] += times
        time.sleep(1.0)  # until the server works on it

    return run


_KEPT: list[http.client.HTTPConnection] = []  # open until this program ends


def running(target: Target) -> None:
    """Start 8 long streamed replies."""
    fields: dict[str, Any] = {"stream": True, "max_tokens": 4000, "temperature": 1.5}
    fields["logit_bias"] = dict.fromkeys(ENDS, -100)
    in_background(payloads.CHAT, lambda: payloads.chat(**fields), _AT_ONCE)(target)


def on_sockets(attack: Callable[[int], Counter[str]]) -> Callable[[Target], None]:
    """Return an attack that works on raw sockets."""

    def run(target: Target) -> None:
        ends = attack(target.port)
        for wrong in ends.keys() & {"open", "then open", "then closed", "at last 429"}:
            target.faults[f"a connection ends: {wrong}"] += ends[wrong]
        target.outcomes += ends

    return run


_HERE = {"Authorization": f"Bearer {_KEY}"}
_OTHER_HOSTS = (
    "evil.com",
    "localhost.evil.com",
    "127.0.0.1.evil.com",
    "evil.com:80",
    "",
    "[",
    "a b",
)
_OTHER_PAGES = (
    "http://evil.com",
    "null",
    "http://localhost.evil.com",
    "https://evil.com@localhost",
)
_WRONG_KEYS = (
    *("", "Bearer", "Bearer ", f"Bearer {_KEY}x", f"Bearer {_KEY[:-1]}", "Bearer \u00e9"),
    *(f"Basic {_KEY}", f"Bearer {_KEY.upper()}", f"Bearer {_KEY},{_KEY}"),
)
_PATHS = (
    *("/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd"),
    *("/../../etc/passwd", "/page/%00", "/page/index.html%00.js", "/page/...", "/v1/%2e%2e/x"),
)


def doors(target: Target) -> None:
    """Send requests with other hosts and origins, wrong keys, and paths that do not exist."""

    def each(wanted: int, path: str, headers: Iterable[Mapping[str, str]]) -> None:
        for one in headers:
            target.expect(wanted, path, one, "GET")

    each(403, "/v1/models", ({**_HERE, "Host": host} for host in _OTHER_HOSTS))
    each(403, "/v1/models", ({**_HERE, "Origin": page} for page in _OTHER_PAGES))
    each(
        401,
        "/v1/models",
        ({"Authorization": key.encode().decode("latin-1")} for key in _WRONG_KEYS),
    )
    each(401, "/v1/models", ({"x-api-key": key} for key in ("", "x", _KEY[:-1])))
    each(200, "/v1/models", (_HERE, {"x-api-key": _KEY}))
    each(
        200,
        "/v1/models",
        ({**_HERE, "Host": host} for host in ("localhost", "127.0.0.1:1", "[::1]")),
    )
    for path in (*payloads.VALID, "/openapi.json", "/api/tags", "/api/ps", "/metrics"):
        target.expect(401, path, {}, "POST" if path in payloads.VALID else "GET")
    for path in _PATHS:
        target.expect(404, path, _HERE, "GET")


if __name__ == "__main__":
    main()
