"""From logits to the next token: a chain of small pure functions, in float32.

V vocabulary, k candidates. One sequence at a time: logits are [V].
"""

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import mlx.core as mx

from qwen3_mlx.engine.params import SamplingParams

_ROW = 128
_COLDEST = 1e-5  # below, dividing by the temperature would leave the range of float32


class Sampler:
    """Chooses the tokens of one sequence.

    The same seed, prompt and parameters choose the same tokens: the randomness of a token depends
    on the seed and its place in the reply alone.
    """

    def __init__(
        self, params: SamplingParams, *, seed: int, vocabulary: int, prompt: Sequence[int]
    ) -> None:
        """Prepare for a reply to `prompt`.

        `vocabulary` is the number of ids in use; the rows of the logits beyond are padding, which
        is never chosen. `params` has no None left.

        Raises:
            ValueError: `logit_bias` names an id that is not in the vocabulary.
        """
        self._params = params
        self._seed = seed
        self._vocabulary = vocabulary
        self._drawn = 0
        self._bias = _bias_vector(params.logit_bias or {}, vocabulary)
        self._counts: mx.array | None = None  # of each token in the reply, [V]
        self._in_prompt: mx.array | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._counts = mx.zeros(vocabulary)
            self._in_prompt = mx.zeros(vocabulary, dtype=mx.bool_)
            self._in_prompt[mx.array(list(prompt))] = True

    def __call__(self, logits: mx.array) -> mx.array:
        """Choose a token, unevaluated int32 [1], by logits [V]."""
        logits = logits.astype(mx.float32)
        if self._bias is not None:
            logits = logits[: self._vocabulary] + self._bias
        if self._counts is not None and self._in_prompt is not None:
            known = logits[: self._vocabulary]
            logits = penalise(known, self._counts, self._in_prompt, self._params)
        token = self._choose(logits)
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1)
        self._drawn += 1
        return token

    def _choose(self, logits: mx.array) -> mx.array:
        params, vocabulary = self._params, self._vocabulary
        assert params.temperature is not None and params.top_p and params.min_p is not None
        if params.temperature < _COLDEST or params.top_k == 1:
            return mx.argmax(logits[:vocabulary], keepdims=True).astype(mx.int32)
        ids = None
        if params.top_k and params.top_k < vocabulary:
            logits, ids = likeliest(logits, params.top_k, vocabulary)
        elif params.top_p < 1:
            ids = mx.argsort(-logits[:vocabulary])
            logits = logits[ids]
        else:
            logits = logits[:vocabulary]
        # Dividing by the temperature keeps the order, so it can wait until few are left.
        scaled = logits * (1 / params.temperature)
        if params.top_p < 1:
            scaled = within_top_p(scaled, params.top_p)
        if params.min_p:
            scaled = within_min_p(scaled, params.min_p)
        key = mx.random.key(_key_number(self._seed, self._drawn))
        place = mx.random.categorical(scaled, num_samples=1, key=key)
        return (place if ids is None else ids[place]).astype(mx.int32)


def _key_number(seed: int, place: int) -> int:
    digest = blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def likeliest(logits: mx.array, k: int, vocabulary: int) -> tuple[mx.array, mx.array]:
    """Give the k greatest of the first `vocabulary` logits, greatest first, and their ids.

    Sorting a whole vocabulary is slow on every device. Cut into rows, its k greatest values lie in
    the k rows with the greatest maxima, so only those are sorted. Rows with padding in them may
    push others out, so as many more are taken.
    """
    if logits.size % _ROW:
        logits = mx.pad(logits, (0, -logits.size % _ROW))
    table = logits.reshape(-1, _ROW)
    with_padding = table.shape[0] - vocabulary // _ROW
    if k + with_padding >= table.shape[0]:
        ids = mx.argsort(-logits[:vocabulary])[:k]
        return logits[ids], ids
    most = k + with_padding
    rows = mx.argpartition(-table.max(axis=1), kth=most - 1)[:most]
    ids = (rows[:, None] * _ROW + mx.arange(_ROW, dtype=mx.uint32)).flatten()
    candidates = mx.where(ids < vocabulary, table[rows].flatten(), -mx.inf)
    best = mx.argpartition(-candidates, kth=k - 1)[:k]
    best = best[mx.argsort(-candidates[best])]
    return candidates[best], ids[best]


def within_top_p(logits: mx.array, p: float) -> mx.array:
    """Rule out all but the fewest whose probabilities reach p; logits are greatest first."""
    probabilities = mx.softmax(logits)
    before = mx.cumsum(probabilities) - probabilities
    return mx.where(before < p, logits, -mx.inf)


def within_min_p(logits: mx.array, p: float) -> mx.array:
    """Rule out those less than p times as likely as the likeliest."""
    return mx.where(logits >= logits.max() + math.log(p), logits, -mx.inf)


def penalise(
    logits: mx.array, counts: mx.array, in_prompt: mx.array, params: SamplingParams
) -> mx.array:
    """Apply the penalties for tokens seen; see `SamplingParams` for their meaning."""
    in_reply = counts > 0
    if (penalty := params.repetition_penalty or 1) != 1:
        pushed = mx.where(logits > 0, logits / penalty, logits * penalty)
        logits = mx.where(in_reply | in_prompt, pushed, logits)
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
