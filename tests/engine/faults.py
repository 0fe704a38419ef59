"""Every call that leaves the engine's core fails in turn: python -m tests.engine.faults WAY FOLDER

The module's source is compiled anew with each call passing through `Faults.call`, which can raise
instead of it. A crowd of requests meets each fault, on one LLM that must survive them all: every
request gets its right reply or an error, those after it are answered, the memory is free again.
`WAY` is plain, ngram or draft; without a third argument, every third place is struck. `all` has
every place struck, by more of its calls, and again while a failure of the device is dealt with.
"""

import ast
import faulthandler
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3_mlx import LLM, Qwen3Error, SamplingParams, backend, load
from qwen3_mlx.api import checkpoints
from qwen3_mlx.api.stream import Stream
from qwen3_mlx.engine import cache_manager, committer, core, engine, in_flight, step_builder
from qwen3_mlx.text.events import Event, Finish
from tests.support import write_tiny

AVAILABLE = 516_500_000  # bytes: not all can run at once, so some are put aside
LIMIT = 120  # seconds that a fault, and all that follows from it, may take
GREEDY = SamplingParams(temperature=0.0)
SYSTEM = {"role": "system", "content": "Be brief. " + "apple pear plum " * 60}
OPTIONAL = (
    *("disk.", "prefixes.acquire", "prefixes.insert", "prefixes.match_length", "prefixes.unsaved"),
    *("Prefix", "clear_cache", "sequence.index_ngrams"),
)
"""Calls that only save time: no request fails with them."""
OUTSIDE = ("qwen3_mlx", "mlx", __name__)
MODULES = (in_flight, cache_manager, step_builder, committer, core)  # each imports earlier ones
WITHIN = (*(module.__name__ for module in MODULES), "qwen3_mlx.errors", "qwen3_mlx.engine.errors")
ONE = (
    "make_cache",
    "force",
    "progress",
    "sequence.commit",
    "mask",
    "lookahead_masks",
    "SequenceState",
)
"""Calls for one request: no other fails with them."""


def log(*words: object) -> None:
    """Print what is being done, in case it hangs."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


Strike = tuple[str, int, BaseException]  # the place, which call of it, what is raised there


class Faults:
    """Counts the calls by their place in the source, and raises in place of one of them."""

    def __init__(self) -> None:
        self.seen = Counter[str]()
        self.strikes: list[Strike] = []  # to come; each counts from the one before

    def arm(self, *strikes: "Strike") -> None:
        self.seen.clear()
        self.strikes = [*strikes]

    def call(self, place: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        module = str(getattr(function, "__module__", None))
        if not module.startswith(OUTSIDE) or module in WITHIN:
            return function(*args, **options)
        self.seen[place] += 1
        strikes = self.strikes and self.strikes[0][:2] == (place, self.seen[place])
        last_event = place.endswith(".on_finish")  # runs first, and fails then
        result = function(*args, **options) if last_event or not strikes else None
        if strikes:
            self.seen.clear()
            raise self.strikes.pop(0)[2]
        return result


class _Passing(ast.NodeTransformer):
    """Passes every call through `_call`, with its place in the source."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_Call(self, node: ast.Call) -> ast.Call:
        place = ast.Constant(f"{self.module} {node.lineno:4}: {ast.unparse(node.func)}")
        self.generic_visit(node)
        passing = ast.Call(ast.Name("_call", ast.Load()), [place, node.func, *node.args], [])
        passing.keywords = node.keywords
        return ast.copy_location(passing, node)


def install(faults: Faults) -> None:
    """Put the passing calls into the modules, and their class where that is used."""
    for module in MODULES:
        file = Path(str(module.__file__))
        passing = _Passing(file.stem).visit(ast.parse(file.read_text("utf-8")))
        vars(module)["_call"] = faults.call
        code = compile(ast.fix_missing_locations(passing), file, "exec")
        exec(code, vars(module))  # the project's own source, which may import from earlier ones
    vars(engine)["EngineCore"] = core.EngineCore


def crowd(llm: LLM) -> list[str | BaseException]:
    """Submit all kinds of requests at once, and return the outcome of each; some read from disk."""

    def ask(words: str, **options: Any) -> Stream:
        options = {"max_tokens": 9, "sampling": GREEDY, "thinking": False, **options}
        return llm.stream([SYSTEM, {"role": "user", "content": words}], **options)

    def idle() -> Stream:
        return ask("read ahead", prefetch_next_turn=True, max_tokens=2)

    opening = llm.tokenizer.id_of("<think>")
    assert opening is not None
    thinks = SamplingParams(temperature=0.0, logit_bias={opening: 100.0})
    streams = [idle()]
    outcomes = [read(streams[0])]
    wait_for(llm, lambda s: any(not job.request.max_tokens for job in s.scheduler.running), 0.1)
    streams = [
        *(ask(f"number {n}", progress=lambda done, total: None) for n in range(4)),
        ask("thinks", thinking=True, thinking_budget=4, max_tokens=40, sampling=thinks),
        ask("chosen", choice=["apple pear", "apple plum"]),
        ask("weighed", logprobs=1, sampling=SamplingParams(temperature=0.7), seed=5),
        ask("long " * 100),
    ]
    cancelled = ask("cancelled", max_tokens=500)
    try:
        next(cancelled)
        cancelled.close()
    except Exception:  # noqa: BLE001 - the fault was this one's
        pass
    outcomes += map(read, streams)
    read(cancelled)
    # What was read is written to disk, and all memory is free.
    assert wait_for(llm, lambda s: not (s.scheduler.running or s.scheduler.waiting), LIMIT)
    assert wait_for(llm, lambda s: all_saved(s.caches), LIMIT)
    return outcomes


def all_saved(caches: cache_manager.CacheManager) -> bool:
    """Return whether nothing is left to be written to disk."""
    return not caches._disk or all(prefix.saved for prefix in caches._prefixes._kept)


def read(stream: Stream) -> str | BaseException:
    """Read a stream to its end; return its text, or the error in its place."""
    events: list[Event] = []
    try:
        for event in stream:
            events.append(event)
    except BaseException as error:  # noqa: BLE001 - judged by the caller
        return error
    assert not events or isinstance(events[-1], Finish)
    return "".join(getattr(event, "text", "") for event in events)


def wait_for(llm: LLM, true: Callable[[core.EngineCore], bool], seconds: float) -> bool:
    """Wait until something is true of the engine."""
    deadline = time.monotonic() + seconds
    inner = llm._open().engine._core
    while not (now := llm._worker.call(lambda: true(inner))) and time.monotonic() < deadline:
        time.sleep(0.002)
    return now


def check_rest(llm: LLM) -> None:
    """Check that nothing is left of the requests, and that no memory is held for them."""
    inner = llm._open().engine._core
    assert inner.scheduler.room_in_use() == inner.caches.prefix_room
    assert not (inner._in_flight or inner._builder.building or inner._committing)
    llm.forget()
    assert inner.scheduler.room_in_use() == 0


def check(llm: LLM, faults: Faults, expected: list[Any], *strikes: Strike) -> None:
    """Run a crowd while calls fail, and check the outcomes."""
    log(*(f"{place} ({count})" for place, count, _ in strikes))
    caches = llm._open().engine._core.caches
    disk = caches._disk
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    llm.forget()
    faults.arm(*strikes)
    outcomes = crowd(llm)
    faults.arm()
    caches._disk = disk
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for outcome, right in zip(outcomes, expected, strict=True):
        raised = outcome in [error for _, _, error in strikes]
        reported = isinstance(outcome, Qwen3Error) and "struck" in str(outcome)
        assert raised or reported or outcome == right, (outcome, right)
    place = strikes[-1][0]
    if len(strikes) == 1 and any(name in place for name in (*OPTIONAL, *ONE)):
        assert len(errors) <= any(name in place for name in ONE), errors
    log("   failed:", len(errors))
    check_rest(llm)
    assert isinstance(read(llm.stream("Hello", max_tokens=4)), str)
    faulthandler.cancel_dump_traceback_later()


def main(way: str, folder: Path, *, thorough: bool) -> None:
    """Strike the places that a crowd without faults comes by."""
    faults = Faults()
    install(faults)
    backend.available_memory = lambda: AVAILABLE
    vars(checkpoints)["check_fits"] = lambda *_: None
    tiny = write_tiny(folder / "tiny")
    drafts = {"plain": None, "ngram": "ngram", "draft": tiny}
    llm = load(tiny, prompt_cache=folder / "kept", draft=drafts[way])
    expected = crowd(llm)
    check_rest(llm)
    assert not any(isinstance(outcome, BaseException) for outcome in expected), expected
    faults.arm()
    assert crowd(llm) == expected
    reached = dict(sorted(faults.seen.items(), key=lambda item: item[0].split(":")[0]))
    (forward,) = (call for call in reached if call.endswith(": forward"))
    # The quick tier strikes every third place, or it would take a lot of the time of all tests.
    for call, seen in list(reached.items())[:: 1 if thorough else 3]:
        later = call, seen // 2 + 1, TypeError("struck")
        check(llm, faults, expected, later)
        if thorough:
            check(llm, faults, expected, (call, 1, RuntimeError("struck")))
            device = forward, reached[forward] // 2, RuntimeError("struck")
            check(llm, faults, expected, device, (call, 1, MemoryError("struck")))
    assert crowd(llm) == expected
    check_rest(llm)
    assert threading.active_count() == 2
    llm.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), thorough="all" in sys.argv)
