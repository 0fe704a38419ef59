"""Building a step: what it reads of each sequence, the forward pass, and the sampling after it.

A step is built while the step before it runs, so it may read tokens that the device has not chosen
yet. Only a draft model, which proposes tokens, makes the building wait for the device.

N rows of logits, T tokens of all sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.cache.attention import LayerCache
from qwen3_mlx.engine.best_effort import best_effort
from qwen3_mlx.engine.cache_manager import CacheManager
from qwen3_mlx.engine.finite_check import FiniteCheck
from qwen3_mlx.engine.forward import BatchSlice, forward, prefill_chunks
from qwen3_mlx.engine.in_flight import InFlightStep, StepPart
from qwen3_mlx.engine.logprobs import LogprobBatch
from qwen3_mlx.engine.memory import Budget
from qwen3_mlx.engine.prompt_logprobs import PromptLogprobBatch, positions_to_score
from qwen3_mlx.engine.request import Phase
from qwen3_mlx.engine.sampling import choose
from qwen3_mlx.engine.scheduler import ScheduledStep, Scheduler
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.model.qwen3 import Qwen3

if TYPE_CHECKING:
    from qwen3_mlx.engine.hooks import Mask


@dataclass(frozen=True, slots=True)
class _Proposal:
    """Draft tokens of a sequence, and the lookahead masks, if its constraint masks them."""

    draft: Sequence[int]
    masks: "Sequence[Mask | None] | None" = None


_NO_PROPOSAL = _Proposal(())


class StepBuilder:
    """Turns a scheduled step into arrays, unevaluated."""

    def __init__(
        self,
        model: Qwen3,
        vocabulary: int,
        scheduler: Scheduler[SequenceState],
        caches: CacheManager,
        speculator: Speculator | None,
    ) -> None:
        """Create a builder of steps of `model`, whose logits from `vocabulary` on are no tokens."""
        self._model = model
        self._vocabulary = vocabulary
        self._scheduler = scheduler
        self._caches = caches
        self._speculator = speculator
        self.finite_check = FiniteCheck(model, vocabulary)
        # After an error these are the sequences whose caches an unfinished step may have touched.
        self.building: Sequence[SequenceState] = ()

    def must_wait_for(self, step: InFlightStep | None) -> bool:
        """Return whether the next step can be built only when the tokens of `step` are known."""
        if not step:
            return False
        # With draft tokens it is open how many come next; a mask, or the next draft, begins with
        # the last token.
        if any(part.draft or (part.rows and part.sequence.needs_mask) for part in step.parts):
            return True
        if not self._speculator:
            return False
        rows = step.row_sequences
        return any(self._speculator.should_wait(sequence, len(rows)) for sequence in rows)

    def build(
        self, step: ScheduledStep[SequenceState], in_flight: InFlightStep | None, budget: Budget
    ) -> InFlightStep | None:
        """Build the forward pass of `step` and the sampling after it; None if it reads nothing."""
        parts = self._parts(step, budget)
        if not parts:
            return None
        self.building = [part.sequence for part in parts]
        ids = self._input_ids(parts, in_flight)
        for part in parts:
            part.sequence.begin_pass(
                part.num_tokens, last_chunk=part.last_chunk, scored=part.scored
            )
        built = InFlightStep(
            self._model,
            parts,
            synchronous=in_flight is None,
            num_tokens=ids.size,
            num_prefill_tokens=sum(part.num_input for part in parts if part.prefill),
        )
        with self._model.deferred():
            self._compute(built, ids)
        if built.logits is not None:
            self._sample(built, built.logits)
        return built

    # --- what the step reads --------------------------------------------------------------------

    def _parts(self, step: ScheduledStep[SequenceState], budget: Budget) -> list[StepPart]:
        """Return what the step reads of each sequence."""
        # Sequences whose last token is still on the device come first: their ids are taken from the
        # array of the step in flight, and those that the host knows follow behind it.
        reading = [(sequence, 1) for sequence in step.decoding if sequence.num_in_flight]
        on_host = [sequence for sequence in step.decoding if not sequence.num_in_flight]
        proposals: dict[SequenceState, _Proposal] = {}
        if self._speculator:
            self.building = on_host  # a draft model writes their caches
            proposals = self._propose(self._speculator, on_host, len(step.decoding))
        reading += [(s, s.num_uncomputed) for s in on_host if not s.ended]
        if step.prefilling:
            reading += self._share_prefill(step, budget)
        parts, num_rows = list[StepPart](), 0
        for sequence, num_input in reading:
            if self._speculator:
                with best_effort("indexing n-grams"):
                    sequence.index_ngrams()
            part = _part(sequence, num_input, proposals.get(sequence, _NO_PROPOSAL), num_rows)
            parts.append(part)
            num_rows += len(part.rows)
        return parts

    def _propose(
        self, speculator: Speculator, sequences: Sequence[SequenceState], num_rows: int
    ) -> dict[SequenceState, _Proposal]:
        """Return draft tokens for some sequences, with the lookahead masks of their constraints."""
        proposals: dict[SequenceState, _Proposal] = {}
        for sequence, draft in speculator.propose(sequences, num_rows).items():
            if not sequence.needs_mask:
                proposals[sequence] = _Proposal(draft)
                continue
            assert sequence.request.constraint
            try:
                masks = sequence.request.constraint.lookahead_masks(draft)
                proposals[sequence] = _Proposal(
                    draft[: len(masks) - 1], [_check_mask(mask) for mask in masks]
                )
                # The draft model's caches hold the draft tokens that the constraint has cut off.
                sequence.truncate(len(sequence.ids) - 1)
            except BaseException as error:  # noqa: BLE001 - ends this request only
                sequence.end(error)
        return proposals

    def _share_prefill(
        self, step: ScheduledStep[SequenceState], budget: Budget
    ) -> list[tuple[SequenceState, int]]:
        """Return the tokens to prefill in this step, by sequence.

        That is a chunk of the first prompt, and all of those that still fit beside it.
        """
        position = max(sequence.num_computed for sequence in step.prefilling)
        limit = budget.chunk(position, self._scheduler.room_in_use())
        limit = self._scheduler.prefill_budget(step, min(limit, backend.prefill_chunk()))
        chunks, remaining = list[tuple[SequenceState, int]](), limit
        for sequence in step.prefilling:
            fits = not chunks or sequence.num_uncomputed <= remaining
            if fits and _report_progress(sequence):
                chunk = min(remaining, prefill_chunks(sequence.num_uncomputed, limit)[0])
                chunks.append((sequence, chunk))
                remaining -= chunk
        return chunks

    def _input_ids(self, parts: Sequence[StepPart], in_flight: InFlightStep | None) -> mx.array:
        """Return a step's tokens [T] end to end: those on the device, then those on the host."""
        pieces = list[mx.array]()
        on_device = [part.sequence for part in parts if part.sequence.num_in_flight]
        if on_device:
            assert in_flight and in_flight.tokens is not None
            tokens, rows = in_flight.tokens, in_flight.row_sequences
            if on_device != rows:
                tokens = tokens[mx.array([rows.index(sequence) for sequence in on_device])]
            pieces.append(tokens)
        ids = list[int]()
        for part in parts[len(on_device) :]:
            start = part.sequence.num_computed
            ids += part.sequence.ids[start : start + part.num_input]
            ids += part.draft
        if ids:
            pieces.append(mx.array(ids, dtype=mx.int32))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    # --- what the device computes ---------------------------------------------------------------

    def _compute(self, built: InFlightStep, ids: mx.array) -> None:
        """Build the forward pass of a step over `ids` [T], unevaluated."""
        slices = [
            BatchSlice(
                part.sequence.caches.layers,
                part.num_tokens,
                part.num_wanted,
                part.sequence.request.adapter,
            )
            for part in built.parts
        ]
        batched = self._batched_layers(slices)
        scores = any(part.scored is not None for part in built.parts)
        outputs, middle = forward(self._model, ids, slices, batched, head=not scores)
        if scores:
            self._score_prompts(built, outputs)
        else:
            built.logits = outputs
        if not built.num_prefill_tokens:
            built.middle = middle
        for piece in slices:
            # The logits do not depend on these caches: without this they would stay unevaluated,
            # and each chunk would add to the graph.
            if not piece.num_wanted:
                built.arrays += [array for layer in piece.layers for array in layer.state]

    def _score_prompts(self, built: InFlightStep, hidden: mx.array | None) -> None:
        """Build the logprobs of prompts and the logits to sample from, from `hidden` states.

        Those are of the wanted positions of all parts, end to end: more than are sampled from.
        """
        positions, rows, end = dict[SequenceState, tuple[range, int]](), list[int](), 0
        for part in built.parts:
            if part.scored is not None:
                positions[part.sequence] = part.scored, end
            end += part.num_wanted
            rows += range(end - len(part.rows), end)
        built.prompt_logprobs = PromptLogprobBatch.of(
            self._model, hidden, positions, self._vocabulary
        )
        built.arrays += built.prompt_logprobs.arrays
        if hidden is not None and rows:
            built.logits = self._model.head(hidden[mx.array(rows)])

    def _batched_layers(self, slices: Sequence[BatchSlice]) -> Sequence[LayerCache] | None:
        """Return caches that hold all sequences of the step, if it only decodes; else None."""
        if all(piece.length == piece.num_wanted == 1 for piece in slices):
            room = self._scheduler.room - self._scheduler.room_in_use()
            return self._caches.batched_layers([piece.layers for piece in slices], room)
        self._caches.split_batch()
        return None

    def _sample(self, built: InFlightStep, logits: mx.array) -> None:
        """Build the sampling from logits [N, V], unevaluated."""
        rows = built.row_sequences
        drafts = dict[int, int]()  # the draft token that is read before a row
        for part in built.parts:
            drafts |= zip(part.rows[1:], part.draft, strict=True)
        masks = self._masks(built, logits)
        tokens = choose(logits, [sequence.sampler for sequence in rows], masks, drafts)
        built.tokens = tokens
        built.arrays.append(tokens)
        if any(sequence.request.on_logprobs for sequence in rows):
            built.logprobs = LogprobBatch.of(logits, tokens, rows, self._vocabulary)
            built.arrays += built.logprobs.arrays
        # The first logits of each request are checked for NaN and infinity; later ones only if the
        # reply looks like that of a broken network (`Request.recheck_logits`).
        if any(sequence.num_passes == 1 for sequence in rows):
            built.finite = self.finite_check.finite_rows(logits)
            built.arrays.append(built.finite)

    def _masks(self, built: InFlightStep, logits: mx.array) -> "dict[int, Mask]":
        """Return the masks by row; parts with lookahead masks have theirs already."""
        masks: dict[int, Mask | None] = {}
        to_mask = [p for p in built.parts if p.rows and p.masks is None and p.sequence.needs_mask]
        if to_mask and built.synchronous:
            # The device computes the logits while the host computes the masks. Not while another
            # step is in flight: its caches would be copied (see `core`).
            self._model.submit([logits])
        for part in to_mask:
            assert part.sequence.request.constraint
            try:
                masks[part.rows.start] = _check_mask(part.sequence.request.constraint.mask())
            except BaseException as error:  # noqa: BLE001 - ends this request only
                part.sequence.end(error)
        for part in built.parts:
            masks |= dict(zip(part.rows, part.masks or (), strict=False))
        return {row: mask for row, mask in masks.items() if mask is not None}


def _part(sequence: SequenceState, num_input: int, proposal: _Proposal, first_row: int) -> StepPart:
    prefill = sequence.phase is Phase.PREFILL
    last_chunk = sequence.num_in_flight == 1 or num_input == sequence.num_uncomputed
    samples = last_chunk and sequence.request.max_tokens > 0
    num_rows = 1 + len(proposal.draft) if samples else 0
    num_wanted, scored = num_rows, None
    if prefill and sequence.request.on_prompt_logprobs:
        scored = positions_to_score(sequence, num_input)
        if scored:
            num_wanted = max(num_rows, sequence.num_computed + num_input - scored.start)
    return StepPart(
        sequence,
        num_input,
        prefill=prefill,
        last_chunk=last_chunk,
        rows=range(first_row, first_row + num_rows),
        num_wanted=num_wanted,
        draft=proposal.draft,
        masks=proposal.masks,
        scored=scored,
    )


def _report_progress(sequence: SequenceState) -> bool:
    """Report how much of a prompt is computed; return False if the callback raised."""
    request = sequence.request
    try:
        if request.progress:
            request.progress(min(sequence.num_computed, len(request.ids)), len(request.ids))
    except BaseException as error:  # noqa: BLE001 - ends this request only
        sequence.end(error)
    return not sequence.ended


def _check_mask(mask: "Mask | None") -> "Mask | None":
    """Return `mask`, or raise a ValueError if it allows no token."""
    if mask is not None and not mask.any():
        raise ValueError("the constraint of this request allows no token")
    return mask
