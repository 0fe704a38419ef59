"""Accuracy of the demo's tool calls: python -m benchmarks.tools [QUESTIONS]

Sums of four digits, with a calculator offered as a Python function. The table has the replies that
call it once with the right expression, and the calls whose arguments fit its schema.
"""

import random
import sys

from qwen3_mlx import LLM, SamplingParams, load


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression

    Args:
        expression: numbers with + between them
    """
    return str(sum(int(part) for part in expression.split("+")))


def main() -> None:
    """Run all settings and print the table."""
    count = int(sys.argv[1]) if sys.argv[1:] else 100
    print(f"{'':28}{'right calls':>14}{'valid':>12}")
    with load() as llm:
        for thinking in (False, True):
            for name, sampling in (("greedy", SamplingParams(temperature=0)), ("sampled", None)):
                right, valid, made = examine(llm, count, thinking, sampling)
                label = f"{'thinking' if thinking else 'direct'}, {name}"
                print(f"{label:28}{f'{right} of {count}':>14}{f'{valid} of {made}':>12}")


def examine(
    llm: LLM, count: int, thinking: bool, sampling: SamplingParams | None
) -> tuple[int, int, int]:
    """Return the numbers of right calls, of valid calls and of all calls."""
    rng = random.Random(5)
    pairs = [(rng.randint(1000, 9999), rng.randint(1000, 9999)) for _ in range(count)]
    replies = llm.batch(
        [f"What is {a} + {b}?" for a, b in pairs],
        tools=[calculator],
        thinking=thinking,
        sampling=sampling,
        seed=1,
        max_tokens=300,
    )
    right = sum(
        [call.arguments.get("expression", "").replace(" ", "") for call in reply.tool_calls]
        == [f"{a}+{b}"]
        for reply, (a, b) in zip(replies, pairs, strict=True)
    )
    calls = [call for reply in replies for call in reply.tool_calls]
    valid = sum(
        call.name == "calculator"
        and set(call.arguments) == {"expression"}
        and isinstance(call.arguments["expression"], str)
        for call in calls
    )
    return right, valid, len(calls)


if __name__ == "__main__":
    main()
