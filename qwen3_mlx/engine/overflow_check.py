"""The check whether a network stays within the range of float16, which is narrower than bfloat16's.

Qwen3's feed-forward layers write a few very large numbers, about the same for every text, into the
states of the first tokens and of separators.

T tokens, D hidden.
"""

from collections.abc import Sequence

import mlx.core as mx

from qwen3_mlx.cache.attention import NoCache
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.rope import Rope

# Half of float16's greatest number: another text may reach more than this one.
_MOST = 65504 / 2


def overflows(model: Qwen3, ids: Sequence[int]) -> bool:
    """Return whether the states after some layer exceed the safe range, or are not finite.

    An infinity inside of a layer makes its output infinite or NaN. `ids` [T] are those of a text.
    """
    x, rope = model.model.embed_tokens(mx.array(list(ids))[None]), Rope(model.config).for_pass()
    peaks = []
    for layer in model.layers:
        x = layer(x, None, NoCache(), rope)  # [1, T, D]
        peaks.append(mx.abs(x).max())
        mx.eval(peaks[-1])  # or the states of all layers would be held
    return not bool((mx.stack(peaks) <= _MOST).all())  # NaN compares as false
