"""How a server is to behave."""

from collections.abc import Sequence
from dataclasses import dataclass

REASONING_FIELDS = ("both", "reasoning_content", "reasoning", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is said once, at the start.

    `model` is the name that clients see. `thinking` and `thinking_budget` hold where a request says
    nothing of either. `reasoning_field` is where OpenAI's clients find the thinking. Times are in
    seconds, sizes in bytes.

    Raises:
        ValueError: a value is out of its range.
    """

    model: str
    host: str = "127.0.0.1"
    api_key: str | None = None
    allowed_hosts: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    thinking: bool | None = None
    thinking_budget: int | None = None
    reasoning_field: str = "both"
    max_requests: int = 64  # running and waiting
    max_body: int = 32 << 20
    keep_alive: float = 5.0  # between the signs of life on a stream that has nothing to say
    shutdown: float = 10.0  # for replies to be finished in
    log_content: bool = False

    def __post_init__(self) -> None:
        if self.reasoning_field not in REASONING_FIELDS:
            raise ValueError(
                f"reasoning_field must be one of {', '.join(REASONING_FIELDS)}, "
                f"not {self.reasoning_field!r}"
            )
        if self.max_requests < 1:
            raise ValueError(f"max_requests must be at least 1, not {self.max_requests}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(f"thinking_budget must be at least 0, not {self.thinking_budget}")
        if self.thinking is False and self.thinking_budget is not None:
            raise ValueError("thinking_budget is for thinking, which thinking=False switches off")
        if self.api_key is not None and not self.api_key.isascii():
            raise ValueError("api_key must be plain ASCII: it travels in a header")
