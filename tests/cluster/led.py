"""Work of the tests of clusters: on one machine, and in a process of its own on several ranks.

    python -m tests.cluster.led '{"load": {"hosts": "local:2"}}'

A process can be part of one cluster, so each test of one has its own. It prints JSON.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_mlx import LLM, Qwen3Error, SamplingParams, load
from qwen3_mlx.api import cluster
from qwen3_mlx.cluster import joining, ring
from qwen3_mlx.cluster.launch import Started
from qwen3_mlx.engine import step_builder

PROMPTS = [f"What is {a} + {b}?" for a, b in ((12, 7), (40, 2), (99, 1), (5, 5), (23, 45), (61, 3))]
PROMPTS += ["Say: the cat sat on the mat", "Count to nine"]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def answers(llm: LLM, *, schema: bool = False) -> dict[str, Any]:
    """Return what a model answers to all kinds of requests."""
    found: dict[str, Any] = {}
    found["batch"] = [r.text for r in llm.batch(PROMPTS, max_tokens=24, seed=7, thinking=False)]
    found["kept prefixes"] = [r.text for r in llm.batch(PROMPTS[:3], max_tokens=24, seed=7)]
    warm = SamplingParams(temperature=1.5)
    found["warm"] = [r.text for r in llm.batch(PROMPTS[:5], max_tokens=16, seed=3, sampling=warm)]
    turns = [
        {"role": "user", "content": PROMPTS[0]},
        {"role": "assistant", "content": "12 + 7 = 19"},
        {"role": "user", "content": PROMPTS[1]},
    ]
    found["turns"] = llm.chat(turns, max_tokens=30, seed=1).text
    found["budget"] = llm.chat(PROMPTS[4], max_tokens=40, seed=1, thinking_budget=4).text
    if schema:
        reply = llm.chat(PROMPTS[0], max_tokens=30, seed=1, schema=SCHEMA, thinking=False)
        found["schema"] = reply.text
    with llm.stream("Count to nine", max_tokens=200, seed=2) as stream:
        next(iter(stream))  # and cancelled
    found["after a cancelled one"] = llm.chat(PROMPTS[2], max_tokens=30, seed=1).text
    ids = llm.tokenizer.encode("What is 12 + 7? " * 8)
    found["logits"] = np.array(llm.logits(ids))[:, :50].tolist()
    found["scores"] = [round(s.logprob, 3) for s in llm.score(ids, 5).logprobs]
    return found


def long_prompt(llm: LLM) -> list[int]:
    return llm.tokenizer.encode("What is 12 + 7? " * 60)


def _ask(options: dict[str, Any]) -> dict[str, Any]:
    with load(options.pop("model", "demo"), **options["load"]) as llm:
        found = answers(llm, schema=options.get("schema", False))
        model: Any = llm.model
        found["control bytes"] = [peer.channel.sent for peer in model.crew.peers]
        found["passes"] = model.passes
        found["layers"] = llm.config.num_hidden_layers
        for refused in (lambda: llm.embed(["x"], pooling="last"), lambda: llm.compute(len)):
            try:
                refused()
            except Qwen3Error as error:
                found.setdefault("refused", []).append(str(error))
        found["after a refusal"] = llm.chat(PROMPTS[2], max_tokens=30, seed=1).text
    return found


def _restart(options: dict[str, Any]) -> dict[str, Any]:
    """Read a long prompt; of a second process, the prefix is on disk."""
    with load("demo", **options["load"]) as llm:
        reply = llm.complete("What is 12 + 7? " * 60, max_tokens=12, seed=1)
        return {"text": reply.text, "cached": reply.usage.cached_tokens}


def _fault(options: dict[str, Any]) -> dict[str, Any]:
    """Send a signal to a follower while a reply runs."""
    module: Any = cluster
    module.LIMIT_SECONDS = 2.0
    if options.get("keep"):  # as on another machine, where the leader cannot kill it

        def end(self: Started, *, at_once: bool = False) -> None:
            """Leave it alone."""

        real, Started.end = Started.end, end  # type: ignore[method-assign]
    if options.get("hang"):  # as over RDMA, where no connection can be shut down
        ring.disconnect = lambda: None
    llm = load("demo", **options["load"])
    process = llm.cluster._followers.started.processes[1]  # type: ignore[union-attr]
    sent_at = [0.0]

    def send() -> None:
        sent_at[0] = time.monotonic()
        os.kill(process.pid, getattr(signal, options["signal"]))

    threading.Timer(0.5, send).start()
    errors: list[str] = []
    found: dict[str, Any] = {"errors": errors}
    for number in range(2):
        try:
            while True:
                llm.complete("What is 1 + 1?" * 20, max_tokens=300, seed=1)
        except Qwen3Error as error:
            errors.append(str(error))
            found[f"seconds {number}"] = time.monotonic() - max(sent_at)
    started_at = time.monotonic()
    llm.close()
    found["close"] = time.monotonic() - started_at
    if options.get("keep"):
        real(llm.cluster._followers.started, at_once=True)  # type: ignore[union-attr]
    found["gone"] = process.poll() is not None or process.wait(3) is not None
    try:
        load("demo", **options["load"])
    except Qwen3Error as error:
        found["again"] = str(error)
    return found


def _random(options: dict[str, Any]) -> dict[str, Any]:
    """Load and compute, with a fault at a random time; it ends by itself whatever happens."""
    rng = random.Random(options["seed"])
    module: Any = cluster
    waiting: Any = joining
    module.LIMIT_SECONDS, waiting._JOIN_SECONDS = 2.0, 5.0
    started: list[Started] = []
    real = Started.start

    def start(self: Started, *arguments: Any) -> None:
        started.append(self)
        real(self, *arguments)

    Started.start = start  # type: ignore[method-assign, assignment]
    victim, number = rng.choice(["follower", "follower", "leader"]), rng.choice([9, 19, 15])
    delay, until = rng.uniform(0, 3.5), time.monotonic() + 6

    def fault() -> None:
        time.sleep(delay)
        if victim == "leader":
            os.kill(os.getpid(), signal.SIGKILL)
        for process in started[0].processes.values() if started else ():
            os.kill(process.pid, number)

    threading.Thread(target=fault, daemon=True).start()
    errors = []
    try:
        with load("demo", hosts="local:2", split=rng.choice(["pipeline", "tensor"])) as llm:
            while time.monotonic() < until:
                llm.batch(PROMPTS[: rng.randrange(1, 6)], max_tokens=60)
    except Qwen3Error as error:
        errors.append(str(error))
    return {"errors": errors, "fault": [victim, number, delay]}


def _injected(options: dict[str, Any]) -> dict[str, Any]:
    """Fail while steps are built; the next request is answered."""
    module: Any = step_builder
    real, count = module.choose, 0

    def choose(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count in options["at"]:
            raise ValueError("injected")
        return real(*arguments)

    texts: list[Any] = []
    with load("demo", **options["load"]) as llm:
        asked: Any = {"max_tokens": 40, "thinking": False, "temperature": 0}

        def answer() -> list[str]:
            return [
                reply.text for reply in llm.batch(PROMPTS[4 : 4 + options["together"]], **asked)
            ]

        expected = answer()
        module.choose = choose
        for _ in range(len(options["at"]) + 1):
            try:
                texts.append(answer())
            except Qwen3Error as error:
                texts.append(str(error))
    return {"texts": texts, "expected": expected}


if __name__ == "__main__":
    stated = json.loads(sys.argv[1])
    result = globals()[f"_{stated.pop('do', 'ask')}"](stated)
    Path(sys.argv[2]).write_text(json.dumps(result))
