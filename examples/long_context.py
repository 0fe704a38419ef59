"""Long conversations: a bounded context window, and `drop_oldest` when it is full."""

from qwen3_mlx import ContextError, SamplingParams, load


def main() -> None:
    """Fill a small context. Qwen3-4B and larger take context=131072, which switches YaRN on."""
    with load(context=160) as llm:
        greedy = SamplingParams(temperature=0)
        strict = llm.conversation(thinking=False, sampling=greedy, max_tokens=40)
        try:
            for number in range(1, 20):
                strict.chat(f"What is {number} + {number}?")
        except ContextError as error:
            print(f"after {len(strict.messages) // 2} turns: {error}")
        going_on = llm.conversation(
            messages=strict.messages, drop_oldest=True, thinking=False, sampling=greedy
        )
        reply = going_on.chat("What is 1 + 2?")
        print(f"{reply.text}; turns dropped: {reply.details.get('dropped_turns', 0)}")


if __name__ == "__main__":
    main()
