"""Text completions: continues raw text, without a chat template."""

from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from qwen3_mlx.api.options import Options
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai.completion import Completion, sampling_options
from qwen3_mlx.server.openai.schema import HARMLESS, HINTS, NOT_FOR_TEXT, TextRequest, texts_of
from qwen3_mlx.server.service import ModelService
from qwen3_mlx.server.wire import check_unknown, json_bytes, token_text
from qwen3_mlx.text.events import Event, Finish, PromptTokens, Text, TokenLogprob

_DEFAULT_MAX_TOKENS = 16  # of OpenAI's API
_NO_LIMIT = -1  # max_tokens of other local servers
_MAX_ECHO_LOGPROBS = 5  # alternatives of a prompt token; OpenAI's limit for every token
_SLICE = 1000  # tokens serialised at once: json.dumps holds the GIL
_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

Logprobs = dict[str, list[Any]]


class TextCompletion(Completion[TextRequest]):
    """A continuation of raw text."""

    param = "prompt"
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, service: ModelService, body: TextRequest) -> None:
        super().__init__(service, body)
        self._prompts = texts_of(body.prompt)
        if not self._prompts:
            raise ApiError(400, "prompt is empty; give some text", param="prompt")
        self._scores_prompt = bool(body.echo) and body.logprobs is not None
        if self._scores_prompt and (body.logprobs or 0) > _MAX_ECHO_LOGPROBS:
            raise ApiError(
                400,
                f"logprobs must be at most {_MAX_ECHO_LOGPROBS} with echo, not {body.logprobs}",
                param="logprobs",
            )
        self._offsets = [_Offsets() for _ in range(body.replies)]
        self.warnings += check_unknown(body, NOT_FOR_TEXT, HARMLESS, HINTS)
        limit = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        options: Options = {
            **sampling_options(body),
            "max_tokens": None if limit in (0, _NO_LIMIT) else limit,
            "logprobs": body.logprobs,
            "loop_guard": False,
        }
        prepare = partial(
            service.llm.prepare_text,
            score_prompt=self._scores_prompt,
            prefill_only=limit == 0,
            **options,
        )
        self.prepares = [partial(prepare, prompt) for prompt in self._prompts]

    def opening_chunk(self, index: int) -> Mapping[str, Any] | None:
        """Return the prompt if `echo` is set and no `PromptTokens` event will follow."""
        if not self.body.echo or self._scores_prompt:
            return None
        return self._choice(index, self._prompt(index))

    def chunks_for(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Return the text that an event adds."""
        if isinstance(event, PromptTokens):
            echoed = self._echoed(index, event)
            return [self._choice(index, _text_of(event)) | {"logprobs": echoed}]
        if isinstance(event, Text):
            return [self._choice(index, event.text, event.tokens)]
        assert isinstance(event, Finish)
        return [self._choice(index, "", finish=event)]

    def choice(self, index: int, reply: ReplyBuilder, finish: Finish) -> Mapping[str, Any]:
        """Return the complete text."""
        if reply.prompt is None:
            text = (self._prompt(index) if self.body.echo else "") + reply.text
            return self._choice(index, text, reply.logprobs, finish)
        echoed, added = self._echoed(index, reply.prompt), self._logprobs(index, reply.logprobs)
        logprobs = {name: echoed[name] + added[name] for name in _LISTS}
        choice = self._choice(index, _text_of(reply.prompt) + reply.text, finish=finish)
        return choice | {"logprobs": logprobs}

    def serialise(self, choice: Mapping[str, Any]) -> bytes:
        """Return a choice as JSON; the logprobs of a prompt are serialised in short slices."""
        if not self._scores_prompt:
            return super().serialise(choice)
        lists = [
            json_bytes(name) + b":[" + b",".join(_slices(values)) + b"]"
            for name, values in choice["logprobs"].items()
        ]
        rest = {name: value for name, value in choice.items() if name != "logprobs"}
        return json_bytes(rest)[:-1] + b',"logprobs":{' + b",".join(lists) + b"}}"

    def _prompt(self, index: int) -> str:
        """Return the prompt of a choice as text."""
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
            "logprobs": None if self.body.logprobs is None else self._logprobs(index, tokens),
            "finish_reason": finish.reason if finish else None,
        }

    def _echoed(self, index: int, prompt: PromptTokens) -> Logprobs:
        """Return the logprobs of a prompt; those of its first token are null."""
        offset = self._offsets[index].advance(prompt.first)
        others = self._logprobs(index, prompt.others)
        first = (token_text(prompt.first), None, None, offset)
        return {name: [head, *others[name]] for name, head in zip(_LISTS, first, strict=True)}

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Logprobs:
        offsets = self._offsets[index]
        return {
            "tokens": [token_text(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top_logprobs(token) for token in tokens],
            "text_offset": [offsets.advance(token.token) for token in tokens],
        }


class _Offsets:
    """Offsets of tokens in a text, in characters."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def advance(self, token: bytes) -> int:
        """Return the offset of the next token: the number of complete characters before it."""
        offset = self._length
        self._length += len(self._decoder.decode(token))
        return offset


def _slices(values: Sequence[Any]) -> Iterator[bytes]:
    for start in range(0, len(values), _SLICE):
        yield json_bytes(values[start : start + _SLICE])[1:-1]


def _top_logprobs(token: TokenLogprob) -> dict[str, float]:
    """Return the logprobs of the likeliest tokens by text; for equal texts, the highest."""
    best: dict[str, float] = {}
    for alternative, logprob in token.top:
        best.setdefault(token_text(alternative), logprob)
    return best


def _text_of(prompt: PromptTokens) -> str:
    return token_text(b"".join((prompt.first, *(token.token for token in prompt.others))))
