"""Several LLMs in a process, and what else takes memory beside their replies."""

import gc
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import LLM, ContextError, Qwen3Error, backend, load
from qwen3_mlx.engine import memory_ledger
from qwen3_mlx.engine.core import EngineCore
from qwen3_mlx.engine.logits import Logits
from qwen3_mlx.engine.memory import RESERVE
from qwen3_mlx.engine.memory_ledger import Share
from tests.support import MOE, TINY, assert_close, random_ids, write_tiny

pytestmark = pytest.mark.usefixtures("whole_memory")


_CONTEXT = 640


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(
        tmp_path_factory.mktemp("short"), TINY | {"max_position_embeddings": _CONTEXT}
    )


# --- the ledger ---------------------------------------------------------------------------------


def test_no_byte_is_promised_twice() -> None:
    rng, memory = random.Random(0), 100_000
    shares: list[Share] = []
    for _ in range(2000):
        do = rng.random()
        if do < 0.2:
            free = memory - sum(share.held for share in shares)
            least = rng.randint(0, 40_000)
            shares.append(memory_ledger.claim(partial(int, free), partial(min, least)))
        elif shares and do < 0.35:
            share = shares.pop(rng.randrange(len(shares)))
            memory_ledger.release(share)
            memory_ledger.release(share)
        elif shares:
            share = rng.choice(shares)
            share.held = rng.randint(0, share.available)
        assert sum(share.available for share in shares) <= memory
        assert all(share.available >= max(share.guaranteed, share.held) for share in shares)


def test_one_engine_alone_may_take_all_and_two_share_what_neither_is_sure_of() -> None:
    one = memory_ledger.claim(lambda: 1000, lambda most: 100)
    assert one.available == 1000
    other = memory_ledger.claim(lambda: 900, lambda most: most // 4)
    assert (other.guaranteed, one.available, other.available) == (200, 400, 500)
    assert memory_ledger.unallocated_guarantees() == 300
    one.held = 60
    assert memory_ledger.unallocated_guarantees() == 240
    memory_ledger.release(other)
    assert (one.available, memory_ledger.unallocated_guarantees()) == (900, 40)


# --- several LLMs -------------------------------------------------------------------------------


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the machine give so many bytes beside the reserve, of which caches alone take some."""
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)

    def room(size: int) -> None:
        def available() -> int:
            return RESERVE + size - sum(share.held for share in list(memory_ledger._shares))

        monkeypatch.setattr(backend, "available_memory", available)

    return room


def sizes_of(folder: Path) -> tuple[int, int]:
    """Give the bytes of the weights, and those that the longest request takes."""
    with load(folder) as llm:
        weights = sum(array.nbytes for array in llm.model.tensors().values())
        return weights, shares_of(llm)[0].guaranteed


def shares_of(*llms: LLM) -> list[Share]:
    return [llm._open().engine.share for llm in llms]


def test_what_is_promised_to_one_llm_is_no_other_ones(
    folder: Path, room_for: Callable[[int], None]
) -> None:
    weights, least = sizes_of(folder)
    room_for(weights + 3 * least)
    first = load(folder)
    assert shares_of(first)[0].available == weights + 3 * least
    second, third = load(folder), load(folder)
    given = [share.available for share in shares_of(first, second, third)]
    assert sum(given) <= weights + 3 * least and min(given) >= least
    with pytest.raises(Qwen3Error, match="does not fit.*closing another LLM of this process"):
        load(folder)
    # Each has room for a request as long as its context.
    for llm in (first, second, third):
        assert llm.context == _CONTEXT
        reply = llm.complete("a " * 290, temperature=0, max_tokens=40)
        assert reply.usage.completion_tokens == 40
    second.close()
    fourth = load(folder)
    with pytest.raises(Qwen3Error, match="does not fit"):
        load(folder)
    del third, llm
    gc.collect()
    fifth = load(folder)
    for llm in (first, fourth, fifth):
        llm.close()
    with load(folder) as llm:
        assert shares_of(llm)[0].available == weights + 3 * least


def test_an_engine_that_cannot_be_made_gives_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    gc.collect()
    before = memory_ledger.unallocated_guarantees()
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr("qwen3_mlx.engine.cache_manager.PrefixStore", fail)
        load(folder)
    assert memory_ledger.unallocated_guarantees() == before


@pytest.mark.as_cpu
def test_a_smaller_context_leaves_more_for_others(
    folder: Path, room_for: Callable[[int], None]
) -> None:
    weights, least = sizes_of(folder)
    room_for(weights + least * 3 // 2)
    with load(folder), pytest.raises(Qwen3Error, match="or loading it with less context"):
        load(folder)
    with load(folder, context=256) as small, load(folder) as large:
        assert sum(share.available for share in shares_of(small, large)) <= weights + least * 3 // 2
        assert large.context == _CONTEXT


def test_an_llm_goes_on_with_less_when_another_comes(
    folder: Path, room_for: Callable[[int], None]
) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "loop_guard": False}
    prompts = [f"{word} " * 30 for word in ("Hello", "a", "b")]
    _, least = sizes_of(folder)
    with load(folder) as llm:
        expected = [llm.complete(prompt, **options).text for prompt in prompts]
    room_for(least * 5 // 2)
    with load(folder) as llm:
        streams = [llm.stream(prompt, **options, thinking=False) for prompt in prompts]
        next(streams[0])
        with load(folder) as other:
            assert shares_of(llm)[0].available < 2 * least
            replies = [llm.complete(prompt, **options).text for prompt in prompts]
            assert replies == expected
            assert other.complete(prompts[0], **options).text == expected[0]
        assert shares_of(llm)[0].available == least * 5 // 2
        for stream in streams:
            assert len(list(stream)) > 1


def test_unwiring_one_llm_leaves_the_others_wired(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    before = backend._wired
    one = load(folder)
    size = sum(array.nbytes for array in one.model.tensors().values())
    assert backend._wired == before + size
    two = load(folder, draft=folder)  # two models
    assert backend._wired == before + 3 * size
    one.close()
    one.close()
    assert backend._wired == before + 2 * size
    del two
    gc.collect()
    assert backend._wired == before
    broken = write_tiny(tmp_path / "broken")
    (broken / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(Qwen3Error):
        load(broken)
    assert backend._wired == before
    limits: list[int] = []
    monkeypatch.setattr(backend, "on_metal", lambda: True)
    most, room = 10**9, 64 << 20  # buffers that the sum of their sizes leaves out stay unwired
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": most})
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    monkeypatch.setattr(backend, "_wired", 0)
    for change in (300, 500, most, -300, -500 - most):
        backend.wire(change) if change > 0 else backend.unwire(-change)
    assert limits == [300 + room, 800 + room, most, most, 0]


# --- logits -------------------------------------------------------------------------------------


def unchunked(llm: LLM, ids: list[int]) -> mx.array:
    return llm.compute(lambda model: model(mx.array([ids]))[0].astype(mx.float32))


@pytest.mark.parametrize("kind", ["dense", "moe", "quantized cache"])
def test_logits_in_chunks_are_those_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    folder = write_tiny(tmp_path / "model", MOE if kind == "moe" else TINY)
    with load(folder, kv_bits=4 if kind == "quantized cache" else None) as llm:
        for count in (1, 2, 64, 65, 300):
            ids = random_ids(count, seed=count)
            assert_close(llm.logits(ids), unchunked(llm, ids), 1e-4)


def test_logits_keep_to_the_context_and_the_memory(
    folder: Path, room_for: Callable[[int], None]
) -> None:
    with load(folder, context=128) as llm:
        assert llm.logits([1] * 128).shape[0] == 128
        with pytest.raises(ContextError, match="129 ids are more than the context window of 128"):
            llm.logits([1] * 129)
    weights, least = sizes_of(folder)
    room_for(weights + least)
    with load(folder) as llm:
        few, many = [1] * 100, [1] * 640
        expected = llm.logits(few)
        llm.complete("a " * 290, max_tokens=1)  # what is kept of it gives way
        sum_shown = r"logits of 640 tokens do not fit: logits .* GB \+ cache .* = .*are free; ask"
        with pytest.raises(Qwen3Error, match=sum_shown):
            llm.logits(many)
        for _ in range(9):  # the memory is given back
            assert_close(llm.logits(few), expected, 1e-5)
        assert llm.complete("a " * 290, max_tokens=40).usage.completion_tokens == 40


def test_logits_take_no_more_than_planned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    begin = EngineCore.logits

    def note(self: EngineCore, *given: Any) -> Any:
        logits = begin(self, *given)
        made.append(logits.nbytes)
        return logits

    monkeypatch.setattr(EngineCore, "logits", note)
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    with load(folder) as llm:
        llm.logits([1])
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        logits, cache = llm.logits(random_ids(600)), 601 * 2 * 3 * 2 * 64 * 4
        taken = mx.get_peak_memory() - before
    assert logits.nbytes < taken <= made[-1]
    # The result would be there twice, were it put together of parts.
    assert taken < 2 * logits.nbytes + cache


def test_replies_go_on_between_the_chunks_of_logits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    done: list[str] = []
    step, advance_job = EngineCore.step, EngineCore.advance_job

    def note(name: str, job: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            done.append(name)
            return job(*arguments)

        return noted

    monkeypatch.setattr(EngineCore, "step", note("step", step))
    monkeypatch.setattr(EngineCore, "advance_job", note("chunk", advance_job))
    ids = random_ids(600)
    with load(folder) as llm:
        stream = llm.stream("Hello", max_tokens=500, temperature=0, loop_guard=False)
        next(stream)
        beside = llm.logits(ids)
        stream.close()
        assert_close(beside, unchunked(llm, ids), 1e-4)
    chunks = [place for place, name in enumerate(done) if name == "chunk"]
    assert len(chunks) > 5
    between = [done[a:b].count("step") for a, b in zip(chunks, chunks[1:], strict=False)]
    assert sum(count > 0 for count in between) > len(between) // 2


def test_closing_ends_logits_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    llm, errors = load(folder), list[BaseException]()
    begun = threading.Event()
    advance_job = EngineCore.advance_job

    def note(self: EngineCore, logits: Logits) -> bool:
        begun.set()
        return advance_job(self, logits)

    monkeypatch.setattr(EngineCore, "advance_job", note)

    def ask() -> None:
        try:
            llm.logits([1] * 640)
        except Qwen3Error as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    begun.wait(10)
    llm.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1 and "this LLM is closed" in str(errors[0])


def test_what_is_forgotten_is_owed_again(folder: Path, room_for: Callable[[int], None]) -> None:
    weights, least = sizes_of(folder)
    room_for(weights + 4 * least)  # a quarter of which is for kept prompts
    with load(folder) as llm:
        llm.complete("a " * 200, max_tokens=40)
        (share,) = shares_of(llm)
        for _ in range(3):  # turns of the engine, the last of which takes note of what is kept
            llm.compute(lambda model: mx.zeros(1))
        assert (
            share.held > 0
            and memory_ledger.unallocated_guarantees() == share.guaranteed - share.held
        )
        llm.forget()
        assert share.held == 0 and memory_ledger.unallocated_guarantees() == share.guaranteed
