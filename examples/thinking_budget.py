"""Thinking budgets: the most tokens of thinking before the answer."""

from qwen3_mlx import Finish, SamplingParams, load

QUESTION = "What is 123 + 456?"
GREEDY = SamplingParams(temperature=0)


def main() -> None:
    """Ask with several budgets, then close the thinking of a stream by hand."""
    with load() as llm:
        for budget in (0, 16, 1024):
            reply = llm.chat(QUESTION, thinking_budget=budget, sampling=GREEDY)
            closed_by = reply.details.get("thinking_closed_by", "the model")
            print(f"{budget:5}: {reply.text} ({reply.usage.reasoning_tokens} tokens, {closed_by})")
        stream = llm.stream(QUESTION, thinking=True, sampling=GREEDY)
        for number, event in enumerate(stream):
            if number == 5:
                stream.finish_thinking()
            if isinstance(event, Finish):
                print(event)


if __name__ == "__main__":
    main()
