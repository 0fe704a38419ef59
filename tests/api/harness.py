"""What the tests of this room share."""

import time

from qwen3_mlx import LLM


def settle(llm: LLM) -> None:
    """Wait until the idle work is done."""
    for _ in range(6000):
        if not llm._worker.call(lambda: llm._open().engine._core.scheduler.waiting):
            if not llm._worker.call(lambda: llm._open().engine._core.scheduler.running):
                return
        time.sleep(0.01)
    raise AssertionError("idle work goes on and on")
