"""Stream a reply, thinking and answer apart: `python examples/stream.py "What is 12 + 34?"`.

`QWEN3_MODEL` names a checkpoint; without it the embedded demo model answers.
"""

import os
import sys

from qwen3_mlx import Finish, Reasoning, Text, load


def main() -> None:
    """Print the thinking to stderr and the answer to stdout while they are generated."""
    question = sys.argv[1] if len(sys.argv) > 1 else "What is 12 + 34?"
    with load(os.environ.get("QWEN3_MODEL")) as llm:
        for event in llm.stream(question, max_tokens=1024):
            match event:
                case Reasoning(text):
                    print(text, end="", flush=True, file=sys.stderr)
                case Text(text):
                    print(text, end="", flush=True)
                case Finish(reason, usage):
                    print(f"\n({reason}; {usage.completion_tokens} tokens)", file=sys.stderr)


if __name__ == "__main__":
    main()
