"""Tools: the model calls a Python function, described by its name, type hints and docstring."""

from qwen3_mlx import SamplingParams, load


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression

    Args:
        expression: numbers with + between them
    """
    return str(sum(int(part) for part in expression.split("+")))


def main() -> None:
    """Ask for a sum, which the model hands to the calculator, and print all messages."""
    with load() as llm:
        greedy = SamplingParams(temperature=0)
        reply = llm.run("What is 1234 + 4321?", tools=[calculator], thinking=False, sampling=greedy)
        for message in reply.messages:
            for call in message.get("tool_calls", []):
                print(f"{call['function']['name']}({call['function']['arguments']})")
            if message["content"]:
                print(f"{message['role']}: {message['content']}")


if __name__ == "__main__":
    main()
