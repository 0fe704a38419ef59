"""Programs that could hang: python -m tests.engine.hanging CASES FOLDER, with a time limit.

Each loads a model, makes something fail, and checks that every caller gets a reply or an error.
With a third argument, `often`, what takes luck to fail is tried more times.
"""

import asyncio
import gc
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from qwen3_mlx import LLM, Qwen3Error, SamplingParams, convert, load
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.prefix import PrefixStore
from qwen3_mlx.engine import core, step_builder
from qwen3_mlx.engine.scheduler import Scheduler
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.events import Event, Finish
from tests.support import DEMO, write_tiny

Delivered = Event | BaseException
GREEDY = SamplingParams(temperature=0.0)
PROMPT = "Count from 3 to 9."
OFTEN = "often" in sys.argv
ERRORS = (
    ValueError("no"),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    StopIteration(),
    StopAsyncIteration(),
    MemoryError(),
)


@cache
def tiny_folder() -> Path:
    """Return the folder of a small random checkpoint."""
    return write_tiny(Path(tempfile.mkdtemp()))


def loaded(**options: Any) -> LLM:
    """Load that checkpoint."""
    return load(tiny_folder(), **options)


def answer(llm: LLM) -> str:
    """Return a reply that is always the same."""
    return llm.chat(PROMPT, thinking=False, max_tokens=6, sampling=GREEDY).text


def now() -> str:
    """Return the time."""
    return "noon"


_EXPECTED = WeakKeyDictionary[LLM, str]()  # what each answers when nothing goes wrong


@contextmanager
def others_go_on(llm: LLM) -> Iterator[None]:
    """Check that a request that was running before, and one that comes after, are answered."""
    if llm not in _EXPECTED:
        _EXPECTED[llm] = answer(llm)
    expected, found = _EXPECTED[llm], list[str]()
    other = threading.Thread(target=lambda: found.append(answer(llm)), daemon=True)
    other.start()
    yield
    other.join()
    assert found == [expected]
    assert answer(llm) == expected


def raising(error: BaseException, *, after: int = 0) -> Callable[..., None]:
    """Return a callback that takes anything, and raises from some call on."""
    calls = iter(range(10_000))

    def callback(*_: Any, **__: Any) -> None:
        if next(calls) >= after:
            raise error.with_traceback(None)  # or it grows each time, and the log with it

    return callback


def raised_by(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - whatever it is
        return error
    raise AssertionError("nothing was raised")


def check_same(found: BaseException, error: BaseException) -> None:
    """Check that a caller gets the error; what would pass for the end of a loop is wrapped."""
    if isinstance(error, StopIteration | StopAsyncIteration):
        assert isinstance(found, RuntimeError)
        found = found.__cause__ or found
    assert found is error, found


# --- callbacks that raise -----------------------------------------------------------------------


def progress() -> None:
    """Check a `progress` callback that raises, in each method of the API."""
    with loaded() as llm:
        ways: list[Callable[..., object]] = [
            partial(llm.chat, "Who are you?", max_tokens=8),
            partial(llm.chat, "Who are you?", max_tokens=8, choice=["I", "you"], thinking=False),
            partial(llm.chat, "Who are you?", max_tokens=8, logprobs=2, thinking=False),
            partial(llm.batch, ["Who are you?", "What is 1 + 2?"], max_tokens=8),
            partial(llm.conversation().chat, "Who are you?", max_tokens=8),
            partial(llm.run, "Who are you?", tools=[now], max_tokens=8),
        ]
        for way in ways:
            with others_go_on(llm):
                for error in ERRORS:
                    check_same(raised_by(partial(way, progress=raising(error))), error)
        with others_go_on(llm):  # of a batch, when one of two has ended
            late = raising(ERRORS[0], after=1)
            prompts = ["Who are you?", "What is 1 + 2?"]
            check_same(
                raised_by(lambda: llm.batch(prompts, progress=late, max_tokens=8)), ERRORS[0]
            )

        async def main() -> None:
            async for _ in llm.astream("Hello", progress=raising(ERRORS[0]), max_tokens=8):
                pass

        check_same(raised_by(lambda: asyncio.run(main())), ERRORS[0])


def deliver() -> None:
    """Check a `deliver` callback of `submit` that raises: the error is the last event.

    If it raises at the last event, that one has been delivered.
    """
    with loaded() as llm:
        for error in ERRORS:
            for fails in (lambda event: not ends(event), ends):
                events = SimpleQueue[Delivered]()

                def take(
                    event: Delivered, events: Any = events, fails: Any = fails, e: Any = error
                ) -> None:
                    events.put(event)
                    if fails(event):
                        raise e.with_traceback(None)

                with others_go_on(llm):
                    task = llm.prepare(PROMPT, thinking=False, max_tokens=8)
                    llm.submit(task, take, threading.Event())
                    while not ends(last := events.get()):
                        pass
                    assert last is error or isinstance(last, Finish)
                assert events.empty()


def ends(event: Delivered) -> bool:
    return isinstance(event, Finish | BaseException)


def soon() -> None:
    """Check jobs of `call_soon` and of `compute` that raise."""
    with loaded() as llm:
        for error in ERRORS:
            with others_go_on(llm):
                llm.call_soon(raising(error))
                found = raised_by(lambda e=error: llm.compute(raising(e)))  # type: ignore[misc]
                assert found is error


# --- callbacks that call the LLM ----------------------------------------------------------------


def nested() -> None:
    """Check that a call that would wait for its own thread raises; the other calls work."""
    with loaded() as llm:

        async def read() -> None:
            async for _ in llm.astream("Hello", max_tokens=4):
                pass

        waits: list[Callable[[], object]] = [
            lambda: llm.chat("Hello", max_tokens=4),
            lambda: llm.complete("Hello", max_tokens=4),
            lambda: llm.batch(["Hello", "Hi"], max_tokens=4),
            lambda: llm.run("Hello", tools=[now], max_tokens=4),
            lambda: next(llm.stream("Hello", max_tokens=4)),
            lambda: llm.conversation().chat("Hello", max_tokens=4),
            lambda: llm.logits([1, 2, 3]),
            lambda: llm.compute(lambda model: model.model.norm.weight),
            lambda: llm.forget(),
            lambda: asyncio.run(read()),
        ]
        for wait in waits:
            with others_go_on(llm):
                for call in callbacks(llm):
                    found = raised_by(partial(call, wait))
                    assert isinstance(found, Qwen3Error), found
                    assert "would never end" in str(found)
        streams = SimpleQueue[Any]()
        free: list[Callable[[], object]] = [
            lambda: llm.render("Hello"),
            lambda: llm.stream("Hello", max_tokens=4).close(),
            lambda: llm.stream("Hello", max_tokens=4).finish_thinking(),
            lambda: llm.tokenizer.encode("Hello"),
            lambda: streams.put(llm.stream("Hello", max_tokens=4)),
        ]
        for do in free:
            with others_go_on(llm):
                for call in callbacks(llm):
                    call(do)
        while not streams.empty():
            *_, last = streams.get()
            assert isinstance(last, Finish)


def circle() -> None:
    """Check that callbacks of two models may wait for each other's, but not in a circle."""
    with loaded() as one, loaded() as other:

        def ask(llm: LLM, then: Callable[[], object]) -> object:
            def progress(done: int, total: int) -> None:
                then()

            return llm.chat("Hello", max_tokens=4, progress=progress)

        assert ask(one, lambda: answer(other))
        found = raised_by(lambda: ask(one, lambda: ask(other, lambda: answer(one))))
        assert isinstance(found, Qwen3Error) and "would never end" in str(found), found
        found = raised_by(lambda: ask(one, lambda: ask(other, one.forget)))
        assert isinstance(found, Qwen3Error) and "would never end" in str(found), found
        assert ask(one, loaded().close)  # whose thread is not waited for here
        assert answer(one) and answer(other)


def callbacks(llm: LLM) -> list[Callable[[Callable[[], object]], object]]:
    """Return the ways in which a caller's code comes to run on the thread that computes."""

    def by_soon(do: Callable[[], object]) -> None:
        outcome = SimpleQueue[BaseException | None]()

        def job() -> None:
            try:
                do()
                outcome.put(None)
            except BaseException as error:  # noqa: BLE001 - handed back
                outcome.put(error)

        llm.call_soon(job)
        if error := outcome.get():
            raise error

    def without_result(do: Callable[[], object]) -> Callable[[int, int], None]:
        def callback(done: int, total: int) -> None:
            do()

        return callback

    def by_compute(do: Callable[[], object]) -> None:
        llm.compute(lambda _: do() and None)

    return [
        lambda do: llm.chat("Hello", max_tokens=4, progress=without_result(do)),
        lambda do: llm.batch(["Hello", "Hi"], max_tokens=4, progress=without_result(do)),
        by_soon,
        by_compute,
    ]


def closing() -> None:
    """Check that a callback may close the LLM: requests are cancelled, new ones refused."""
    for call in range(4):
        llm = loaded()
        stream = llm.stream(PROMPT, max_tokens=2000)
        raised: list[BaseException] = []
        try:
            callbacks(llm)[call](llm.close)
        except Qwen3Error as error:
            raised.append(error)
        *_, last = stream
        assert isinstance(last, Finish)
        assert last.reason == "cancelled"
        assert "closed" in str(raised_by(lambda llm=llm: llm.chat("Hello")))  # type: ignore[misc]


def freed() -> None:
    """Check that a network may be freed by one thread while the worker's thread ends."""
    for _ in range(120 if OFTEN else 20):
        llm = loaded()
        stream = llm.stream(PROMPT, max_tokens=2000)
        next(stream)
        with suppress(Qwen3Error):  # the computation may be refused as well
            llm.compute(lambda _, llm=llm: llm.close() and None)  # type: ignore[misc]
        del stream, llm


def tools() -> None:
    """Check that tools run on the caller's thread: they may use the LLM, and may raise SystemExit.

    An Exception is reported to the model.
    """
    with load() as llm:  # the demo, which calls them
        here, threads = threading.current_thread(), list[threading.Thread]()

        def add(a: int, b: int) -> str:
            """Add two numbers.

            Args:
                a: the first.
                b: the second.
            """
            threads.append(threading.current_thread())
            assert llm.logits([1]).shape[0] == 1
            return answer(llm)

        def leave(a: int, b: int) -> str:
            """Add two numbers.

            Args:
                a: the first.
                b: the second.
            """
            raise SystemExit(3)

        demand: dict[str, Any] = {"tool_choice": "required", "max_tokens": 200, "thinking": False}
        with others_go_on(llm):
            reply = llm.run("What is 1 + 2?", tools=[add], **demand)
            assert threads
            assert set(threads) == {here}
            assert any(message["content"] == answer(llm) for message in reply.messages)
        with others_go_on(llm):
            found = raised_by(lambda: llm.run("What is 1 + 2?", tools=[leave], **demand))
            assert isinstance(found, SystemExit)


# --- what fails each time it is called ----------------------------------------------------------


def failing() -> None:
    """Check that requests end while a part of the engine fails; later ones are answered."""
    parts = [
        *((Qwen3, "make_cache"), (core, "SequenceState")),
        *((step_builder, name) for name in ("forward", "choose")),
        *(
            (Scheduler, name)
            for name in ("add", "next_step", "remove", "room_in_use", "prefill_budget")
        ),
        *(
            (PrefixStore, name)
            for name in ("acquire", "insert", "match_length", "evict", "unsaved", "clear")
        ),
        *((DiskPrefixes, name) for name in ("match_length", "read", "is_worth_saving", "write")),
        *((SequenceState, name) for name in ("commit", "force", "drop_caches", "end", "reserve")),
        *((mx, name) for name in ("clear_cache", "eval", "async_eval")),
    ]
    for part, name in parts:
        with loaded(prompt_cache=sys.argv[2]) as llm:
            expected, whole = answer(llm), getattr(part, name)
            setattr(part, name, raising(RuntimeError("struck")))
            outcomes = list[str | BaseException]()

            def ask(llm: LLM = llm, outcomes: Any = outcomes) -> None:
                try:
                    outcomes.append(answer(llm))
                except (Qwen3Error, RuntimeError) as error:
                    outcomes.append(error)

            threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            setattr(part, name, whole)
            assert len(outcomes) == 3
            for outcome in outcomes:
                assert outcome == expected or "struck" in str(outcome), (name, outcome)
            assert answer(llm) == expected


# --- the collector, forks -----------------------------------------------------------------------


def finalizer() -> None:
    """Check an LLM that is garbage collected in the middle of `Worker.post`, on either thread."""
    end_while_posting(on_worker=True)
    end_while_posting(on_worker=False)


def end_while_posting(*, on_worker: bool) -> None:
    llms, events = [loaded()], SimpleQueue[Delivered]()
    worker = llms[0]._worker
    jobs = worker._jobs

    class Collecting:
        """A queue in whose `put` the last reference to the LLM goes."""

        get, get_nowait = jobs.get, jobs.get_nowait

        def put(self, job: Any) -> None:
            if llms and (threading.current_thread() is worker._thread) == on_worker:
                llms.clear()
                gc.collect()
                assert worker.ending
            jobs.put(job)

    llms[0].submit(llms[0].prepare(PROMPT, max_tokens=100), events.put, threading.Event())
    worker._jobs = Collecting()  # type: ignore[assignment]
    if not on_worker:
        assert isinstance(raised_by(lambda: worker.call(lambda: None)), Qwen3Error)
    while not ends(last := events.get()):
        pass
    assert isinstance(last, Finish)
    worker._thread.join()


def fork_while_busy() -> None:
    """Check that a child cannot use its parent's model, whatever that was doing."""
    with loaded() as llm:
        done = threading.Event()
        begun = llm.stream("Hello there")

        def talk() -> None:
            while not done.is_set():
                llm.chat("Hello there", max_tokens=20)

        threads = [threading.Thread(target=talk) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(60 if OFTEN else 10):
            child = os.fork()
            if not child:
                errors = [raised_by(lambda: llm.chat("x")), raised_by(lambda: list(begun))]
                llm.close()  # as the end of a block does, or the collector
                os._exit(not all("its thread stayed behind" in str(error) for error in errors))
            check_child(child)
        done.set()
        for thread in threads:
            thread.join()


def check_child(child: int) -> None:
    """Wait for a forked process, which must end soon and well."""
    deadline = time.monotonic() + 120
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, 9)
    assert ended == (child, 0)


def fork() -> None:
    """Check that loading and converting are refused in a fork of a process that computes."""
    warnings.simplefilter("ignore")
    folder = sys.argv[2]
    fork_while_busy()
    for begin in (lambda: loaded().close(), lambda: convert(DEMO, f"{folder}/a", dequantize=True)):
        begin()
        child = os.fork()
        if not child:
            for use in (load, lambda: convert(DEMO, f"{folder}/b", dequantize=True)):
                assert "forked" in str(raised_by(use))
            os._exit(0)
        check_child(child)


if __name__ == "__main__":
    for case in sys.argv[1].split(","):
        sys.stdout.write(f"{case}\n")
        sys.stdout.flush()
        globals()[case]()
