"""The context window: checks that prompts and replies fit it, as early as possible.

Prompts that cannot fit are refused before they are rendered and encoded, since both take time and
memory in proportion to the text.
"""

from collections.abc import Sequence

from qwen3_mlx.api.text_processor import TextProcessor
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.errors import ContextError, Qwen3Error
from qwen3_mlx.text.messages import END_THINK, Message
from qwen3_mlx.text.tokenizer import Tokenizer, TooLong

MAX_COUNTED = 2
"""Context windows up to which a prompt is encoded, so that errors can state its length."""


def refuse_unknown_tokens(what: str, ids: Sequence[int], rows: int, tokenizer: Tokenizer) -> None:
    """Refuse ids beyond the embedding's rows: MLX would read other memory for them.

    Raises:
        Qwen3Error: there is one; `what` names the text.
    """
    if (largest := max(ids, default=0)) >= rows:
        text = tokenizer.decode([largest]) if largest < len(tokenizer) else ""
        token = f"{largest} ({text})" if text else str(largest)
        raise Qwen3Error(
            f"{what} has token {token} and the model knows {rows:,}; leave it out; if that "
            "happens to any text, tokenizer.json belongs to another checkpoint"
        )


class Window:
    """The context window of one engine, for prompts of one checkpoint."""

    def __init__(self, processor: TextProcessor, engine: Engine) -> None:
        self._processor = processor
        self._engine = engine

    def check(self, history: Sequence[Message], times: int = 1) -> None:
        """Check, before rendering, that normalised messages may fit `times` context windows.

        Counts what no template leaves out: one token for each message, and its content without
        surrounding white space and without the assistant's thinking.

        Raises:
            ContextError: a lower bound of their tokens is more than that.
        """
        limit, count = times * self._engine.context, len(history)
        for message in history:
            if count > limit:
                break
            text = message["content"].rpartition(END_THINK)[2].strip()
            count += self._processor.tokenizer.min_tokens(text, limit)
        if count > limit:
            raise self._too_long(f"{count:,} tokens or more")

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the token ids of a prompt; a prompt of ids is only checked.

        Raises:
            ValueError: an id is outside the model's vocabulary.
            ContextError: the prompt has more than `MAX_COUNTED` times the tokens of the window.
            Qwen3Error: the prompt has a token that the model does not know.
        """
        rows = self._engine.model.config.vocab_size
        if not isinstance(prompt, str):
            if outside := [token for token in prompt if not 0 <= token < rows]:
                raise ValueError(f"token ids are 0 to {rows - 1:,}, not {outside[0]}")
            return list(prompt)
        try:
            ids = self._processor.tokenizer.encode(prompt, MAX_COUNTED * self._engine.context)
        except TooLong as error:
            raise self._too_long(f"{error.min_tokens:,} tokens or more") from error
        refuse_unknown_tokens("the prompt", ids, rows, self._processor.tokenizer)
        return ids

    def room(
        self,
        prompt_tokens: int,
        max_tokens: int | None,
        min_room: int,
        *,
        clamp_max_tokens: bool = False,
    ) -> int:
        """Return the most tokens that a reply may have.

        Args:
            prompt_tokens: tokens of the prompt.
            max_tokens: the most that the request allows; None is all that is left of the window.
            min_room: tokens that must be left if `max_tokens` is None or 0.
            clamp_max_tokens: reduce `max_tokens` to the tokens left, instead of refusing it.

        Raises:
            ValueError: the prompt is empty.
            ContextError: the window has no room for the prompt and the reply.
        """
        if prompt_tokens == 0:
            raise ValueError("the prompt is empty; give some text")
        window = self._engine.context
        if prompt_tokens + (1 if max_tokens else min_room) > window:
            raise self._too_long(f"{prompt_tokens:,} tokens")
        room = window - prompt_tokens
        if max_tokens is not None and max_tokens > room and not clamp_max_tokens:
            raise ContextError(
                f"max_tokens={max_tokens:,} does not fit: after {prompt_tokens:,} tokens of prompt "
                f"the context window of {self._described()} has room for {room:,}"
            )
        return room if max_tokens is None else min(max_tokens, room)

    def _too_long(self, counted: str) -> ContextError:
        return ContextError(
            f"the prompt has {counted} and the context window is {self._described()}; shorten the "
            "prompt"
        )

    def _described(self) -> str:
        """Return the size of the window as text, with the reason if memory limits it."""
        engine = self._engine
        window, reason = engine.context, ""
        if window < engine.model.config.context_window and window == engine.budget.context:
            reason = f" (all that memory can hold: {engine.budget})"
        return f"{window:,}{reason}"
