"""Fine-tuning from Python: teach the demo model which of two numbers is larger, then ask it.

python examples/fine_tune.py [STEPS]
"""

import sys
import tempfile
from pathlib import Path

from larger_lessons import questions, write_lessons

from qwen3_mlx import load, tune


def main() -> None:
    """Train an adapter in a scratch folder, and count right answers with and without it."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    known = questions(1500, seed=0)  # those of the lessons
    asked = [pair for pair in questions(60, seed=99) if pair not in known][:24]
    with tempfile.TemporaryDirectory() as scratch:
        lessons, _ = write_lessons(Path(scratch))
        made = tune("demo", data=lessons, out=Path(scratch) / "adapter", steps=steps, batch=8)
        print(f"validation loss {made.loss_before:.2f} -> {made.loss:.2f}")
        for adapter in (None, made.folder):
            with load("demo", adapter=adapter) as llm:
                prompts = [question for question, _ in asked]
                replies = llm.batch(prompts, thinking=False, temperature=0, max_tokens=40)
            right = sum(
                reply.text.strip() == answer
                for (_, answer), reply in zip(asked, replies, strict=True)
            )
            print(f"{'with' if adapter else 'without'} the adapter: {right} of {len(asked)} right")


if __name__ == "__main__":
    main()
