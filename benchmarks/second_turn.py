"""Cost of a second turn: python -m benchmarks.second_turn [FOLDER]

A question, about 400 tokens of thinking, 300 of answer, then a question of about 20, in the demo's
format; on a random 4-bit checkpoint of Qwen3-0.6B's shape, or on the one in FOLDER. The table has
the tokens prefilled before the first new token, and the seconds to it. mlx-lm's count is what the
prompt cache of its server (LRUPromptCache) leaves to prefill, measured with a tiny network.
"""

import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from qwen3_mlx import backend  # first: the BLAS

# isort: split

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

from benchmarks.answers import answer
from benchmarks.checkpoint import random_checkpoint
from benchmarks.graph import peer_model
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.files import read_json
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tokenizer import Tokenizer

_DEMO = Path(str(files("qwen3_mlx") / "demo"))
_GREEDY = SamplingParams(temperature=0.0).over(NEUTRAL)
_WORDS = "First we look at what is asked, and then we work it out step by step. "


def main() -> None:
    """Measure the turn with each method and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = (
            Path(sys.argv[1]) if sys.argv[1:] else random_checkpoint(Path(scratch) / "0.6B", "0.6B")
        )
        facts = backend.describe()
        first, prefix, second, message = turns()
        print(f"{facts['device']}, BLAS {facts['blas']}, {time.strftime('%Y-%m-%d')}")
        print(f"the second prompt has {len(second)} tokens, its last message {message}\n")
        print(f"{'':32}{'tokens read':>14}{'first token, s':>16}")
        config = read_json(folder / "config.json")
        options = LoadOptions(backend.compute_dtype())
        model = load_model(config, Weights(folder), options, lambda *_: None)
        engine = Engine(model, vocabulary=model.config.vocab_size)
        for name, idle in (("qwen3-mlx, without idle work", False), ("qwen3-mlx", True)):
            read, seconds = second_turn(engine, first, prefix if idle else None, second)
            print(f"{name:32}{read:>14}{seconds:>16.3g}", flush=True)
    print(f"{'mlx-lm, its server':32}{peer_reads(first, second):>14}")


def turns() -> tuple[list[int], list[int], list[int], int]:
    """Return the ids of a first turn with its reply, of what any second prompt begins with, and of
    one second prompt; and the number of tokens of that prompt's message.
    """
    tokenizer = Tokenizer(_DEMO / "tokenizer.json")
    template = ChatTemplate((_DEMO / "chat_template.jinja").read_text(encoding="utf-8"))

    def words(count: int) -> str:
        return tokenizer.decode(tokenizer.encode(_WORDS * count)[:count]).strip()

    question, thought, said, more = (words(count) for count in (30, 400, 300, 20))
    begun = template.render([{"role": "user", "content": question}], thinking=True)
    reply = f"<think>\n{thought}\n</think>\n\n{said}<|im_end|>"
    history = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": said, "reasoning_content": thought},
    ]
    one, other, second = (
        tokenizer.encode(
            template.render([*history, {"role": "user", "content": text}], thinking=True)
        )
        for text in ("?", "\n\n!", more)
    )
    ahead = one[: common_prefix(one, other)]
    return tokenizer.encode(begun + reply), ahead, second, len(tokenizer.encode(more))


def second_turn(
    engine: Engine, first: list[int], ahead: list[int] | None, second: list[int]
) -> tuple[int, float]:
    """Prefill the first turn and what is read ahead, then run the second turn.

    Returns the tokens prefilled and the seconds to the first token.
    """
    engine.forget()
    list(engine.stream(first, max_tokens=1, sampling=_GREEDY))
    if ahead:
        engine.prefetch(ahead)
        while engine.step():
            pass
    said, end = answer(engine, second, _GREEDY, 1)
    return len(second) - end.cached_tokens, said.first


def peer_reads(first: list[int], second: list[int]) -> int:
    """Return the number of tokens that mlx-lm's server has to prefill."""
    model = peer_model(2)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[token % 256 for token in first]]), cache=cache))
    kept = LRUPromptCache()
    kept.insert_cache("model", first, cache)
    _, rest = kept.fetch_nearest_cache("model", second)
    return len(rest)


if __name__ == "__main__":
    main()
