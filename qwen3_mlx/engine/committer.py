"""Committing a step: the chosen tokens go to their sequences, and some replies end with them."""

import math
from collections.abc import Sequence
from weakref import WeakSet

from qwen3_mlx.engine.activity import Meter
from qwen3_mlx.engine.finite_check import FiniteCheck
from qwen3_mlx.engine.in_flight import CompletedStep, InFlightStep, StepPart
from qwen3_mlx.engine.request import SampledLogprob
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.engine.speculation.speculator import Speculator


class Committer:
    """Commits steps. An error of one sequence's callbacks or constraint ends that one only."""

    def __init__(self, finite_check: FiniteCheck, speculator: Speculator | None) -> None:
        """Create a committer, which counts the tokens in `token_meter`."""
        self.token_meter = Meter()
        self._finite_check = finite_check
        self._speculator = speculator
        self._rechecked: WeakSet[SequenceState] = WeakSet()  # a second time would find the same

    def commit(self, done: CompletedStep, in_flight: InFlightStep | None) -> None:
        """Commit the tokens of a step; `in_flight` is the next one, built on those tokens."""
        following = in_flight.sequences if in_flight else ()
        for sequence, scores in done.prompt_logprobs.items():
            self._report_prompt_logprobs(sequence, scores)
        for part in done.step.parts:
            sequence = part.sequence
            if sequence not in following:  # for those, `begin_pass` has set the count already
                sequence.end_pass()
            if sequence.ended:
                continue
            if part.rows and sequence not in done.step.discarded:
                self._commit_tokens(done, part, in_flight)
            elif not (
                sequence.request.max_tokens or sequence.num_uncomputed or sequence in following
            ):
                sequence.end("length")  # only its prompt was to be read

    def _commit_tokens(
        self, done: CompletedStep, part: StepPart, in_flight: InFlightStep | None
    ) -> None:
        """Append the chosen tokens to a sequence, and end, roll back or continue it."""
        sequence, step = part.sequence, done.step
        num_output, num_accepted = sequence.num_output, sequence.num_accepted
        assert step.logits is not None
        try:
            if sequence.failure:
                raise sequence.failure
            if step.finite is not None:
                self._finite_check.check(step.finite, part.rows.start)
            next_step_valid = sequence.commit(
                done.chosen(part), part.draft, masked=part.masks is not None
            )
            self.token_meter.add(sequence.num_output - num_output)
            if part.draft and self._speculator:
                self._speculator.observe(sequence, sequence.num_accepted - num_accepted)
            recheck = sequence.request.recheck_logits
            if recheck and sequence not in self._rechecked and recheck():
                self._rechecked.add(sequence)
                finite = self._finite_check.finite_rows(step.logits)
                self._finite_check.check(finite, part.rows.start)
        except BaseException as error:  # noqa: BLE001 - ends this request only
            sequence.end(self._finite_check.cause_of(error, step.logits, part.rows.start))
            return
        if not (next_step_valid or sequence.ended):
            _discard_in_flight(sequence, in_flight)

    def _report_prompt_logprobs(
        self, sequence: SequenceState, scores: Sequence[SampledLogprob]
    ) -> None:
        """Pass the logprobs of the prompt tokens that were read to the request's callback."""
        try:
            if not all(math.isfinite(score.logprob) for score in scores):
                raise self._finite_check.error()
            if sequence.request.on_prompt_logprobs and not sequence.ended:
                sequence.request.on_prompt_logprobs(scores)
        except BaseException as error:  # noqa: BLE001 - ends this request only
            sequence.end(error)


def _discard_in_flight(sequence: SequenceState, step: InFlightStep | None) -> None:
    """Drop what `step`, or a step yet to be built, would have of tokens that have changed."""
    if step and step.tokens is not None and sequence in step.row_sequences:
        row = step.row_sequences.index(sequence)
        # The draw of the dropped token is repeated, so a seed gives the same reply either way.
        sequence.sampler.rewind(step.tokens[row : row + 1])
        step.discarded.append(sequence)
        sequence.end_pass()
    sequence.truncate(len(sequence.ids) - 1)
