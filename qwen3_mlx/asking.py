"""What can be asked of a reply: the keywords of `stream`, `chat` and the like, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypedDict

from qwen3_mlx.engine.params import SamplingParams

Progress = Callable[[int, int], None]


class Options(TypedDict, total=False):
    """The keywords of every way to ask for a reply; all may be left out.

    `thinking` switches the thinking on or off; None is the checkpoint's default. It never takes
    more than `thinking_budget` tokens: then it is closed with Qwen's own hand-off, or with
    `thinking_budget_message`, and the answer follows. `loop_guard=False` permits circles.
    `max_tokens` bounds thinking and answer together; None is what the context has room for.
    `sampling` beats the defaults of the mode. The same `seed` gives the same reply. `stop` ends the
    answer (not the thinking) before the first of these strings. `progress(done, total)` is told the
    prompt tokens read, or for a batch the replies that have ended, from another thread.
    """

    thinking: bool | None
    thinking_budget: int | None
    thinking_budget_message: str | None
    loop_guard: bool
    max_tokens: int | None
    sampling: SamplingParams | None
    seed: int | None
    stop: str | Sequence[str] | None
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class Asked:
    """The same with defaults, and nothing in it that cannot be.

    Raises:
        TypeError, ValueError: something is.
    """

    thinking: bool | None = None
    thinking_budget: int | None = None
    thinking_budget_message: str | None = None
    loop_guard: bool = True
    max_tokens: int | None = None
    sampling: SamplingParams | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seed", "thinking_budget"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise TypeError(f"{name} must be a whole number, not {value!r}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(f"thinking_budget must be at least 0, not {self.thinking_budget}")
        if self.thinking_budget is not None and self.thinking is False:
            raise ValueError("thinking_budget is for thinking, which thinking=False switches off")
        message = self.thinking_budget_message
        if message is not None and not isinstance(message, str):
            raise TypeError(f"thinking_budget_message must be a string, not {message!r}")
        if not isinstance(self.loop_guard, bool):
            raise TypeError(f"loop_guard must be True or False, not {self.loop_guard!r}")
        if self.sampling is not None and not isinstance(self.sampling, SamplingParams):
            raise TypeError(f"sampling must be SamplingParams, not {self.sampling!r}")
        stop = self.stop_strings
        if isinstance(self.stop, Mapping) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be one or more non-empty strings, not {self.stop!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none or more."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
