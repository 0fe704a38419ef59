"""Have the answer as an object: the reply is held to the schema of a pydantic model."""

from pydantic import BaseModel, ConfigDict

from qwen3_mlx import load

QUESTION = "What is 12 + 34? Answer in JSON."


class Sum(BaseModel):
    """What is asked for; any JSON schema as a dictionary would do."""

    model_config = ConfigDict(extra="forbid")
    answer: int


def main() -> None:
    """Ask, with and without thinking before the JSON."""
    with load() as llm:
        for thinking in (True, False):
            reply = llm.chat(QUESTION, schema=Sum, thinking=thinking, seed=1)
            print(repr(reply.parsed), "after", reply.usage.reasoning_tokens, "tokens of thinking")


if __name__ == "__main__":
    main()
