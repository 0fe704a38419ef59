"""The engine: whatever else runs, each request gets what it would get alone."""

import gc
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen3_mlx import backend
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.forward import BatchSlice, ForwardPass, forward, warm_up
from qwen3_mlx.engine.memory import RESERVE
from qwen3_mlx.engine.request import IDLE, NORMAL, RequestResult
from qwen3_mlx.engine.sampling import Sampler, choose
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3
from tests.engine.harness import (
    GREEDY,
    MODELS,
    MOST,
    PROMPTS,
    STEM,
    WAYS,
    Client,
    ErraticConstraint,
    ScriptedConstraint,
    alone,
    engine_of,
    expected_of_erratic,
    expected_of_scripted,
    model_of,
    run,
)
from tests.support import TINY, greedy_tokens, random_ids

KINDS = [*MODELS, "8", "k8v4", "4"]  # the bits of the cache of a dense model
GREEDY_TOO = SamplingParams(top_k=1).over(NEUTRAL)
TOKEN = TINY["num_hidden_layers"] * 2 * 2 * 64 * 4  # bytes of a token in the tiny models' caches


@cache
def logits_alone(kind: str) -> list[Any]:
    """Return the logits [MOST, V] of a reply, from one pass without any cache."""
    model = model_of(kind)
    passes = [
        model(mx.array([prompt + reply[:-1]]), model.make_cache())[0, len(prompt) - 1 :]
        for prompt, reply in zip(PROMPTS, alone(kind), strict=True)
    ]
    return [np.array(logits) for logits in passes]


class Rows:
    """Takes note of the logits by which each sequence's tokens are chosen."""

    def __init__(self) -> None:
        self.prompts: dict[Sampler, Sequence[int]] = {}
        self.of: dict[Sampler, list[mx.array]] = defaultdict(list)

    def sampler(self, params: SamplingParams, *, prompt: Sequence[int], **options: Any) -> Sampler:
        rows = self.of

        class Noted(Sampler):
            def rewind(self, tokens: mx.array) -> None:
                super().rewind(tokens)
                del rows[self][len(rows[self]) - tokens.size :]

        made = Noted(params, prompt=prompt, **options)
        if params is GREEDY:
            self.prompts[made] = prompt
        return made

    def choose(self, logits: mx.array, samplers: Sequence[Sampler], *rest: Any) -> mx.array:
        for row, sampler in enumerate(samplers):
            self.of[sampler].append(logits[row])
        return choose(logits, samplers, *rest)


def follow_a_random_schedule(kind: str, way: str, seed: int) -> None:
    """Requests join, leave, are cancelled and reuse prefixes at random, in little memory."""
    rows = Rows()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3_mlx.engine.sequence.Sampler", rows.sampler)
        patch.setattr("qwen3_mlx.engine.step_builder.choose", rows.choose)
        patch.setattr("qwen3_mlx.engine.speculation.draft_model.choose", rows.choose)
        clients = run_a_random_schedule(kind, way, seed)
    for sampler, prompt in rows.prompts.items():
        expected = logits_alone(kind)[PROMPTS.index(list(prompt))]
        (client,) = (client for client in clients if client.request.ids is prompt)
        if not client.tokens:
            continue
        logits = np.array(mx.stack(rows.of[sampler][: len(client.tokens)]))
        # Another order of sums may round a key or a value of a quantized cache the other way.
        allowed = 1e-4 if kind in MODELS else 0.02
        assert np.abs(logits - expected[: len(logits)]).max() < allowed, f"seed {seed}"


def random_client(kind: str, rng: random.Random) -> tuple[Client, list[int]]:
    """Return a client, with or without a constraint, and its reply when nothing else runs."""
    which, most = rng.randrange(len(PROMPTS)), rng.randint(1, MOST)
    options: dict[str, Any] = {"priority": rng.choice([0, 0, 0, IDLE])}
    if rng.random() < 0.3:
        options |= {"sampling": GREEDY_TOO, "constraint": ErraticConstraint()}
        return Client(PROMPTS[which], most, **options), expected_of_erratic(kind, which)
    return Client(PROMPTS[which], most, **options), alone(kind)[which]


def run_a_random_schedule(kind: str, way: str, seed: int) -> list[Client]:
    """Run it, and compare the tokens with those of each prompt alone."""
    rng = random.Random(seed)
    room = rng.choice([260, 500, 900, 100_000])  # tokens
    engine = engine_of(model_of(kind), way, available=RESERVE + 6_000_000 + 2 * room * TOKEN)
    engine._core.scheduler.room = max(room, 260)
    coming = []
    for _ in range(rng.randint(2, 7)):
        client, expected = random_client(kind, rng)
        cancelled_at = rng.randint(0, 30) if rng.random() < 0.25 else None
        coming.append((rng.randint(0, 40), cancelled_at, client, expected))
    for number in range(2000):
        for arrival, cancelled_at, client, _ in coming:
            if arrival == number:
                engine.submit(client.request)
            if cancelled_at is not None and number == arrival + cancelled_at:
                engine.cancel(client.request)
        if not engine.step() and number > 80:
            break
    for _, cancelled_at, client, expected in coming:
        if client.outcome.reason == "cancelled":
            assert cancelled_at is not None
        else:
            assert len(client.tokens) == client.request.max_tokens
        # With more tokens to come, the constraint might have rolled the last ones back.
        tokens = client.tokens[: -2 if client.request.constraint else None]
        assert tokens == expected[: len(tokens)], f"seed {seed}"
    assert engine._core.scheduler.running == engine._core.scheduler.waiting == []
    return [client for _, _, client, _ in coming]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        pytest.param(way, kind, marks=pytest.mark.slow if kind in "84" else [])
        for way in WAYS
        for kind in KINDS
    ],
)
def test_a_few_random_schedules(way: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    follow_a_random_schedule(kind, way, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_random_schedules(way: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    for seed in range(12, 262):
        follow_a_random_schedule(kind, way, seed)


def test_a_seed_chooses_the_same_alone_and_among_others() -> None:
    ways = [
        SamplingParams(temperature=1.0, top_k=20, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=20, top_p=0.9),
        SamplingParams(temperature=0.7, min_p=0.05),
        SamplingParams(temperature=1.5, presence_penalty=1.0, repetition_penalty=1.2),
        SamplingParams(temperature=0.0, logit_bias={5: 3.0}),
    ]

    def clients() -> list[Client]:
        return [
            Client(PROMPTS[i], 20, sampling=way.over(NEUTRAL), seed=i) for i, way in enumerate(ways)
        ]

    together, engine = clients(), engine_of(MODELS["dense"])
    run(engine, *together)
    for one, other in zip(clients(), together, strict=True):
        run(engine_of(MODELS["dense"]), one)
        assert one.tokens == other.tokens


# --- prefixes -----------------------------------------------------------------------------------


def test_a_prompt_that_goes_on_is_not_read_again() -> None:
    engine = engine_of(MODELS["dense"])
    first = Client(STEM, 30)
    run(engine, first)
    longer = STEM + first.tokens + random_ids(20, seed=9)
    second = Client(longer, 10)
    run(engine, second)
    assert second.tokens == greedy_tokens(MODELS["dense"], longer, 10)
    assert second.outcome.cached_tokens == len(STEM) + 29  # the last token was never read
    assert second.read[0] == len(STEM) + 29
    assert first.outcome.cached_tokens == 0


def test_a_shared_beginning_is_copied_and_stays() -> None:
    engine = engine_of(MODELS["dense"])
    one, other = STEM + random_ids(50, seed=8), STEM + random_ids(50, seed=9)
    run(engine, Client(one, 5))
    second, again = Client(other, 5), Client(one, 5)
    run(engine, second)
    run(engine, again)
    assert second.outcome.cached_tokens == len(STEM)
    assert again.outcome.cached_tokens == len(one) - 1
    for client in (second, again):
        assert client.tokens == greedy_tokens(MODELS["dense"], client.request.ids, 5)


def test_a_prefix_hit_copies_nothing() -> None:
    model = MODELS["dense"]
    engine = engine_of(model)
    long = random_ids(900) + random_ids(900, seed=1)
    run(engine, Client(long, 0))
    held = 1800 * TOKEN
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    hit = Client([*long, 5, 6, 7], 20)
    run(engine, hit)
    assert hit.outcome.cached_tokens == 1800
    assert mx.get_peak_memory() - before < held / 12  # a copy of one buffer would be a sixth


@pytest.mark.heavy
@pytest.mark.parametrize("way", WAYS)
def test_ended_requests_leave_nothing_to_the_garbage_collector(way: str) -> None:
    engine = engine_of(MODELS["dense"], way)

    def held() -> int:
        run(engine, *[Client(prompt, MOST) for prompt in PROMPTS])
        engine.forget()
        return mx.get_active_memory()

    held()
    gc.collect()
    before = mx.get_active_memory()
    gc.disable()
    try:
        assert held() <= before
    finally:
        gc.enable()


def test_idle_work_reads_ahead_and_yields() -> None:
    engine = engine_of(MODELS["dense"])
    long = random_ids(600)
    idle = Client(long, 0, priority=IDLE)
    engine.submit(idle.request)
    engine.step()
    asked = Client(PROMPTS[4], 10, priority=NORMAL)
    engine.submit(asked.request)
    while not asked.outcomes:
        engine.step()
    assert asked.tokens == alone("dense")[4][:10]
    assert not idle.outcomes
    read_by_then = len(idle.read)
    run(engine)
    assert (idle.outcome.reason, idle.outcome.completion_tokens) == ("length", 0)
    assert idle.read[read_by_then] >= 64  # what had been read was kept
    later = Client([*long, 1, 2], 5)
    run(engine, later)
    assert later.outcome.cached_tokens == 600


def test_what_is_known_already_is_read_ahead_at_once() -> None:
    engine = engine_of(MODELS["dense"])
    ids = random_ids(100)
    run(engine, Client(ids, 0, priority=IDLE))
    again = Client(ids, 0, priority=IDLE)
    run(engine, again)
    assert again.outcome == RequestResult("length", 0, 99)  # without a pass
    assert engine._core.caches.prefix_room == 356  # one cache: the prompt, and room for 256 more


def test_under_steady_load_only_the_latest_is_kept_to_be_read_ahead() -> None:
    engine = engine_of(MODELS["dense"])
    asked = Client(PROMPTS[4], MOST)
    engine.submit(asked.request)
    ahead = [random_ids(30, seed=100 + number) for number in range(MOST - 2)]
    for ids in ahead:
        engine.prefetch(ids)
        engine.step()
        assert len(engine._core.scheduler.waiting) <= 17
    assert not asked.outcomes
    run(engine)
    first, last = (Client([*ids, 1], 1) for ids in (ahead[0], ahead[-1]))
    run(engine, first, last)
    assert (first.outcome.cached_tokens, last.outcome.cached_tokens) == (0, 30)


def test_common_prefixes() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2]) == 2
    assert common_prefix([9, 2], [1, 2]) == 0


# --- who waits, and for how long ----------------------------------------------------------------


@pytest.mark.heavy
def test_a_long_prompt_delays_nobody_by_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 512)
    engine = engine_of(MODELS["dense"])
    others = [Client(PROMPTS[i], MOST) for i in (0, 3, 4)]
    for client in others:
        engine.submit(client.request)
    while not all(client.tokens for client in others):
        engine.step()
    long = Client(random_ids(900) * 2, 5)
    engine.submit(long.request)
    while not long.tokens and not any(client.outcomes for client in others):
        counts = [len(client.tokens) for client in others]
        engine.step()
        assert [len(client.tokens) - n for client, n in zip(others, counts, strict=True)] == [1] * 3
    assert len(long.read) > 2
    run(engine)
    assert long.tokens == greedy_tokens(MODELS["dense"], long.request.ids, 5)


def test_prompts_are_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    long, short = Client(random_ids(900), 2), Client(PROMPTS[4], 2)
    engine = engine_of(MODELS["dense"])
    engine.submit(long.request)
    engine.submit(short.request)
    while not short.outcomes:
        engine.step()
    assert not long.outcomes
    run(engine)
    assert long.outcome.reason == "length"


def test_short_prompts_are_read_together_and_beside_a_long_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[list[int]] = []

    def noted(
        model: Qwen3, ids: mx.array, parts: Sequence[BatchSlice], *rest: Any, head: bool
    ) -> ForwardPass:
        steps.append([part.length for part in parts])
        return forward(model, ids, parts, *rest, head=head)

    monkeypatch.setattr("qwen3_mlx.engine.step_builder.forward", noted)
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    model = MODELS["dense"]
    shorts = [Client(random_ids(n, seed=n), 4) for n in (20, 30, 10)]
    run(engine_of(model), *shorts)
    assert steps[0] == [20, 30, 10] and steps[1] == [1, 1, 1]
    steps.clear()
    long = Client(random_ids(150, seed=8), 4)
    run(engine_of(model), long, *(Client(short.request.ids, 4) for short in shorts))
    assert sum(steps[0]) <= 64 and max(map(sum, steps)) <= 64 + 4
    assert [client.tokens for client in shorts] == [
        greedy_tokens(model, client.request.ids, 4) for client in shorts
    ]


def test_who_finds_no_room_waits_and_who_came_last_makes_room() -> None:
    engine = engine_of(MODELS["dense"])
    engine._core.scheduler.room = 350
    clients = [Client(random_ids(75, seed=s), 40) for s in range(4)]
    for client in clients:
        engine.submit(client.request)
    most = 0
    while engine.step():
        most = max(most, engine._core.scheduler.room_in_use())
    assert most <= 350
    for client in clients:
        assert client.tokens == greedy_tokens(MODELS["dense"], client.request.ids, 40)


def test_memory_pins_the_context_and_shrinks_chunks() -> None:
    model = MODELS["dense"]
    plenty = engine_of(model)
    assert plenty.context == TINY["max_position_embeddings"]
    little = engine_of(model, available=RESERVE + 3_000_000)
    assert 64 < little.context < 2048
    assert little.budget.chunk(0, 0) > little.budget.chunk(
        little.context - 64, little.budget.tokens
    )
    assert little.budget.chunk(10**6, 10**9) == 64


# --- ends ---------------------------------------------------------------------------------------


def test_an_error_is_one_requests_alone() -> None:
    class Failing(Client):
        def advance(self, ids: Sequence[int]) -> None:
            raise OSError("the disk is full")

    engine = engine_of(MODELS["dense"])
    failing, other = Failing(PROMPTS[0], 10), Client(PROMPTS[1], 10)
    wrong = Client(PROMPTS[2], 10, sampling=SamplingParams(logit_bias={9999: 1.0}).over(NEUTRAL))
    run(engine, failing, wrong, other)
    assert isinstance(failing.outcomes[0], OSError)
    assert isinstance(wrong.outcomes[0], ValueError)
    assert other.tokens == alone("dense")[1][:10]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("name", ["progress", "on_logprobs", "on_finish", "advance"])
def test_callbacks_may_raise_what_ends_programs(name: str, error: BaseException) -> None:
    def fail(*_: Any) -> None:
        raise error

    engine, failing, other = engine_of(MODELS["dense"]), Client(PROMPTS[0], 10), Client(STEM, 10)
    if name == "advance":
        failing.advance = fail  # type: ignore[method-assign, assignment]
    else:
        changed: dict[str, Any] = {name: fail, "top_logprobs": 1}
        failing.request = replace(failing.request, **changed)
    run(engine, failing, other)
    assert failing.outcomes == ([] if name == "on_finish" else [error])
    assert other.tokens == greedy_tokens(MODELS["dense"], STEM, 10)
    assert engine._core.scheduler.room_in_use() == engine._core.caches.prefix_room


def test_what_cannot_be_run_is_refused() -> None:
    engine = engine_of(MODELS["dense"])
    empty, long = Client([], 5), Client(PROMPTS[0], 5000)
    run(engine, empty, long)
    assert "at least one token" in str(empty.outcomes[0])
    assert "the request may take 5,073 tokens; the context is 2,048" in str(long.outcomes[0])


def test_an_id_that_the_model_does_not_know_is_never_looked_up() -> None:
    engine = engine_of(MODELS["dense"])
    written = Client([5, 1088], 5)
    forced = Client([5], 5, constraint=ScriptedConstraint([1089]))
    run(engine, written, forced)
    known = "the model knows 1,088 tokens, and token "
    assert str(written.outcomes[0]) == f"{known}1088 is none of them"
    assert str(forced.outcomes[0]) == f"{known}1089 is none of them"


def test_a_failing_device_costs_those_whose_step_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(MODELS["dense"])
    run(engine, Client(STEM, 5))
    clients = [Client(PROMPTS[i], 10) for i in (0, 1)]
    for client in clients:
        engine.submit(client.request)
    for _ in range(4):
        engine.step()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[METAL] Insufficient Memory")

    with monkeypatch.context() as broken:
        broken.setattr("qwen3_mlx.engine.step_builder.forward", fail)
        engine.step()
    for client in clients:
        assert isinstance(client.outcomes[0], Qwen3Error)
        assert "Insufficient Memory" in str(client.outcomes[0])
    assert engine._core.caches.prefix_room == 0
    again = Client(PROMPTS[0], 10)
    run(engine, again)
    assert again.tokens == alone("dense")[0][:10]


def test_cancelling_frees_the_memory() -> None:
    engine = engine_of(MODELS["dense"])
    run(engine, Client(PROMPTS[3], 3))
    engine.forget()
    before = mx.get_active_memory()
    for steps in (1, 2, 5, 12):
        client = Client(random_ids(900), 50)
        engine.submit(client.request)
        for _ in range(steps):
            engine.step()
        engine.cancel(client.request)
        engine.step()
        assert client.outcome.reason == "cancelled"
        run(engine)
        assert mx.get_active_memory() <= before


def test_tokens_of_an_engine_without_a_worker() -> None:
    engine = engine_of(MODELS["dense"])
    tokens = engine.stream(PROMPTS[0], max_tokens=20, sampling=SamplingParams(temperature=0.0))
    assert [next(tokens) for _ in range(5)] == alone("dense")[0][:5]
    tokens.close()  # type: ignore[attr-defined]
    assert not engine.step()
    wrong = SamplingParams(logit_bias={-1: 1.0})
    with pytest.raises(ValueError, match="logit_bias names -1"):
        list(engine.stream(PROMPTS[0], max_tokens=1, sampling=wrong))


# --- constraints --------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [[], [8, 10]])
def test_constraints_mask_force_and_end(first: list[int]) -> None:
    model = MODELS["dense"]
    engine = engine_of(model)
    scripts = [ScriptedConstraint(first), ScriptedConstraint(first)]
    steered = [
        Client(PROMPTS[i], 30, constraint=script) for i, script in zip((0, 4), scripts, strict=True)
    ]
    free = Client(PROMPTS[1], 30)
    run(engine, *steered, free)
    for client, script, which in zip(steered, scripts, (0, 4), strict=True):
        assert client.tokens == expected_of_scripted(model, PROMPTS[which], first)
        assert script.taken == client.tokens
        assert (client.outcome.reason, client.outcome.completion_tokens) == ("stop", 10)
    assert free.tokens == alone("dense")[1][:30]


def test_a_constraint_ends_in_time_and_fails_alone() -> None:
    class Impossible(ScriptedConstraint):
        def mask(self) -> Any:
            return np.zeros(1088 // 32, dtype=np.uint32)

    engine = engine_of(MODELS["dense"])
    short, impossible = (
        Client(PROMPTS[0], 6, constraint=ScriptedConstraint()),
        Client(PROMPTS[4], 6, constraint=Impossible()),
    )
    free = Client(PROMPTS[1], 8)
    run(engine, short, impossible, free)
    assert len(short.tokens) == 6 and short.outcome.reason == "length"  # cut among the forced
    assert isinstance(impossible.outcomes[0], ValueError)
    assert free.tokens == alone("dense")[1][:8]


@pytest.mark.heavy
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    "name",
    ["advance", "forced_tokens", "mask", "lookahead_masks", "needs_mask", "finished", "rollback"],
)
@pytest.mark.parametrize("way", WAYS[:2])
def test_a_constraint_may_raise_anything_anywhere(way: str, name: str, after: int) -> None:
    """It ends that request, once; the others get their replies."""

    class Raising:
        def __init__(self) -> None:
            self.left = after
            self.script = ScriptedConstraint()

        def __getattr__(self, asked: str) -> Any:
            if asked == name:
                self.left -= 1
                if self.left < 0:
                    raise SystemExit(3)
            return getattr(self.script, asked)

    engine = engine_of(MODELS["dense"], way)
    failing = Client(PROMPTS[0], 12, constraint=Raising())
    others = [Client(PROMPTS[i], 12) for i in (1, 2)]
    run(engine, failing, *others)
    (outcome,) = failing.outcomes
    assert isinstance(outcome, SystemExit | RequestResult)
    assert [other.tokens for other in others] == [alone("dense")[i][:12] for i in (1, 2)]
    assert engine._core.scheduler.room_in_use() == engine._core.caches.prefix_room


@pytest.mark.heavy
@pytest.mark.parametrize("kind", MODELS)
def test_what_a_constraint_takes_back_or_forces_is_as_if_nothing_had_run_ahead(kind: str) -> None:
    engine = engine_of(MODELS[kind])
    clients = [Client(prompt, MOST, constraint=ErraticConstraint()) for prompt in PROMPTS]
    free = Client(PROMPTS[1], MOST)
    run(engine, *clients, free)
    for which, client in enumerate(clients):
        assert client.tokens == expected_of_erratic(kind, which)
        assert client.outcome.completion_tokens == MOST
        assert client.request.constraint.taken == client.tokens  # type: ignore[union-attr]
    assert free.tokens == alone(kind)[1]
    later = [Client(PROMPTS[i] + client.tokens, 4) for i, client in enumerate(clients)]
    run(engine, *later)
    for client in later:
        assert client.tokens == greedy_tokens(MODELS[kind], client.request.ids, 4)


def test_a_seed_chooses_the_same_with_a_constraint_alone_and_among_others() -> None:
    way = SamplingParams(temperature=1.0, top_k=50, frequency_penalty=0.5).over(NEUTRAL)

    def client(which: int) -> Client:
        return Client(PROMPTS[which], 30, sampling=way, seed=which, constraint=ErraticConstraint())

    together = [client(i) for i in range(4)]
    run(engine_of(MODELS["dense"]), *together)
    for which, other in enumerate(together):
        one = client(which)
        run(engine_of(MODELS["dense"]), one)
        assert one.tokens == other.tokens


def check_counts(engine: Engine) -> int:
    """Compare what the penalties count with the tokens of the replies that run."""
    checked = 0
    for sequence in engine._core.scheduler.running:
        ids = sequence.ids[len(sequence.request.ids) :]
        step = engine._core._in_flight
        if sequence.num_in_flight:  # what the step in work chooses is counted, too
            assert step and step.tokens is not None
            rows = [row for row, other in enumerate(step.row_sequences) if other is sequence]
            ids = ids + [int(step.tokens[row].item()) for row in rows]  # type: ignore[arg-type]
        expected = np.bincount(ids, minlength=1088) if ids else np.zeros(1088)
        assert np.array(sequence.sampler._counts).tolist() == expected.tolist()
        assert sequence.sampler._position == len(ids)
        checked += len(ids)
    return checked


@pytest.mark.parametrize("way", WAYS)
def test_penalties_count_the_tokens_of_the_reply_whatever_became_of_others(way: str) -> None:
    sampling = SamplingParams(temperature=0.7, frequency_penalty=0.3, presence_penalty=0.1)
    engine, checked = engine_of(MODELS["dense"], way), 0
    for number, prompt in enumerate(PROMPTS):
        constraint = ErraticConstraint() if number % 3 else ScriptedConstraint([8, 10])
        client = Client(
            prompt, MOST, sampling=sampling.over(NEUTRAL), seed=number, constraint=constraint
        )
        engine.submit(client.request)
    while engine.step():
        checked += check_counts(engine)
    assert checked > 800


def penalised() -> list[Client]:
    """Give a client for each prompt, with penalties and an erratic constraint."""
    sampling = SamplingParams(temperature=0.7, frequency_penalty=0.3, repetition_penalty=1.1)
    return [
        Client(
            prompt, MOST, sampling=sampling.over(NEUTRAL), seed=3, constraint=ErraticConstraint()
        )
        for prompt in PROMPTS
    ]


@cache
def penalised_alone() -> list[list[int]]:
    """Return the replies of such clients when nothing else runs."""
    clients = penalised()
    for client in clients:
        run(engine_of(MODELS["dense"]), client)
    return [client.tokens for client in clients]


@pytest.mark.heavy
@pytest.mark.parametrize("way", WAYS)
def test_penalised_replies_with_constraints_are_the_same_alone_together_and_speculated(
    way: str,
) -> None:
    together = penalised()
    run(engine_of(MODELS["dense"], way), *together)
    assert [client.tokens for client in together] == penalised_alone()


def test_ids_are_masked_or_taken_back_at_the_end_too() -> None:
    """An end token that is taken back is no end."""

    class Reluctant(ErraticConstraint):
        def advance(self, ids: Sequence[int]) -> None:
            self.taken += ids
            self.rollback = 0
            if ids[0] == end and self._interventions == 0:
                self._interventions, self.rollback, self._due = 1, 1, [7, 8]
                self.taken.pop()

        masking = False

    plain = alone("dense")[4]
    end = next(token for token in plain if token not in (7, 8))
    place = plain.index(end)
    client = Client(PROMPTS[4], 20, constraint=Reluctant(), end_ids=frozenset([end]))
    run(engine_of(MODELS["dense"]), client)
    assert client.tokens[: place + 2] == [*plain[:place], 7, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_warming_up_leaves_nothing(kind: str) -> None:
    model = model_of(kind)
    warm_up(model)
    before = mx.get_active_memory()
    warm_up(model)
    assert mx.get_active_memory() == before


def test_a_masked_request_that_joins_computes_nothing_while_a_step_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its logits would be computed early for the mask, and the caches in use would be copied."""
    engine, early = engine_of(MODELS["dense"]), list[bool]()
    async_eval = mx.async_eval

    def noted(*arrays: Any) -> None:
        # Logits [N, V]: a step is submitted as hidden states [1, T, D], and with its tokens.
        arrays_of = arrays[0] if isinstance(arrays[0], list) else [arrays[0]]
        if [array.ndim for array in arrays_of] == [2]:
            early.append(engine._core._in_flight is not None)
        async_eval(*arrays)

    monkeypatch.setattr(mx, "async_eval", noted)
    running, joining = Client(PROMPTS[0], 20), Client(PROMPTS[1], 20)
    masked = Client(PROMPTS[2], 20, constraint=ScriptedConstraint())
    engine.submit(running.request)
    for _ in range(4):
        engine.step()
    run(engine, joining, masked)
    assert early and not any(early)
    assert masked.tokens == expected_of_scripted(MODELS["dense"], PROMPTS[2], [])
