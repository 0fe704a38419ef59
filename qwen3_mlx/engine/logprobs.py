"""Logprobs of the chosen tokens, for the requests that ask for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qwen3_mlx.engine.request import SampledLogprob
from qwen3_mlx.engine.sampling import top_k_logits
from qwen3_mlx.engine.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class LogprobBatch:
    """The logprobs that a step computes: for K of its rows, with the k likeliest tokens of each."""

    rows: Sequence[int]
    arrays: Sequence[mx.array]  # log probabilities [K]; ids [K, k] and their log probabilities

    @classmethod
    def of(
        cls, logits: mx.array, tokens: mx.array, choosing: Sequence[SequenceState], vocabulary: int
    ) -> "LogprobBatch":
        """Create the arrays, unevaluated, for the rows of logits [N, V] and tokens [N] that ask."""
        rows = [row for row, sequence in enumerate(choosing) if sequence.request.on_logprobs]
        logits = logits[mx.array(rows), :vocabulary].astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        top = max(choosing[row].request.top_logprobs for row in rows)
        values, ids = top_k_logits(logits, max(1, min(top, vocabulary)), vocabulary)
        chosen = mx.take_along_axis(logits, tokens[mx.array(rows)][:, None], axis=-1) - total
        return cls(rows, [chosen[:, 0], ids, values - total])

    def read(
        self, tokens: Sequence[int], choosing: Sequence[SequenceState]
    ) -> dict[int, SampledLogprob]:
        """Return the logprobs by row, once the arrays are evaluated."""
        chosen, ids, values = (np.array(array) for array in self.arrays)
        logprobs = {}
        for index, row in enumerate(self.rows):
            count = choosing[row].request.top_logprobs
            top = zip(ids[index, :count].tolist(), values[index, :count].tolist(), strict=True)
            logprobs[row] = SampledLogprob(tokens[row], float(chosen[index]), list(top))
        return logprobs
