"""A step between its building and its commit: what it reads, and what the device computes of it.

N rows of logits, V vocabulary.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx.engine.logprobs import LogprobBatch
from qwen3_mlx.engine.prompt_logprobs import PromptLogprobBatch
from qwen3_mlx.engine.request import SampledLogprob
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.model.qwen3 import Qwen3

if TYPE_CHECKING:
    from qwen3_mlx.engine.hooks import Mask


@dataclass(frozen=True, slots=True)
class StepPart:
    """One sequence's part of a step: it reads tokens, and samples from rows of the logits [N, V].

    It reads `num_input` tokens that the host knows, or the one that the step before is choosing,
    and the `draft` tokens after them. Of the last `num_wanted` the hidden states are needed.
    """

    sequence: SequenceState
    num_input: int
    prefill: bool  # they are a chunk of a prompt
    last_chunk: bool  # no token is left to read after them
    rows: range  # a row for the last of them and one for each draft token; or none
    num_wanted: int
    draft: Sequence[int] = ()
    masks: "Sequence[Mask | None] | None" = None  # by row, if the constraint has looked ahead
    scored: range | None = None  # the positions whose prompt logprobs are computed

    @property
    def num_tokens(self) -> int:
        """The tokens that it reads."""
        return self.num_input + len(self.draft)


@dataclass(slots=True)
class InFlightStep:
    """A step that is built, and then submitted to the device."""

    model: Qwen3
    parts: Sequence[StepPart]
    synchronous: bool  # True if it was built only after the step before it had been committed
    num_tokens: int  # tokens that the forward pass reads
    num_prefill_tokens: int  # tokens of prompts that it reads
    arrays: list[mx.array] = field(default_factory=list)  # all that must be evaluated
    middle: mx.array | None = None  # hidden states after half of the layers, if it only decodes
    tokens: mx.array | None = None  # [N], the chosen ones
    logits: mx.array | None = None  # [N, V]
    finite: mx.array | None = None  # [N], set if a request's first token is among those chosen
    logprobs: LogprobBatch | None = None
    prompt_logprobs: PromptLogprobBatch | None = None
    submitted_at: float = 0.0
    discarded: list[SequenceState] = field(default_factory=list)  # their chosen token is dropped
    sequences: list[SequenceState] = field(init=False)  # those whose caches it writes
    row_sequences: list[SequenceState] = field(init=False)  # [N], of each row of the logits

    def __post_init__(self) -> None:
        self.sequences = [part.sequence for part in self.parts]
        self.row_sequences = [part.sequence for part in self.parts for _ in part.rows]

    def submit_first_half(self, former: "InFlightStep") -> None:
        """Begin with half of the layers once `former`, which runs, is done with those.

        Does nothing if one of the two does not only decode.
        """
        if self.middle is not None and former.middle is not None:
            mx.eval(former.middle)
            mx.async_eval(self.middle)

    def submit(self) -> None:
        """Begin to compute all of it, or all that is left."""
        if self.middle is not None:
            mx.async_eval(self.middle)  # by itself, so that the next step can wait for it
        self.model.submit(self.arrays)
        self.submitted_at = time.perf_counter()

    def wait(self) -> "CompletedStep":
        """Wait until the device is done, and return what it has chosen."""
        self.model.wait(self.arrays)
        values: list[int] = []
        if self.tokens is not None:
            values = self.tokens.tolist()  # type: ignore[assignment]
        # States of caches are among the arrays: a reference kept here would have the next step copy
        # the caches, since MLX donates a buffer only if nothing else holds it.
        self.arrays, self.tokens = [], None
        logprobs = self.logprobs.read(values, self.row_sequences) if self.logprobs else {}
        scores = self.prompt_logprobs.read() if self.prompt_logprobs else {}
        return CompletedStep(self, values, logprobs, scores)


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """A step that the device has completed, with the chosen tokens and their logprobs, by row."""

    step: InFlightStep
    tokens: Sequence[int]  # [N]
    logprobs: Mapping[int, SampledLogprob]
    prompt_logprobs: Mapping[SequenceState, Sequence[SampledLogprob]]

    def chosen(self, part: StepPart) -> list[tuple[int, SampledLogprob | None]]:
        """Return the tokens of a part's rows, with their logprobs if the request wants them."""
        return [(self.tokens[row], self.logprobs.get(row)) for row in part.rows]
