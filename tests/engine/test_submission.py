"""When a step is submitted: in two halves, and with the tokens and memory of any other order."""

from unittest.mock import patch

import mlx.core as mx
import pytest

from benchmarks.orders import Order, early, late
from qwen3_mlx.engine.in_flight import CompletedStep, InFlightStep
from qwen3_mlx.errors import Qwen3Error
from tests.engine.harness import MODELS, PROMPTS, Client, alone, engine_of, model_of, run
from tests.engine.test_engine import follow_a_random_schedule
from tests.support import random_ids

CACHES = ["dense", "moe", "8", "k8v4", "4"]  # dense and MoE networks, and bits of the cache


@pytest.mark.heavy
@pytest.mark.parametrize("order", [late, early])
@pytest.mark.parametrize("kind", ["dense", "moe", "4"])
@pytest.mark.parametrize("way", ["plain", "lookup"])
def test_the_order_of_submission_changes_no_token(
    order: Order,
    kind: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other tests of the engine hold the same of steps in two halves."""
    monkeypatch.setattr(InFlightStep, "submit_first_half", order)
    for seed in (1, 2):
        follow_a_random_schedule(kind, way, seed)


def test_steps_that_only_decode_begin_before_the_former_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those with a chunk of a prompt, and those behind one, begin when it is done."""
    begun: list[tuple[int, int, int]] = []  # prompt tokens of both, and what was submitted
    submit = InFlightStep.submit_first_half

    def noted(step: InFlightStep, former: InFlightStep) -> None:
        with patch.object(mx, "async_eval", wraps=mx.async_eval) as submitted:
            submit(step, former)
        tokens = step.num_prefill_tokens, former.num_prefill_tokens
        begun.append((*tokens, submitted.call_count))

    monkeypatch.setattr(InFlightStep, "submit_first_half", noted)
    engine = engine_of(MODELS["dense"])
    first, second = Client(PROMPTS[0], 12), Client(PROMPTS[1], 12)
    engine.submit(first.request)
    for _ in range(6):
        engine.step()
    run(engine, second)
    assert [client.tokens for client in (first, second)] == [alone("dense")[n][:12] for n in (0, 1)]
    assert {submitted for *_, submitted in begun} == {0, 1}
    assert all(submitted == (not chunk and not before) for chunk, before, submitted in begun)


def peak_of_decoding(kind: str, sequences: int) -> int:
    """Return the most bytes that twenty decode steps hold beside what was there before."""
    engine = engine_of(model_of(kind))
    clients = [Client(random_ids(900, seed=seed) * 2, 40) for seed in range(sequences)]
    for client in clients:
        engine.submit(client.request)
    while min(len(client.tokens) for client in clients) < 12:  # joint buffers, if any, are made
        engine.step()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        engine.step()
    peak = mx.get_peak_memory() - held
    for client in clients:
        engine.cancel(client.request)
    run(engine)
    return peak


@pytest.mark.heavy
@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("kind", CACHES)
def test_no_cache_is_copied(kind: str, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = peak_of_decoding(kind, sequences)
    monkeypatch.setattr(InFlightStep, "submit_first_half", late)
    buffer = 1800 * 2 * 64 * 4 // {"8": 4, "k8v4": 8, "4": 8}.get(kind, 1)  # bytes, in one layer
    assert halves < peak_of_decoding(kind, sequences) + buffer / 2


def test_a_failure_between_the_halves_drops_both_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(MODELS["dense"])
    clients = [Client(PROMPTS[n], 10) for n in (0, 1)]
    for client in clients:
        engine.submit(client.request)
    for _ in range(4):
        engine.step()

    def fail(step: InFlightStep) -> CompletedStep:
        raise RuntimeError("[METAL] Insufficient Memory")

    with monkeypatch.context() as broken:
        broken.setattr(InFlightStep, "wait", fail)
        engine.step()
    for client in clients:
        assert isinstance(client.outcomes[0], Qwen3Error)
    assert engine._core.caches.prefix_room == 0
    again = Client(PROMPTS[0], 10)
    run(engine, again)
    assert again.tokens == alone("dense")[0][:10]
