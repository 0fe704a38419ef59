"""One generation as the engine is asked for it, and how it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event

from qwen3_mlx.engine.hooks import Constraint, TokenSink
from qwen3_mlx.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestResult:
    """How a generation ended: stop, length or cancelled.

    `cached_tokens` of the prompt were in a kept cache and not read again. It took so many forward
    `passes` in which a token was chosen; of the tokens `proposed` by speculation so many were
    `accepted`.
    """

    reason: str
    completion_tokens: int
    cached_tokens: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class SampledLogprob:
    """How likely a chosen token was, as the model alone sees it: before bias, penalties,
    temperature and masks. `top` are the likeliest in its place, with their log probabilities.
    """

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


NORMAL, IDLE = 0, 1  # priorities: least first; idle work runs while there is no other


@dataclass(frozen=True, slots=True)
class Request:
    """One generation: what to continue, how, and whom to tell.

    `done` is called once, on the engine's thread, with the outcome or the error that ended it.
    `on_logprobs` is told how likely each chosen token was, beside so many others (`top_logprobs`),
    before the watcher hears of it; end tokens are among them, forced ones are not.
    `on_prompt_logprobs` is called whenever a part of the prompt has been read, with how likely each
    of its tokens but the first was after those before it; it has had all of them before the first
    token is chosen. `sampling` has no None left. `progress(done, total)` is told the prompt tokens
    processed. With max_tokens=0 the prompt is only read, and kept for requests that begin with it.
    `recheck_logits()` says that the reply looks like that of a broken network, so that its logits
    are checked again. Requests that wait take turns by `client`.
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
    recheck_logits: Callable[[], bool] | None = None
    client: str = ""
