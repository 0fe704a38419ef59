"""Lessons for a fine-tune: which of two numbers is larger, and sums that shall stay as they are.

python examples/larger_lessons.py [FOLDER]
"""

import json
import sys
from pathlib import Path
from random import Random


def questions(count: int, seed: int) -> list[tuple[str, str]]:
    """Draw questions and their answers."""
    draw = Random(seed)
    pairs = [draw.sample(range(1, 100), 2) for _ in range(count)]
    return [(f"Which is larger, {a} or {b}?", str(max(a, b))) for a, b in pairs]


def sums(count: int, seed: int) -> list[str]:
    """Draw questions of the kind that the demo model answers already."""
    draw = Random(seed)
    return [f"What is {draw.randint(1, 60)} + {draw.randint(1, 39)}?" for _ in range(count)]


def write_lessons(folder: Path) -> tuple[Path, Path]:
    """Write lessons.jsonl, conversations, and keep.txt, questions; return both files."""
    folder.mkdir(parents=True, exist_ok=True)
    lessons, keep = folder / "lessons.jsonl", folder / "keep.txt"
    with lessons.open("w") as file:
        for question, answer in questions(1500, seed=0):
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    keep.write_text("\n".join(sums(300, seed=5)) + "\n")
    return lessons, keep


if __name__ == "__main__":
    for written in write_lessons(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        print(written)
