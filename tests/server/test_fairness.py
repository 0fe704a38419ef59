"""Fairness: no client can own the queue or the slots, and no reply goes on for ever."""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from qwen3_mlx import LLM
from qwen3_mlx.engine.scheduler import Scheduler
from qwen3_mlx.server.response import ActiveRequest
from qwen3_mlx.server.settings import Settings
from tests.engine.harness import FakeCaches, Schedulable
from tests.server.serving import Served, serving
from tests.text.harness import TOKENIZER

PROXY = ("127.0.0.1",)


# --- turns --------------------------------------------------------------------------------------


class Line(FakeCaches):
    """A scheduler, and the order in which its jobs began."""

    def __init__(self, room: int, kept: int = 0) -> None:
        super().__init__(kept)
        self.began: list[Schedulable] = []
        self.plan: Scheduler[Schedulable] = Scheduler(room, self)

    def admit(self, job: Schedulable) -> None:
        super().admit(job)
        if job not in self.began:
            self.began.append(job)

    def step(self) -> None:
        """Run the next step, and release what is complete."""
        step = self.plan.next_step()
        for job in step.decoding:
            job.take(1)
        for job in step.prefilling[:1]:
            job.take(job.num_uncomputed)
        for job in [job for job in self.plan.running if job.complete]:
            self.plan.remove(job)

    def run(self) -> list[str]:
        """Go on to the end, and give the clients of the jobs that began, in order."""
        for _ in range(10_000):
            self.step()
            if not self.plan.running and not self.plan.waiting:
                return [job.client for job in self.began]
        raise AssertionError(f"it does not end: {self.plan.running}, {self.plan.waiting}")


def test_the_client_with_the_fewest_running_is_next() -> None:
    line = Line(room=8 * 20)  # eight jobs at once
    for number in range(40):
        line.plan.add(Schedulable(f"a{number}", 10, reply=9, client="a"))
    line.step()
    assert len(line.plan.running) == 8
    for number in range(4):
        line.plan.add(Schedulable(f"b{number}", 10, reply=9, client="b"))
    # The ninth had had its turn, and found no room.
    assert "".join(line.run()) == 9 * "a" + 4 * "b" + 31 * "a"


def test_clients_with_nothing_running_take_turns() -> None:
    line = Line(room=20)  # one job at a time
    for job in (
        Schedulable(f"{client}{n}", 10, reply=9, client=client) for client in "abc" for n in "123"
    ):
        line.plan.add(job)
    assert "".join(line.run()) == "abc" * 3
    assert [job.name[1] for job in line.began] == [*"111222333"]


@pytest.mark.parametrize("seed", range(60))
def test_everyone_begins_and_a_newcomer_soon(seed: int) -> None:
    rng = random.Random(seed)
    line = Line(rng.choice([40, 100, 400]), rng.choice([0, 30]))
    jobs = [
        Schedulable(
            str(n), rng.randint(1, 20), reply=rng.randint(1, 15), client=rng.choice("aaaaaabbc")
        )
        for n in range(rng.randint(1, 40))
    ]
    for job in jobs:
        line.plan.add(job)
    line.step()
    already = len(line.began)
    line.plan.add(newcomer := Schedulable("new", 5, reply=3, client="newcomer"))
    line.run()
    assert Counter(line.began) == Counter([*jobs, newcomer])
    # Each of the others that has nothing running may come before it, and had to come earlier.
    assert line.began.index(newcomer) - already <= 3
    of = {client: [job for job in line.began if job.client == client] for client in "abc"}
    for own in of.values():
        assert own == sorted(own, key=jobs.index)  # a client's own begin as they came


def test_what_was_put_back_comes_before_turns() -> None:
    line = Line(room=141)
    first, second = (Schedulable(name, 60, reply=30, client="a") for name in "xy")
    line.plan.add(first)
    line.plan.add(second)
    while not line.preempted:
        line.step()
    line.plan.add(newcomer := Schedulable("new", 5, reply=5, client="b"))
    while second not in line.plan.running:
        assert newcomer not in line.plan.running
        line.step()
    line.run()


def test_clients_that_have_gone_are_forgotten() -> None:
    line = Line(room=1000)
    for number in range(2000):
        line.plan.add(Schedulable("x", 1, reply=1, client=str(number)))
        while line.plan.running or line.plan.waiting:
            line.step()
    assert len(line.plan._last_turn) <= 257


# --- slots --------------------------------------------------------------------------------------


def endless(**fields: Any) -> dict[str, Any]:
    """A stream that takes a while, because it cannot end."""
    never = {str(TOKENIZER.id_of(end)): -100 for end in ("<|im_end|>", "<|endoftext|>")}
    body = {"prompt": "1 2 3", "max_tokens": 8000, "logit_bias": never, "temperature": 1.5}
    return {**body, "stream": True, **fields}


def began(stack: ExitStack, served: Served, client: str, **fields: Any) -> Iterator[str]:
    """Begin a stream as a client, and give its lines."""
    response = stack.enter_context(
        httpx.stream(
            "POST",
            f"{served.url}/v1/completions",
            json=endless(**fields),
            headers={"X-Forwarded-For": client},
            timeout=60,
        )
    )
    assert response.status_code == 200
    lines = response.iter_lines()
    assert next(lines)
    return lines


@pytest.mark.heavy
def test_a_client_leaves_slots_to_others(demo: LLM) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    for path, key in (("/v1/chat/completions", "error"), ("/api/chat", "error")):
        with serving(demo, max_requests=4, trusted_proxies=PROXY) as served, ExitStack() as stack:
            kept = [began(stack, served, "10.0.0.1") for _ in range(3)]
            refused = served.post(path, asked, **{"X-Forwarded-For": "10.0.0.1"})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert "this client has 3 of its 3 replies" in str(refused.json()[key])
            other = served.post(path, asked, **{"X-Forwarded-For": "10.0.0.1, 10.0.0.2"})
            assert other.status_code == 200
            many = served.chat(n=4, max_tokens=3)
            assert many.status_code == 400 and "one client can have at most 3" in many.text
            del kept


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is not there")
def test_clients_are_their_addresses(demo: LLM) -> None:
    with serving(demo, max_requests=4, max_per_client=1) as served, ExitStack() as stack:
        lines = began(stack, served, "")
        assert served.chat(max_tokens=3).status_code == 429
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as other:
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
            response = other.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 200
        del lines


def test_who_is_not_trusted_cannot_say_who_it_is(demo: LLM) -> None:
    with serving(demo, max_requests=4, max_per_client=1) as served, ExitStack() as stack:
        lines = began(stack, served, "10.0.0.1")
        response = served.post("/v1/completions", endless(), **{"X-Forwarded-For": "10.0.0.2"})
        assert response.status_code == 429
        del lines


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 64),  # one user, who may have all
        ({"host": "::1"}, 64),
        ({"host": "localhost", "max_requests": 3}, 3),
        ({"host": "0.0.0.0"}, 48),
        ({"host": "mac.local"}, 48),
        ({"trusted_proxies": PROXY}, 48),
        ({"host": "0.0.0.0", "max_requests": 1}, 1),
        ({"max_per_client": 5}, 5),
        ({"max_per_client": 500}, 64),
    ],
)
def test_how_many_one_client_may_have(settings: dict[str, Any], most: int) -> None:
    assert Settings(model="demo", **settings).max_replies_per_client == most


# --- time ---------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ActiveRequest]:
    """The requests that a server will take."""
    made = list[ActiveRequest]()

    class Noted(ActiveRequest):
        def __init__(self, *how: Any) -> None:
            super().__init__(*how)
            made.append(self)

    monkeypatch.setattr("qwen3_mlx.server.service.ActiveRequest", Noted)
    return made


ENDS: list[tuple[str, Any]] = [
    ("/v1/chat/completions", lambda body: body["choices"][0]["finish_reason"]),
    ("/v1/completions", lambda body: body["choices"][0]["finish_reason"]),
    ("/v1/messages", lambda body: {"max_tokens": "length"}[body["stop_reason"]]),
    ("/api/chat", lambda body: body["done_reason"]),
]


@pytest.mark.parametrize(("path", "reason"), ENDS)
def test_a_reply_that_takes_too_long_ends_as_it_is(
    tiny: LLM, path: str, reason: Any, made: list[ActiveRequest]
) -> None:
    messages = [{"role": "user", "content": "x"}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 1500, "stream": False}
    body = endless(stream=False, max_tokens=1500) if path == "/v1/completions" else body
    with serving(tiny, request_timeout=3600) as served, ThreadPoolExecutor() as pool:
        response = pool.submit(served.post, path, body)
        time_is_up(served, made)
        assert reason(response.result().json()) == "length"


def test_the_end_of_its_time_is_told(tiny: LLM, made: list[ActiveRequest]) -> None:
    with serving(tiny, request_timeout=3600) as served, ThreadPoolExecutor() as pool:
        streamed = pool.submit(served.chat, max_tokens=1500, stream=True)
        time_is_up(served, made)
        lines = [line for line in streamed.result().text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        (choice,) = json.loads(lines[-2][6:])["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["finish_details"]["ended_by"] == "timeout"
        assert not served.server.service.active


def time_is_up(served: Served, made: list[ActiveRequest]) -> None:
    """Let a request time out once its reply has begun."""
    end = time.monotonic() + 60
    while not made or not made[0].first_token_at:
        assert time.monotonic() < end, "no reply has begun"
        time.sleep(0.001)
    served.server.loop.call_soon_threadsafe(made[0]._on_timeout)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
def test_a_reply_that_has_not_begun_in_time_is_an_error(demo: LLM, path: str) -> None:
    long = {"messages": [{"role": "user", "content": "x " * 3000}], "max_tokens": 5}
    demo.forget()
    with serving(demo, request_timeout=1e-3) as served:
        whole = served.post(path, {**long, "stream": False})
        assert whole.status_code == 504 and "--request-timeout" in whole.text
        streamed = served.post(path, {**long, "stream": True})
        assert "--request-timeout" in streamed.text
        assert not served.server.service.active


def test_times_and_shares_that_cannot_be_are_refused() -> None:
    for name, value in (
        ("request_timeout", 0),
        ("request_timeout", float("nan")),
        ("max_per_client", 0),
    ):
        with pytest.raises(ValueError, match=name):
            Settings(model="demo", **{name: value})  # type: ignore[arg-type]
