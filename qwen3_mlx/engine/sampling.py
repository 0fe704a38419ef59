"""Sampling: from logits to the next token, by a chain of small pure functions in float32.

V vocabulary, k candidates, N sequences: logits are [N, V].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qwen3_mlx.engine.hooks import Mask

# Logits: with Qwen's top-k of 20 neither the blocks of its vocabulary (1,895) nor the candidates
# (1,669) are more than the 2,048 numbers that Metal sorts in one kernel.
_BLOCK_SIZE = 80
_MIN_TEMPERATURE = 1e-5  # below, logits / temperature would leave the range of float32: greedy


class Sampler:
    """The sampling state of one sequence: parameters, seed, and counts of tokens for penalties.

    All tokens of the reply count for the penalties, forced ones too, as in vLLM.

    The same seed, prompt and parameters choose the same tokens in any batch: the randomness of a
    token depends only on the seed and on its position in the reply.
    """

    def __init__(
        self, params: SamplingParams, *, seed: int, vocabulary: int, prompt: Sequence[int]
    ) -> None:
        """Create the state for a reply to `prompt`.

        `vocabulary` is the number of ids in use; logits beyond are padding, which is never chosen.
        `params` has no None left.

        Raises:
            ValueError: `logit_bias` names an id that is not in the vocabulary.
        """
        self.vocabulary = vocabulary
        self.chain = Chain.of(params)
        self._params = params
        self._seed = seed
        self._position = 0  # of the next token in the reply; greedy sampling does not count it
        self._bias = _bias_vector(params.logit_bias or {}, vocabulary)
        self._counts: mx.array | None = None  # of each token in the reply, [V]
        self._in_prompt: mx.array | None = None  # [V], bool
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._counts = mx.zeros(vocabulary)
            self._in_prompt = mx.zeros(vocabulary, dtype=mx.bool_)
            self._in_prompt[mx.array(list(prompt))] = True

    @property
    def adjusts(self) -> bool:
        """True if bias or penalties change the logits of this sequence."""
        return self._bias is not None or self._counts is not None

    def adjust(self, logits: mx.array) -> mx.array:
        """Apply bias and penalties to logits [V]."""
        if self._bias is not None:
            logits = logits + mx.pad(self._bias, (0, logits.size - self.vocabulary))
        if self._counts is not None and self._in_prompt is not None:
            used = logits[: self.vocabulary]
            used = penalise(used, self._counts, self._in_prompt, self._params)
            logits = mx.concatenate([used, logits[self.vocabulary :]])
        return logits

    def next_key(self) -> tuple[int, int]:
        """Return the random key of the next token, and advance to the one after it."""
        digest = blake2b(f"{self._seed}/{self._position}".encode(), digest_size=8).digest()
        self._position += 1
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def count(self, tokens: mx.array, by: int = 1) -> None:
        """Add `by` to the counts of tokens [n] of the reply."""
        if self._counts is not None:
            self._counts = self._counts.at[tokens].add(by)

    def force(self, tokens: mx.array) -> None:
        """Count tokens [n] that come next without being sampled."""
        self._position += tokens.size
        self.count(tokens)

    def rewind(self, tokens: mx.array) -> None:
        """Remove the last tokens [n] from the counts, sampled or forced."""
        self._position -= tokens.size
        self.count(tokens, -1)


@dataclass(frozen=True, slots=True)
class Chain:
    """The steps from adjusted logits to a token; sequences with equal chains share them."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, params: SamplingParams) -> "Chain":
        """Create the chain of parameters that have no None left."""
        assert params.temperature is not None and params.top_k is not None
        assert params.top_p is not None and params.min_p is not None
        if params.temperature < _MIN_TEMPERATURE or params.top_k == 1:
            return GREEDY
        return cls(params.temperature, params.top_k, params.top_p, params.min_p)

    def __call__(self, logits: mx.array, vocabulary: int, samplers: Sequence[Sampler]) -> mx.array:
        """Sample tokens, int32 [N], from logits [N, V], one row for each of the samplers."""
        if self == GREEDY:
            return mx.argmax(logits[:, :vocabulary], axis=-1).astype(mx.int32)
        ids = None
        if self.top_k and self.top_k < vocabulary:
            logits, ids = top_k_logits(logits, self.top_k, vocabulary)
        elif self.top_p < 1:
            ids = mx.argsort(-logits[:, :vocabulary], axis=-1)
            logits = mx.take_along_axis(logits, ids, axis=-1)
        else:
            logits = logits[:, :vocabulary]
        # Neither dtype nor temperature changes the order, so both are applied to the few left.
        scaled = logits.astype(mx.float32) * (1 / self.temperature)
        if self.top_p < 1:
            scaled = apply_top_p(scaled, self.top_p)
        if self.min_p:
            scaled = apply_min_p(scaled, self.min_p)
        # Gumbel-max trick: the argmax of logits plus Gumbel noise is a sample of their softmax.
        width = scaled.shape[-1]
        noise = mx.vmap(lambda key: mx.random.gumbel((width,), key=key))
        keys = mx.array([sampler.next_key() for sampler in samplers], dtype=mx.uint32)
        index = mx.argmax(scaled + noise(keys), axis=-1, keepdims=True)
        if ids is not None:
            index = mx.take_along_axis(ids, index, axis=-1)
        return index[:, 0].astype(mx.int32)


GREEDY = Chain(0.0, 0, 1.0, 0.0)


def choose(
    logits: mx.array,
    samplers: Sequence[Sampler],
    masks: "Mapping[int, Mask] | None" = None,
    proposed: Mapping[int, int] | None = None,
) -> mx.array:
    """Sample the next token of each row, unevaluated int32 [N], from logits [N, V].

    A sequence with draft tokens has several rows: `proposed` has, by row, the draft token that
    comes before it. `masks` has, by row, the allowed ids: bit i of the packed 32-bit words is id i.
    """
    masks, proposed = masks or {}, proposed or {}
    if masks or any(sampler.adjusts for sampler in samplers):
        rows, logits = [], logits.astype(mx.float32)
        for row, sampler in enumerate(samplers):
            if row in proposed:
                sampler.count(mx.array([proposed[row]]))
            rows.append(_masked(sampler.adjust(logits[row]), masks.get(row)))
        for row, token in proposed.items():
            samplers[row].count(mx.array([token]), -1)
        logits = mx.stack(rows)
    groups: dict[Chain, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.chain, []).append(row)
    vocabulary = samplers[0].vocabulary
    if len(groups) == 1:
        tokens = samplers[0].chain(logits, vocabulary, samplers)
    else:
        chosen = [
            chain(logits[mx.array(rows)], vocabulary, [samplers[row] for row in rows])
            for chain, rows in groups.items()
        ]
        order = [row for rows in groups.values() for row in rows]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        tokens = mx.concatenate(chosen)[mx.array(inverse)]
    for row, sampler in enumerate(samplers):
        sampler.count(tokens[row : row + 1]) if sampler.adjusts else None
    return tokens


def _masked(logits: mx.array, mask: "Mask | None") -> mx.array:
    if mask is None:
        return logits
    words = mx.array(mask)
    allowed = ((words[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).flatten()[: logits.size]
    if allowed.size < logits.size:
        allowed = mx.pad(allowed, (0, logits.size - allowed.size))
    return mx.where(allowed, logits, -mx.inf)


def top_k_logits(logits: mx.array, k: int, vocabulary: int) -> tuple[mx.array, mx.array]:
    """Return the k greatest of the first `vocabulary` logits, greatest first, and their ids.

    Logits are [N, V], both results [N, k]. Sorting a whole vocabulary is slow on every device. Cut
    into blocks, its k greatest values lie in the k blocks with the greatest maxima, or behind the
    last whole block, so only those are sorted.
    """
    count, (num_blocks, rest) = logits.shape[0], divmod(vocabulary, _BLOCK_SIZE)
    if k >= num_blocks:
        ids = mx.argsort(-logits[:, :vocabulary], axis=-1)[:, :k]
        return mx.take_along_axis(logits, ids, axis=-1), ids
    blocks = logits[:, : vocabulary - rest].reshape(count, num_blocks, _BLOCK_SIZE)
    chosen = mx.argpartition(-blocks.max(axis=-1), kth=k - 1, axis=-1)[:, :k]
    ids = (chosen[:, :, None] * _BLOCK_SIZE + mx.arange(_BLOCK_SIZE, dtype=mx.uint32)).flatten(1)
    last = mx.arange(vocabulary - rest, vocabulary, dtype=mx.uint32)
    ids = mx.concatenate([ids, mx.broadcast_to(last, (count, rest))], axis=1)
    candidates = mx.take_along_axis(logits, ids, axis=-1)
    best = mx.argpartition(-candidates, kth=k - 1, axis=-1)[:, :k]
    values = mx.take_along_axis(candidates, best, axis=-1)
    order = mx.argsort(-values, axis=-1)
    best = mx.take_along_axis(best, order, axis=-1)
    return mx.take_along_axis(values, order, axis=-1), mx.take_along_axis(ids, best, axis=-1)


def apply_top_p(logits: mx.array, p: float) -> mx.array:
    """Mask all but the fewest logits whose probabilities reach p; rows are greatest first."""
    probabilities = mx.softmax(logits, axis=-1)
    preceding = mx.cumsum(probabilities, axis=-1) - probabilities
    return mx.where(preceding < p, logits, -mx.inf)


def apply_min_p(logits: mx.array, p: float) -> mx.array:
    """Mask the logits of tokens less than p times as likely as their row's likeliest."""
    return mx.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(p), logits, -mx.inf)


def penalise(
    logits: mx.array, counts: mx.array, in_prompt: mx.array, params: SamplingParams
) -> mx.array:
    """Apply the repetition, frequency and presence penalties; see `SamplingParams`."""
    in_reply = counts > 0
    if (penalty := params.repetition_penalty or 1) != 1:
        penalised = mx.where(logits > 0, logits / penalty, logits * penalty)
        logits = mx.where(in_reply | in_prompt, penalised, logits)
    logits = logits - (params.frequency_penalty or 0) * counts
    return logits - (params.presence_penalty or 0) * in_reply


def _bias_vector(bias: Mapping[int, float], vocabulary: int) -> mx.array | None:
    if not bias:
        return None
    if outside := [token for token in bias if not 0 <= token < vocabulary]:
        raise ValueError(f"logit_bias names {outside[0]}; token ids are 0 to {vocabulary - 1}")
    vector = mx.zeros(vocabulary)
    vector[mx.array(list(bias))] = mx.array(list(bias.values()), dtype=mx.float32)
    return vector
