"""What the tests of this room share."""

from qwen3_mlx.model.qwen3 import Qwen3
from tests.support import TINY, make_model

# query heads, key/value heads of the published models; all have heads of 128
HEADS = {
    "0.6B and 1.7B": (16, 8),
    "4B and 8B": (32, 8),
    "14B": (40, 8),
    "32B": (64, 8),
    "30B-A3B": (32, 4),
    "235B-A22B": (64, 4),
}


def model_with(heads: int, kv_heads: int) -> Qwen3:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128}
    return make_model({**TINY, **sizes, "num_hidden_layers": 2})
