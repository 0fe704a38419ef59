"""Text completions: raw text goes on, without a chat template."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from qwen3_mlx.asking import Options
from qwen3_mlx.server.completion import Completion, sampled, seed_of, shown
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai_wire import HARMLESS, NOT_FOR_TEXT, TextRequest
from qwen3_mlx.server.service import Prepare, Service
from qwen3_mlx.server.wire import check_unknown
from qwen3_mlx.streams import Collected
from qwen3_mlx.text.events import Event, Finish, Text, TokenLogprob

_FEW = 16  # tokens where no number is named, as OpenAI's API has it


class TextCompletion(Completion):
    """A continuation of raw text."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, service: Service, asked: TextRequest) -> None:
        super().__init__(service, asked)
        self._asked = asked
        self._prompts = _prompts(asked.prompt)
        if not self._prompts:
            raise ApiError(400, "prompt is empty; give some text", param="prompt")
        if asked.echo and asked.logprobs is not None:
            raise ApiError(400, "logprobs of a prompt (echo) are not supported", param="logprobs")
        self._offsets = [0] * len(self._prompts) * self.choices
        try:
            self.warnings += check_unknown(asked, NOT_FOR_TEXT, HARMLESS)
            self._options: Options = {
                **sampled(asked),
                "max_tokens": asked.max_tokens or _FEW,
                "logprobs": asked.logprobs,
                "loop_guard": False,
            }
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from error

    def prepares(self) -> Sequence[Prepare]:
        """Give one for each prompt and each of its `n` continuations."""
        seeds = [seed_of(self._asked.seed, number) for number in range(self.choices)]
        each: list[Options] = [{**self._options, "seed": seed} for seed in seeds]
        return [
            partial(self.service.llm.prepare_text, prompt, **options)
            for prompt in self._prompts
            for options in each
        ]

    def first(self, index: int) -> Mapping[str, Any] | None:
        """Give the prompt, if it is to be repeated."""
        return self._choice(index, self._prompt(index)) if self._asked.echo else None

    def told(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Give what an event adds to the text."""
        if isinstance(event, Text):
            return [self._choice(index, event.text, event.tokens)]
        assert isinstance(event, Finish)
        return [self._choice(index, "", finish=event)]

    def choice(self, index: int, said: Collected, finish: Finish) -> Mapping[str, Any]:
        """Give the whole text."""
        text = (self._prompt(index) if self._asked.echo else "") + said.text
        return self._choice(index, text, said.logprobs, finish)

    def _prompt(self, index: int) -> str:
        prompt = self._prompts[index // self.choices]
        return prompt if isinstance(prompt, str) else self.service.llm.tokenizer.decode(prompt)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenLogprob] = (),
        finish: Finish | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, tokens),
            "finish_reason": finish.reason if finish else None,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        texts = [shown(token.token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {shown(text): chance for text, chance in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [one for one in prompt if not isinstance(one, int)]
