"""The scheduler: which sequences run next, decided over counts alone, without a model."""

import ast
import sys
from pathlib import Path

from qwen3_mlx.engine import scheduler
from qwen3_mlx.engine.request import IDLE, NORMAL
from qwen3_mlx.engine.scheduler import Scheduler
from tests.engine.harness import FakeCaches, Schedulable


def run(plan: Scheduler[Schedulable], steps: int, chunk: int = 64) -> list[str]:
    """Run steps and return them as text: the decoding sequences, and the prefilling in brackets."""
    lines = []
    for _ in range(steps):
        step = plan.next_step()
        reading = f"[{step.prefilling[0]}]" if step.prefilling else ""
        lines.append(" ".join(map(str, step.decoding)) + reading)
        for job in step.decoding:
            job.take(1)
        if step.prefilling:
            step.prefilling[0].take(min(chunk, step.prefilling[0].num_uncomputed))
        for job in [job for job in plan.running if job.complete]:
            plan.remove(job)
    return lines


def make(room: int = 10_000, kept: int = 0) -> tuple[Scheduler[Schedulable], FakeCaches]:
    caches = FakeCaches(kept)
    return Scheduler(room, caches), caches


def test_all_decode_while_prompts_are_read_in_turn() -> None:
    plan, _ = make()
    for job in (Schedulable("a", 60), Schedulable("b", 128), Schedulable("c", 128)):
        plan.add(job)
    assert run(plan, 6) == ["[a]", "a[b]", "a[c]", "a[b]", "a b[c]", "a b c"]


def test_idle_work_runs_alone_and_gives_way() -> None:
    plan, caches = make()
    idle = Schedulable("idle", 500, priority=IDLE)
    plan.add(idle)
    assert run(plan, 2) == ["[idle]", "[idle]"]
    plan.add(Schedulable("a", 60, reply=2))
    assert run(plan, 5) == ["[a]", "a", "a", "[idle]", "[idle]"]
    assert caches.preempted == [idle]


def test_priorities_come_before_arrival() -> None:
    plan, _ = make(room=100)
    plan.add(Schedulable("late", 80, reply=1, priority=5))
    plan.waiting[0].priority = NORMAL
    plan.add(Schedulable("first", 80, reply=1, priority=-1))
    assert run(plan, 3, chunk=100) == ["[first]", "first", "[late]"]


def test_nobody_starts_without_room_and_kept_prefixes_give_way() -> None:
    plan, caches = make(room=200, kept=150)
    for name in "abc":
        plan.add(Schedulable(name, 60, reply=3))
    plan.next_step()
    assert (len(plan.running), caches.prefix_room) == (2, 60)
    assert plan.room_in_use() == 200
    assert [job.name for job in plan.waiting] == ["c"]


def test_the_last_to_come_makes_room_for_growth() -> None:
    plan, caches = make(room=141)
    first, second = Schedulable("a", 60, reply=30), Schedulable("b", 60, reply=30)
    plan.add(first)
    plan.add(second)
    run(plan, 60)
    assert caches.preempted and caches.preempted[0] is second
    run(plan, 60)
    assert not plan.running and not plan.waiting


def test_chunks_adapt_to_the_speed_while_others_wait() -> None:
    plan, _ = make()
    plan.add(Schedulable("a", 10, reply=1000))
    run(plan, 1)
    plan.add(Schedulable("long", 5000))
    step = plan.next_step()
    assert plan.prefill_budget(step, 2048) == 64  # nothing is known of the speed yet
    plan.observe(64, 0.05)
    assert plan.prefill_budget(step, 2048) == 320  # 1,280 a second for a quarter of a second
    plan.observe(320, 3.2)
    assert 64 < plan.prefill_budget(step, 2048) < 320
    assert plan.prefill_budget(step, 100) == 100
    plan.remove(plan.running[0])
    assert plan.prefill_budget(plan.next_step(), 2048) == 2048


def test_the_scheduler_imports_no_arrays() -> None:
    tree = ast.parse(Path(scheduler.__file__).read_text("utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {
        "collections.abc",
        "qwen3_mlx.engine.moving_average",
        "qwen3_mlx.engine.request",
    }


def test_room_is_not_made_for_a_sequence_that_the_step_in_flight_has_ended() -> None:
    plan, caches = make(room=100, kept=60)
    first, second = Schedulable("a", 10), Schedulable("b", 10)
    plan.add(first)
    plan.add(second)
    run(plan, 3)
    assert plan.running == [first, second]

    def end_all(job: Schedulable) -> None:
        plan.remove(first)
        plan.remove(second)

    caches.preempt = end_all  # type: ignore[method-assign]
    assert not plan._make_room(first, 90)
    assert first.room < 90
    assert not plan.running
