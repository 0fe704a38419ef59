"""The context window of a checkpoint: what fits it, seen as early as it can be.

What cannot fit is refused before a template writes it and before it is encoded, for both take time
and memory as the text is long.
"""

from collections.abc import Sequence

from qwen3_mlx.api.prompts import TextProcessor, least_tokens
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.errors import ContextError, Qwen3Error
from qwen3_mlx.text.messages import Message
from qwen3_mlx.text.tokenizer import TooLong

MOST_COUNTED = 2
"""Times the window that a prompt is encoded for, to say how much too long it is."""


class Window:
    """The context window of one engine, for prompts of one checkpoint."""

    def __init__(self, words: TextProcessor, engine: Engine) -> None:
        self._words = words
        self._engine = engine

    def check(self, history: Sequence[Message], times: int = 1) -> None:
        """Check that normalised messages may fit the window so many times, before they are written.

        Raises:
            ContextError: they cannot.
        """
        most = times * self._engine.context
        if (least := least_tokens(self._words, history, most)) > most:
            raise self._too_long(f"{least:,} tokens or more")

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the ids of a prompt, or check those that it has.

        Raises:
            ValueError: an id is none of the model's.
            ContextError: there are several times as many as the window has.
            Qwen3Error: the tokenizer belongs to another checkpoint.
        """
        rows = self._engine.model.config.vocab_size
        if not isinstance(prompt, str):
            if outside := [token for token in prompt if not 0 <= token < rows]:
                raise ValueError(f"token ids are 0 to {rows - 1:,}, not {outside[0]}")
            return list(prompt)
        try:
            ids = self._words.tokenizer.encode(prompt, most=MOST_COUNTED * self._engine.context)
        except TooLong as error:
            raise self._too_long(f"{error.least:,} tokens or more") from error
        if (greatest := max(ids, default=0)) >= rows:
            raise Qwen3Error(
                f"the prompt has token {greatest} and the model knows {rows:,}: "
                "tokenizer.json belongs to another checkpoint"
            )
        return ids

    def fitting(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the ids of a prompt that leaves room for a reply, or fills the window.

        Raises what `encode` does, and what `room` does.
        """
        ids = self.encode(prompt)
        self.room(len(ids), None, 0)
        return ids

    def room(
        self, prompt_tokens: int, wish: int | None, least: int, *, shortens: bool = False
    ) -> int:
        """Return the tokens that a reply may have, at least `least`; `shortens` bounds the wish.

        Raises:
            ValueError: there is no prompt.
            ContextError: there is no room.
        """
        if prompt_tokens == 0:
            raise ValueError("the prompt is empty; give some text")
        window = self._engine.context
        if prompt_tokens + (1 if wish else least) > window:
            raise self._too_long(f"{prompt_tokens:,} tokens")
        room = window - prompt_tokens
        if wish is not None and wish > room and not shortens:
            raise ContextError(
                f"max_tokens={wish:,} does not fit: after {prompt_tokens:,} tokens of prompt the "
                f"context window of {self._described()} has room for {room:,}"
            )
        return room if wish is None else min(wish, room)

    def _too_long(self, counted: str) -> ContextError:
        return ContextError(
            f"the prompt has {counted} and the context window is {self._described()}; shorten the "
            "prompt"
        )

    def _described(self) -> str:
        """Return the size of the window, and why it is no larger."""
        engine = self._engine
        window, why = engine.context, ""
        if window < engine.model.config.context_window and window == engine.budget.context:
            why = f" (all that memory can hold: {engine.budget})"
        return f"{window:,}{why}"
