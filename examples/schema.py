"""Structured output: the answer is an object of a pydantic model."""

from pydantic import BaseModel, ConfigDict

from qwen3_mlx import load

QUESTION = "What is 12 + 34? Answer in JSON."


class Sum(BaseModel):
    """The schema of the answer; a JSON schema as a dictionary works, too."""

    model_config = ConfigDict(extra="forbid")
    answer: int


def main() -> None:
    """Generate the answer with and without thinking before the JSON."""
    with load() as llm:
        for thinking in (True, False):
            reply = llm.chat(QUESTION, schema=Sum, thinking=thinking, seed=1)
            print(repr(reply.parsed), "after", reply.usage.reasoning_tokens, "tokens of thinking")


if __name__ == "__main__":
    main()
