"""The public API over the whole engine."""

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import LLM, Finish, Qwen3Error, Reasoning, SamplingParams, Text, load
from qwen3_mlx.engine.forward import prefill_chunks
from qwen3_mlx.engine.worker import Worker
from tests.support import DEMO, assert_close, random_ids, write_tiny
from tests.text.harness import TOKENIZER

# A reply of a random network may end with its first token.
ENDLESS: Any = {
    "logit_bias": {TOKENIZER.id_of(end): -1000.0 for end in ("<|im_end|>", "<|endoftext|>")}
}

GREEDY = SamplingParams(temperature=0.0)


def greedy(logits: mx.array) -> int:
    token = mx.argmax(logits).item()
    assert isinstance(token, int)
    return token


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def running(llm: LLM) -> bool:
    """Return whether any sequence is computed."""
    scheduler = llm._open().engine._core.scheduler
    return bool(llm._worker.call(lambda: scheduler.running or scheduler.waiting))


def test_a_stream_is_the_reply_in_pieces(tiny: LLM) -> None:
    events = list(tiny.stream("Hello", max_tokens=30, seed=3))
    reply = tiny.chat("Hello", max_tokens=30, seed=3)
    assert "".join(event.text for event in events if isinstance(event, Text)) == reply.text
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == reply.reasoning
    assert [event for event in events if isinstance(event, Finish)] == [events[-1]]
    assert events[-1].reason == reply.finish_reason  # type: ignore[union-attr]


def test_greedy_tokens_are_those_of_the_logits(tiny: LLM) -> None:
    prompt = "Once upon a time"
    ids = tiny.tokenizer.encode(prompt)
    start = len(ids)
    for _ in range(12):
        limit = len(tiny.tokenizer)
        ids.append(greedy(tiny.logits(ids)[-1, :limit]))
    reply = tiny.complete(prompt, max_tokens=12, sampling=GREEDY)
    assert reply.text == tiny.tokenizer.decode(ids[start:])
    assert reply.usage.completion_tokens == 12
    assert reply.finish_reason == "length"


def test_usage_counts_tokens(tiny: LLM) -> None:
    prompt = tiny.render("Hello", thinking=True)
    usage = tiny.chat("Hello", thinking=True, max_tokens=7, seed=0).usage
    assert usage.prompt_tokens == len(tiny.tokenizer.encode(prompt))
    assert (usage.completion_tokens, usage.cached_tokens) == (7, 0)


def test_the_same_seed_gives_the_same_reply(tiny: LLM) -> None:
    first = tiny.chat("Hello", max_tokens=20, seed=1)
    assert tiny.chat("Hello", max_tokens=20, seed=1) == first
    assert tiny.chat("Hello", max_tokens=20, seed=2) != first
    drawn = [tiny.chat("Hello", max_tokens=20, **ENDLESS) for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_end_tokens_end_the_reply(tiny: LLM) -> None:
    end = tiny.tokenizer.id_of("<|endoftext|>")
    assert end is not None
    sampling = SamplingParams(logit_bias={end: 1000.0})
    reply = tiny.chat("Hello", sampling=sampling)
    assert (reply.text, reply.finish_reason, reply.usage.completion_tokens) == ("", "stop", 1)


def test_stop_strings_end_the_reply(tiny: LLM) -> None:
    whole = tiny.complete("a", max_tokens=40, seed=5).text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    *_, finish = stream = list(
        tiny.stream("x", thinking=False, stop=middle, max_tokens=1, sampling=GREEDY)
    )
    assert isinstance(finish, Finish) and len(stream) >= 1
    reply = tiny.complete("a", max_tokens=40, seed=5, stop=[middle, "never there"])
    assert reply.text == whole[: whole.index(middle)]
    assert reply.finish_reason == "stop"
    assert reply.usage.completion_tokens < 40


def test_thinking_shows_in_the_prompt(tiny: LLM) -> None:
    assert tiny.render("x", thinking=False).endswith("<think>\n\n</think>\n\n")
    assert tiny.render("x", thinking=True) == tiny.render("x")
    assert tiny.render("x", add_generation_prompt=False).endswith("<|im_end|>\n")


def test_logits_are_float32_and_evaluated(tiny: LLM) -> None:
    logits = tiny.logits([1, 2, 3])
    assert (logits.shape, logits.dtype) == ((3, tiny.config.vocab_size), mx.float32)
    assert_close(tiny.logits([1, 2])[1], logits[1])
    for wrong in ([], [-1], [10**6]):
        with pytest.raises(ValueError, match="ids must be one or more numbers from 0 to"):
            tiny.logits(wrong)


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": 10**6}, Qwen3Error, "has room for"),
        ({"stop": [""]}, ValueError, "stop must be one or more non-empty strings"),
        ({"stop": [3]}, ValueError, "stop must be one or more non-empty strings"),
        ({"sampling": SamplingParams(logit_bias={-1: 1.0})}, ValueError, "logit_bias names -1"),
        ({"max_tokens": 5.5}, TypeError, "max_tokens must be a whole number, not 5.5"),
        ({"max_tokens": True}, TypeError, "max_tokens must be a whole number, not True"),
        ({"seed": "abc"}, TypeError, "seed must be a whole number, not 'abc'"),
        ({"stop": {"a": 1}}, ValueError, "stop must be one or more non-empty strings"),
        ({"sampling": {}}, TypeError, "sampling must be SamplingParams, not {}"),
        ({"thinking": 0}, TypeError, "thinking must be True, False or None, not 0"),
    ],
)
def test_wrong_arguments(
    tiny: LLM, options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        tiny.chat("Hello", **options)


def test_prompts_that_do_not_fit(tiny: LLM) -> None:
    with pytest.raises(Qwen3Error, match="the context window is 2,048; shorten the prompt"):
        tiny.complete("word " * 3000)
    with pytest.raises(ValueError, match="the prompt is empty"):
        tiny.complete("")
    with pytest.raises(ValueError, match="not valid Unicode at character 1; is it UTF-8"):
        tiny.complete("a\udcff")
    with pytest.raises(TypeError, match="prompt must be a string"):
        tiny.complete(["a"])  # type: ignore[arg-type]


@pytest.mark.heavy
def test_the_context_window_ends_a_reply(tiny: LLM) -> None:
    prompt = "1" * 2000
    used = len(tiny.tokenizer.encode(prompt))
    reply = tiny.complete(prompt, sampling=SamplingParams(temperature=0.0, logit_bias={5: 99.0}))
    assert reply.finish_reason == "length"
    assert reply.usage.completion_tokens == 2048 - used


# --- ending early -------------------------------------------------------------------------------


def test_a_closed_stream_ends_with_cancelled(tiny: LLM) -> None:
    with tiny.stream("Hello", **ENDLESS) as stream:
        next(stream)
    *_, finish = stream
    assert isinstance(finish, Finish) and finish.reason == "cancelled"
    assert list(stream) == []


def test_leaving_the_loop_or_dropping_the_stream_cancels(tiny: LLM) -> None:
    for event in tiny.stream("Hello", **ENDLESS):
        assert not isinstance(event, Finish)
        break
    gc.collect()
    tiny.chat("Hello", max_tokens=1)  # long before that one would have come to its end
    assert not running(tiny)


def test_cancelling_during_prefill(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_mlx.backend.prefill_chunk", lambda: 64)
    seen: list[int] = []

    def follow(done: int, total: int) -> None:
        seen.append(done)
        if done >= 128:
            stream.close()

    stream = tiny.stream("a " * 900, progress=follow)
    assert [event.reason for event in stream if isinstance(event, Finish)] == ["cancelled"]
    assert seen == [0, 64, 128]


@pytest.mark.heavy
def test_memory_is_freed_at_the_end(tiny: LLM) -> None:
    tiny.chat("Hello", max_tokens=1)
    tiny.forget()
    before = mx.get_active_memory()
    for _ in range(3):
        tiny.chat("Hello", max_tokens=50)
        with tiny.stream("a " * 500) as stream:
            next(stream)
        list(stream)
    del stream
    tiny.forget()
    wait_until(lambda: mx.get_active_memory() <= before)


def test_an_error_ends_one_request_only(tiny: LLM) -> None:
    def fail(done: int, total: int) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        tiny.chat("Hello", progress=fail)
    assert tiny.chat("Hello", max_tokens=3).usage.completion_tokens >= 1


def test_a_closed_llm_says_so(tmp_path: Path) -> None:
    threads = threading.active_count()
    with load(write_tiny(tmp_path / "tiny")) as llm:
        stream = llm.stream("Hello")
        next(stream)
    assert [event.reason for event in stream if isinstance(event, Finish)] == ["cancelled"]
    assert threading.active_count() == threads
    llm.close()
    for use in (lambda: llm.chat("x"), lambda: llm.logits([1]), lambda: llm.model):
        with pytest.raises(Qwen3Error, match="this LLM is closed"):
            use()


def test_a_stream_keeps_its_llm(tiny_folder: Path) -> None:
    stream = load(tiny_folder).stream("Hello", max_tokens=5, sampling=GREEDY)
    gc.collect()
    *_, finish = stream
    assert isinstance(finish, Finish) and finish.reason == "length"


def test_nothing_is_accepted_behind_the_end() -> None:
    worker = Worker()
    gate, results = threading.Event(), []
    worker.post(lambda: results.append(gate.wait(10)))
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    wait_until(lambda: worker.ending)
    with pytest.raises(Qwen3Error, match="this LLM is closed"):
        worker.call(lambda: None)
    gate.set()
    stopper.join(10)
    assert results == [True]


def test_a_callback_may_exit_or_close(tiny_folder: Path) -> None:
    llm = load(tiny_folder)

    def leave(done: int, total: int) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        llm.chat("Hello", progress=leave)
    reply = llm.chat("Hello", progress=lambda done, total: llm.close())
    assert reply.finish_reason == "cancelled"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_is_told() -> None:
    program = textwrap.dedent("""
        import os, sys, warnings
        from qwen3_mlx import Qwen3Error, load
        warnings.simplefilter("ignore")
        llm = load(sys.argv[1])
        if os.fork() == 0:
            try:
                llm.chat("Hello", max_tokens=1)
            except Qwen3Error as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
    """)
    command = [sys.executable, "-c", program, str(DEMO)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "loaded before the process forked" in done.stdout


# --- several at once ----------------------------------------------------------------------------


def test_a_batch_is_each_alone_in_order(tiny: LLM) -> None:
    prompts: list[Any] = ["Hello", [{"role": "user", "content": "a b c"}], "x " * 200, "Hello"]
    told: list[tuple[int, int]] = []
    replies = tiny.batch(
        prompts, max_tokens=12, seed=4, thinking=False, progress=lambda *done: told.append(done)
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        alone = tiny.chat(prompt, max_tokens=12, seed=4, thinking=False)
        assert (reply.text, reply.finish_reason) == (alone.text, alone.finish_reason)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert tiny.batch([]) == []
    with pytest.raises(TypeError, match="prompts must be a list"):
        tiny.batch("Hello")


def test_a_batch_with_a_wrong_prompt_is_cancelled(tiny: LLM) -> None:
    with pytest.raises(Qwen3Error, match="room for"):
        tiny.batch(["Hello", "1" * 1500], max_tokens=600)
    assert tiny.chat("Hello", max_tokens=1).usage.completion_tokens == 1
    assert not running(tiny)


def test_a_second_turn_reads_what_is_new(tiny: LLM) -> None:
    turns = [{"role": "user", "content": "word " * 60}]
    first = tiny.chat(turns, max_tokens=4, sampling=GREEDY)
    turns += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "and now?"},
    ]
    warm = tiny.chat(turns, max_tokens=8, sampling=GREEDY)
    assert warm.usage.cached_tokens >= 60
    tiny.forget()
    cold = tiny.chat(turns, max_tokens=8, sampling=GREEDY)
    assert (cold.text, cold.usage.cached_tokens) == (warm.text, 0)


def test_memory_bounds_the_context(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, whole_memory: None
) -> None:
    monkeypatch.setattr("qwen3_mlx.api.checkpoints.check_fits", lambda *_: None)
    monkeypatch.setattr("qwen3_mlx.backend.available_memory", lambda: 504_000_000)
    with load(tiny_folder) as llm:
        assert llm.chat("Hello", max_tokens=5).usage.completion_tokens == 5
        with pytest.raises(Qwen3Error, match=r"window of [\d,]+ \(all that memory can hold: cache"):
            llm.chat("Hello", max_tokens=2000)
        with pytest.raises(Qwen3Error, match="shorten the prompt"):
            llm.complete("a " * 1900)


# --- threads and asyncio ------------------------------------------------------------------------


def test_calls_from_many_threads(tiny: LLM) -> None:
    expected = {seed: tiny.chat("Hello", max_tokens=8, seed=seed) for seed in range(6)}
    found: dict[int, Any] = {}

    def ask(seed: int) -> None:
        found[seed] = tiny.chat("Hello", max_tokens=8, seed=seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_asyncio(tiny: LLM) -> None:
    async def ask(seed: int) -> str:
        parts = []
        async for event in tiny.astream("Hello", max_tokens=8, seed=seed):
            if isinstance(event, Text):
                parts.append(event.text)
        return "".join(parts)

    async def ask_all() -> list[str]:
        return list(await asyncio.gather(*(ask(seed) for seed in range(3))))

    expected = [tiny.chat("Hello", max_tokens=8, seed=seed).text for seed in range(3)]
    assert asyncio.run(ask_all()) == expected


def test_cancelling_a_task_ends_the_generation(tiny: LLM) -> None:
    streams: list[Any] = []

    async def main() -> None:
        async def read() -> None:
            streams.append(tiny.astream("Hello", **ENDLESS))
            async for _ in streams[0]:
                await asyncio.sleep(0)

        task = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    del streams[:]
    gc.collect()
    assert tiny.chat("Hello", max_tokens=1).usage.completion_tokens == 1


def test_closing_an_async_stream(tiny: LLM) -> None:
    async def main() -> str:
        async with tiny.astream("Hello", **ENDLESS) as stream:
            await anext(stream)
        async for event in stream:
            last = event
        assert isinstance(last, Finish)
        return last.reason

    assert asyncio.run(main()) == "cancelled"


def test_async_errors_reach_the_reader(tiny: LLM) -> None:
    def fail(done: int, total: int) -> None:
        raise OSError("no")

    async def main() -> None:
        async for _ in tiny.astream("Hello", progress=fail):
            pass

    with pytest.raises(OSError, match="no"):
        asyncio.run(main())


def test_the_worker_hands_errors_back() -> None:
    worker = Worker()
    assert worker.call(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0)
    worker.stop()


def test_threads_of_mlx_are_used_again() -> None:
    def stream_of(worker: Worker) -> mx.Stream:
        return worker.call(lambda: mx.default_stream(mx.cpu))

    first, second = Worker(), Worker()
    used = [stream_of(first), stream_of(second)]
    assert used[0] != used[1]
    first.stop()
    third = Worker()
    assert stream_of(third) == used[0]
    second.stop()
    third.stop()


@pytest.mark.parametrize(
    ("tokens", "most", "sizes"),
    [
        (1, 2048, [1]),
        (2048, 2048, [2048]),
        (2049, 2048, [1088, 961]),
        (4100, 2048, [1408, 1408, 1284]),
        (100, 64, [64, 36]),
    ],
)
def test_prompts_are_cut_into_equal_chunks(tokens: int, most: int, sizes: list[int]) -> None:
    assert prefill_chunks(tokens, most) == sizes


def test_chunked_prefill_gives_the_same_reply(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tiny.tokenizer.decode(random_ids(300, 900))
    expected = tiny.complete(prompt, max_tokens=10, sampling=GREEDY)
    tiny.forget()
    monkeypatch.setattr("qwen3_mlx.backend.prefill_chunk", lambda: 64)
    assert tiny.complete(prompt, max_tokens=10, sampling=GREEDY) == expected


def test_a_job_runs_where_the_network_lives(tiny: LLM) -> None:
    names: list[str] = []

    def job(model: Any) -> dict[str, mx.array]:
        names.append(threading.current_thread().name)
        return {"sum": model.model.norm.weight.sum()}

    total = tiny.compute(job)["sum"]
    assert float(total) == pytest.approx(float(mx.sum(tiny.model.model.norm.weight)))
    assert names == ["qwen3-mlx"]
    with pytest.raises(ZeroDivisionError):
        tiny.compute(lambda model: 1 / 0)


def test_a_closed_llm_computes_nothing(tiny_folder: Path) -> None:
    llm = load(tiny_folder)
    llm.close()
    with pytest.raises(Qwen3Error, match="closed"):
        llm.compute(lambda model: model.model.norm.weight)


def test_closing_frees_the_weights_at_once(tiny_folder: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        llm = load(tiny_folder)
        llm.chat("Hi", max_tokens=2)
        loaded = mx.get_active_memory()
        llm.close()
        assert mx.get_active_memory() - before < (loaded - before) / 10
    finally:
        gc.enable()
