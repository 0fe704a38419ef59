"""asyncio: several concurrent streams, each of which can be cancelled like any task."""

import asyncio

from qwen3_mlx import LLM, Text, load


async def ask(llm: LLM, question: str) -> str:
    """Return the answer to one question."""
    answer = ""
    async for event in llm.astream(question, thinking=False, max_tokens=100):
        if isinstance(event, Text):
            answer += event.text
    return answer


async def main() -> None:
    """Ask three questions concurrently and print the answers in order."""
    questions = ["What is 1 + 2?", "Repeat: red green blue", "Who are you?"]
    with load() as llm:
        answers = await asyncio.gather(*(ask(llm, question) for question in questions))
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}\n    {answer}")


if __name__ == "__main__":
    asyncio.run(main())
