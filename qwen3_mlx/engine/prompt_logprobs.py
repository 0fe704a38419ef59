"""How likely the tokens of a prompt are, computed in the steps that read it.

The head is applied to a few rows at a time, one block after the other: the logits of a whole chunk
would be larger than many a model. The softmax is that of all V logits, as `LLM.logits` gives them
and as transformers, whose scores evaluations are compared with, has it.

R rows of a step's hidden states, D hidden, V vocabulary, n places of one prompt, k alternatives.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qwen3_mlx.engine.request import SampledLogprob
from qwen3_mlx.engine.sampling import likeliest
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.model.qwen3 import Qwen3

_BLOCK = 1 << 23  # logits computed at once: 32 MiB in float32


@dataclass(frozen=True, slots=True)
class PromptLogprobBatch:
    """What a step computes for the prompts that it reads.

    Of each sequence: the ids [n] that follow the scored places, their log probabilities [n], and
    those and the ids [n, k] of the likeliest; nothing where no place is scored.
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
        """Lay out the scores for hidden states [R, D], which may be None where there is no place.

        Of each sequence there are the places to score, and the row of the first of them.
        """
        following, computed = dict[SequenceState, list[int]](), {}
        before: list[mx.array] = []
        for sequence, (places, row) in scoring.items():
            ids = sequence.ids[places.start + 1 : places.stop + 1]
            following[sequence] = ids
            rows, blocks = max(1, _BLOCK // model.config.vocab_size), []
            for start in range(0, len(ids), rows):
                assert hidden is not None
                x = hidden[row + start : row + min(start + rows, len(ids))]
                # Without an order all blocks could be computed, and be in memory, at once.
                x = mx.depends([x], before)[0] if before else x
                alternatives = sequence.request.top_logprobs
                before = _block(model, x, ids[start : start + rows], alternatives, vocabulary)
                blocks.append(before)
            if blocks:
                chosen, values, best = (
                    mx.concatenate(list(arrays)) for arrays in zip(*blocks, strict=True)
                )
                computed[sequence] = (chosen, values, best)
        return cls(following, computed)

    @property
    def arrays(self) -> list[mx.array]:
        """All that must be there for `read`."""
        return [array for arrays in self.computed.values() for array in arrays]

    def read(self) -> dict[SequenceState, list[SampledLogprob]]:
        """Return the scores by sequence, when they have been computed."""
        found: dict[SequenceState, list[SampledLogprob]] = {}
        for sequence, ids in self.following.items():
            found[sequence] = []
            if sequence in self.computed:
                chosen, values, best = (np.array(a).tolist() for a in self.computed[sequence])
                count = sequence.request.top_logprobs
                found[sequence] = [
                    SampledLogprob(
                        token, chance, list(zip(tokens[:count], chances[:count], strict=True))
                    )
                    for token, chance, tokens, chances in zip(
                        ids, chosen, best, values, strict=True
                    )
                ]
        return found


def _block(
    model: Qwen3, hidden: mx.array, ids: list[int], alternatives: int, vocabulary: int
) -> list[mx.array]:
    """Compute log p [R] of `ids` after states [R, D], and log p and ids [R, k] of the likeliest."""
    logits = model.head(hidden).astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, mx.array(ids)[:, None], axis=-1) - total
    values, best = likeliest(logits, max(1, min(alternatives, vocabulary)), vocabulary)
    return [chosen[:, 0], values - total, best]
