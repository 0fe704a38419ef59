"""A request to the engine, and its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from threading import Event

from qwen3_mlx.engine.hooks import Constraint, TokenSink
from qwen3_mlx.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestResult:
    """The result of a generation. `reason` is stop, length or cancelled.

    `cached_tokens` of the prompt were in the prefix cache and not computed again. `passes` are the
    forward passes in which a token was chosen; of the `proposed` draft tokens, `accepted` were.
    """

    reason: str
    completion_tokens: int
    cached_tokens: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class SampledLogprob:
    """Log probability of a sampled token, before bias, penalties, temperature and masks.

    `top` are the likeliest tokens of that position, with their log probabilities.
    """

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Scores:
    """The log probabilities of tokens, each after all tokens before it.

    Of the tokens that were needed to compute them, `cached_tokens` were in the prefix cache.
    """

    logprobs: Sequence[SampledLogprob]
    cached_tokens: int


class Phase(Enum):
    """How far a request has come; a preempted one waits again."""

    WAITING = auto()  # without caches
    PREFILL = auto()  # its prompt is computed, a chunk a step
    DECODE = auto()  # each step chooses a token of its reply
    ENDED = auto()


NORMAL, IDLE = 0, 1  # priorities, least first; idle work runs only while there is no other


@dataclass(frozen=True, slots=True)
class Request:
    """One generation: the ids to continue, how to sample, and the callbacks.

    All callbacks run on the engine's thread. `on_finish` is called once, with the result or the
    error that ended the request. `on_logprobs` receives each sampled token with its `top_logprobs`
    likeliest alternatives, before `sink` receives the token; end tokens are among them, forced ones
    are not. `on_prompt_logprobs` is called whenever a part of the prompt has been read, with the
    logprobs of its tokens; all but the first token of the prompt are reported, before the first
    token is chosen. With `score_from` only the tokens after that position are, and what stands
    before it may come from the prefix cache. `following` is one more token to score, which stands
    after the prompt and is not read. `sampling` has no None left. `progress(done, total)` receives
    the prompt tokens processed. With max_tokens=0 the prompt is only read, and kept for requests
    that begin with it. `recheck_logits()` returns whether the reply looks like that of a broken
    network, so that its logits are checked again. Waiting requests take turns by `client`.
    `adapter` is the number of the adapter to use, None for none.
    """

    ids: Sequence[int]
    sampling: SamplingParams
    max_tokens: int
    seed: int
    end_ids: frozenset[int]
    sink: TokenSink
    on_finish: Callable[[RequestResult | BaseException], None]
    progress: Callable[[int, int], None] | None = None
    constraint: Constraint | None = None
    priority: int = NORMAL
    cancelled: Event = field(default_factory=Event)
    on_logprobs: Callable[[SampledLogprob], None] | None = None
    on_prompt_logprobs: Callable[[Sequence[SampledLogprob]], None] | None = None
    top_logprobs: int = 0
    score_from: int = 0
    following: int | None = None
    recheck_logits: Callable[[], bool] | None = None
    client: str = ""
    adapter: int | None = None
