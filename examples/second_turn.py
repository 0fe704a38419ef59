"""Prefix cache: the tokens prefilled, and the time to the first token, of later turns."""

import time

from qwen3_mlx import Finish, SamplingParams, load

QUESTIONS = ("What is 1234 + 4321?", "What is 56 + 65?", "Who are you?")


def main() -> None:
    """Run a conversation with and without `prefetch_next_turn`."""
    with load() as llm:
        for idle in (False, True):
            llm.forget()
            conversation = llm.conversation(
                prefetch_next_turn=idle, sampling=SamplingParams(temperature=0)
            )
            print("with idle work:" if idle else "without idle work:")
            for question in QUESTIONS:
                started = time.perf_counter()
                first = 0.0
                for event in conversation.stream(question):
                    first = first or time.perf_counter() - started
                    if isinstance(event, Finish):
                        usage = event.usage
                read = usage.prompt_tokens - usage.cached_tokens
                print(f"  {question} {conversation.messages[-1]['content']}")
                print(f"    {read} of {usage.prompt_tokens} tokens read, {1e3 * first:.0f} ms")
                time.sleep(0.3)  # the user reads; the engine is idle


if __name__ == "__main__":
    main()
