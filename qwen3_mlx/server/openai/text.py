"""Text completions: raw text goes on, without a chat template."""

from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from qwen3_mlx.api.options import Options
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.server.completion import Completion, sampling_options, token_text
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai.schema import HARMLESS, HINTS, NOT_FOR_TEXT, TextRequest
from qwen3_mlx.server.service import Prepare, Service
from qwen3_mlx.server.wire import check_unknown, json_bytes
from qwen3_mlx.text.events import Event, Finish, PromptTokens, Text, TokenLogprob

_FEW = 16  # tokens where no number is named, as OpenAI's API has it
_NO_LIMIT = -1  # max_tokens of other local servers
_MOST_ECHOED = 5  # alternatives of each token of a prompt: OpenAI's limit for all tokens
_SLICE = 1000  # tokens written at once: json.dumps holds the interpreter's lock
_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

Logprobs = dict[str, list[Any]]


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
        self._scores = bool(asked.echo) and asked.logprobs is not None
        if self._scores and (asked.logprobs or 0) > _MOST_ECHOED:
            raise ApiError(
                400,
                f"logprobs must be at most {_MOST_ECHOED} with echo, not {asked.logprobs}",
                param="logprobs",
            )
        self._offsets = [_Offsets() for _ in range(len(self._prompts) * self.choices)]
        try:
            self.warnings += check_unknown(asked, NOT_FOR_TEXT, HARMLESS, HINTS)
            most = _FEW if asked.max_tokens is None else asked.max_tokens
            self._options: Options = {
                **sampling_options(asked),
                "max_tokens": None if most in (0, _NO_LIMIT) else most,
                "logprobs": asked.logprobs,
                "loop_guard": False,
            }
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from error

    def prepare_all(self) -> Sequence[Prepare]:
        """Give one for each prompt."""
        prepare = partial(
            self.service.llm.prepare_text,
            score_prompt=self._scores,
            only_read=self._asked.max_tokens == 0,
        )
        return [partial(prepare, prompt, **self._options) for prompt in self._prompts]

    def opening_chunk(self, index: int) -> Mapping[str, Any] | None:
        """Give the prompt, if it is to be repeated and its tokens do not follow."""
        if not self._asked.echo or self._scores:
            return None
        return self._choice(index, self._prompt(index))

    def chunks_for(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Give what an event adds to the text."""
        if isinstance(event, PromptTokens):
            echoed = self._echoed(index, event)
            return [self._choice(index, _text_of(event)) | {"logprobs": echoed}]
        if isinstance(event, Text):
            return [self._choice(index, event.text, event.tokens)]
        assert isinstance(event, Finish)
        return [self._choice(index, "", finish=event)]

    def choice(self, index: int, said: ReplyBuilder, finish: Finish) -> Mapping[str, Any]:
        """Give the whole text."""
        if said.prompt is None:
            text = (self._prompt(index) if self._asked.echo else "") + said.text
            return self._choice(index, text, said.logprobs, finish)
        echoed, added = self._echoed(index, said.prompt), self._logprobs(index, said.logprobs)
        logprobs = {name: echoed[name] + added[name] for name in _LISTS}
        choice = self._choice(index, _text_of(said.prompt) + said.text, finish=finish)
        return choice | {"logprobs": logprobs}

    def written(self, choice: Mapping[str, Any]) -> bytes:
        """Write a reply; one with a prompt's tokens in pieces, none of which takes long."""
        if not self._scores:
            return super().written(choice)
        lists = [
            json_bytes(name) + b":[" + b",".join(_slices(values)) + b"]"
            for name, values in choice["logprobs"].items()
        ]
        rest = {name: value for name, value in choice.items() if name != "logprobs"}
        return json_bytes(rest)[:-1] + b',"logprobs":{' + b",".join(lists) + b"}}"

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
        wanted = self._asked.logprobs is not None
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, tokens) if wanted else None,
            "finish_reason": finish.reason if finish else None,
        }

    def _echoed(self, index: int, prompt: PromptTokens) -> Logprobs:
        """Give the tokens of a prompt; the first has no log probability."""
        offset = self._offsets[index].advance(prompt.first)
        others = self._logprobs(index, prompt.others)
        first = (token_text(prompt.first), None, None, offset)
        return {name: [one, *others[name]] for name, one in zip(_LISTS, first, strict=True)}

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Logprobs:
        offsets = self._offsets[index]
        return {
            "tokens": [token_text(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_best(token) for token in tokens],
            "text_offset": [offsets.advance(token.token) for token in tokens],
        }


class _Offsets:
    """The places of tokens in a text, in characters."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def advance(self, token: bytes) -> int:
        """Give the place of the next token: behind the characters that are whole before it."""
        place = self._length
        self._length += len(self._decoder.decode(token))
        return place


def _slices(values: Sequence[Any]) -> Iterator[bytes]:
    for start in range(0, len(values), _SLICE):
        yield json_bytes(values[start : start + _SLICE])[1:-1]


def _best(token: TokenLogprob) -> dict[str, float]:
    """Give the likeliest tokens by their text; of those with the same text, the likelier."""
    best: dict[str, float] = {}
    for one, logprob in token.top:
        best.setdefault(token_text(one), logprob)
    return best


def _text_of(prompt: PromptTokens) -> str:
    return token_text(b"".join((prompt.first, *(token.token for token in prompt.others))))


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [one for one in prompt if not isinstance(one, int)]
