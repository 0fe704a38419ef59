"""Logprobs of the tokens of a prompt, computed in the steps that prefill it.

The head is applied to a few rows at a time, one block after the other: the logits of a whole chunk
would be larger than many a model. The softmax is over all V logits, as those of `LLM.logits` and of
transformers are, so that scores of evaluations can be compared.

R rows of a step's hidden states, D hidden, V vocabulary, n positions of one prompt, k alternatives.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qwen3_mlx.engine.request import SampledLogprob
from qwen3_mlx.engine.sampling import top_k_logits
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.model.qwen3 import Qwen3

_BLOCK = 1 << 23  # logits computed at once: 32 MiB in float32


def positions_to_score(sequence: SequenceState, length: int) -> range:
    """Return the prompt positions to score among the next `length` tokens.

    The logits of a position score the token after it.
    """
    request = sequence.request
    start = max(sequence.num_computed, sequence.num_scored)
    last = len(request.ids) - (request.following is None)
    end = min(sequence.num_computed + length, last)
    return range(start, max(start, end))


@dataclass(frozen=True, slots=True)
class PromptLogprobBatch:
    """The logprobs that a step computes for the prompts that it reads.

    `following` are, by sequence, the ids [n] after the scored positions. `computed` are their
    logprobs [n], and the logprobs and ids [n, k] of the likeliest; no entry where n is 0.
    """

    following: Mapping[SequenceState, list[int]]
    computed: Mapping[SequenceState, tuple[mx.array, mx.array, mx.array]]

    @classmethod
    def of(
        cls,
        model: Qwen3,
        hidden: mx.array | None,
        scoring: Mapping[SequenceState, tuple[range, int]],
        vocabulary: int,
    ) -> "PromptLogprobBatch":
        """Create the arrays, unevaluated, from hidden states [R, D]; None if no position is scored.

        `scoring` has, by sequence, the positions to score, and the row of the first of them.
        """
        following, computed = dict[SequenceState, list[int]](), {}
        previous: list[mx.array] = []
        for sequence, (positions, row) in scoring.items():
            ids = sequence.ids[positions.start + 1 : positions.stop + 1]
            if sequence.request.following is not None and len(ids) < len(positions):
                ids.append(sequence.request.following)
            following[sequence] = ids
            rows, blocks = max(1, _BLOCK // model.config.vocab_size), []
            for start in range(0, len(ids), rows):
                assert hidden is not None
                x = hidden[row + start : row + min(start + rows, len(ids))]
                # Without this dependency all blocks could be in memory at the same time.
                x = mx.depends([x], previous)[0] if previous else x
                alternatives = sequence.request.top_logprobs
                previous = _block(model, x, ids[start : start + rows], alternatives, vocabulary)
                blocks.append(previous)
            if blocks:
                chosen, values, best = (
                    mx.concatenate(list(arrays)) for arrays in zip(*blocks, strict=True)
                )
                computed[sequence] = (chosen, values, best)
        return cls(following, computed)

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays that must be evaluated before `read`."""
        return [array for arrays in self.computed.values() for array in arrays]

    def read(self) -> dict[SequenceState, list[SampledLogprob]]:
        """Return the logprobs by sequence, once the arrays are evaluated."""
        logprobs: dict[SequenceState, list[SampledLogprob]] = {}
        for sequence, ids in self.following.items():
            logprobs[sequence] = []
            if sequence in self.computed:
                chosen, values, best = (np.array(a).tolist() for a in self.computed[sequence])
                count = sequence.request.top_logprobs
                logprobs[sequence] = [
                    SampledLogprob(
                        token, logprob, list(zip(tokens[:count], top[:count], strict=True))
                    )
                    for token, logprob, tokens, top in zip(ids, chosen, best, values, strict=True)
                ]
        return logprobs


def _block(
    model: Qwen3, hidden: mx.array, ids: list[int], alternatives: int, vocabulary: int
) -> list[mx.array]:
    """Compute logprobs [R] of `ids` after states [R, D]; logprobs, ids [R, k] of the likeliest."""
    logits = model.head(hidden).astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, mx.array(ids)[:, None], axis=-1) - total
    values, best = top_k_logits(logits, max(1, min(alternatives, vocabulary)), vocabulary)
    return [chosen[:, 0], values - total, best]
