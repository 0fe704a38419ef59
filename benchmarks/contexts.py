"""Costs of long contexts by cache format: python -m benchmarks.contexts [PICTURE]

Measured on six layers of Qwen3-0.6B's shape with random weights: the bytes of the KV cache against
the formula, the peak memory while 8,192 tokens are read, and the time to prefill 2,000 tokens
against the time to restore them from disk. On the demo checkpoint: the perplexity of replies of
its curriculum by cache format. Fails if bytes are off by more than 2 %, if the peak of a quantized
cache is not below that of the plain one, if restoring is not 20 times as fast as prefill, or if a
perplexity is off by more than 0.1 %, or with values of 4 bits by 1 %.
"""

import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen3_mlx import backend  # first: the BLAS

# isort: split

import mlx.core as mx

from benchmarks.quality import DEMO, conversations
from qwen3_mlx import load
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.quantized import CACHE_FORMATS, CacheFormat
from qwen3_mlx.engine.memory import Workload, cache_bytes
from qwen3_mlx.evaluate.plots import check_picture, saved_figure
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import published_config

_LONG, _PROMPT = 8192, 2000  # tokens
_STOPS = (1024, 2048, 4096, 8192)
_CHUNK = 512
_TALKS = 1000
_LIMITS = {"8": 0.001, "k8v4": 0.01, "4": 0.01}  # of the perplexity, relative
_Sizes = dict[int, int]  # bytes by number of tokens
_REPLY = re.compile(r"(<\|im_start\|>assistant\n.*?<\|im_end\|>)", re.DOTALL)
_ROLE = 3  # tokens: <|im_start|>, assistant, a line break


def main() -> None:
    """Run all measurements, print the tables and draw the plot if one is named."""
    picture = Path(sys.argv[1]) if sys.argv[1:] else None
    if picture:
        check_picture(picture)
    facts = backend.describe()
    print(f"{facts['device']}, {facts['dtype']}, BLAS {facts['blas']}, {time.strftime('%Y-%m-%d')}")
    model = _model()
    wrong, lines = [], dict[str, tuple[_Sizes, _Sizes]]()
    print(f"\n{'cache':8}{'planned':>14}{'held':>14}{'off by':>9}{f'peak of {_LONG:,}':>18}")
    peaks = {}
    for name, form in CACHE_FORMATS.items():
        held, peaks[name] = _memory(model, form)
        planned = {
            n: cache_bytes(model.config, Workload(n, itemsize=4, cache=form)) for n in _STOPS
        }
        off = held[_LONG] / planned[_LONG] - 1
        print(
            f"{name:8}{planned[_LONG]:>14,}{held[_LONG]:>14,}{off:>+9.2%}{peaks[name]:>18,}",
            flush=True,
        )
        lines[name] = (planned, held)
        if abs(off) > 0.02:
            wrong.append(f"bytes of {name}")
        if name != "bf16" and peaks[name] >= peaks["bf16"]:
            wrong.append(f"peak of {name}")
    read, restored = _restore(model)
    faster = read / restored
    print(
        f"\n{_PROMPT:,} tokens: read in {read:.2f} s, restored from disk in {restored:.3f} s: "
        f"{faster:.0f} times as fast",
        flush=True,
    )
    if faster < 20:
        wrong.append("restoring")
    wrong += [f"perplexity of {name}" for name, off in _perplexities() if abs(off) > _LIMITS[name]]
    if picture:
        _draw(picture, lines)
    sys.exit(f"not as it should be: {', '.join(wrong)}" if wrong else 0)


def _draw(path: Path, lines: Mapping[str, tuple[_Sizes, _Sizes]]) -> None:
    """Draw planned bytes as lines and measured bytes as points."""
    with saved_figure(path, width=6) as figure:
        axes = figure.subplots()
        for name, (planned, held) in lines.items():
            (line,) = axes.plot(list(planned), [size / 1e6 for size in planned.values()])
            measured = [size / 1e6 for size in held.values()]
            axes.plot(list(held), measured, "o", color=line.get_color(), label=name)
        axes.set(xlabel="tokens of context", ylabel="MB", xticks=_STOPS, ylim=(0, None))
        axes.set_title("KV cache of six layers (float32): planned (lines), measured (points)")
        axes.grid(alpha=0.25)
        axes.legend()


def _model() -> Qwen3:
    config = published_config("0.6B") | {"num_hidden_layers": 6, "vocab_size": 1024}
    model = Qwen3(ModelConfig.from_dict(config))
    mx.eval(model.parameters())
    for layer in model.layers:
        layer.fuse()
    return model


def _memory(model: Qwen3, form: CacheFormat) -> tuple[_Sizes, int]:
    """Prefill a long prompt; return cache bytes by length, and the peak above the weights."""
    held: _Sizes = {}
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cache = model.make_cache(_LONG + 1, cache_format=form)
    for start in range(0, _LONG, _CHUNK):
        mx.eval(model(mx.arange(start, start + _CHUNK)[None] % 1024, cache, wanted=[_CHUNK - 1]))
        if (tokens := start + _CHUNK) in _STOPS:
            held[tokens] = sum(part.nbytes for layer in cache for part in layer.state)
    return held, mx.get_peak_memory() - before


def _restore(model: Qwen3) -> tuple[float, float]:
    """Return the seconds to prefill a prompt, and to restore it from disk."""
    ids = [n % 1024 for n in range(_PROMPT)]
    with tempfile.TemporaryDirectory() as folder:
        cache = model.make_cache()
        started = time.perf_counter()
        for start in range(0, _PROMPT, _CHUNK):
            part = mx.array([ids[start : start + _CHUNK]])
            mx.eval(model(part, cache, wanted=[part.size - 1]))
        read = time.perf_counter() - started
        DiskPrefixes(Path(folder), "x", limit=10**10).write(ids, cache, lambda: False)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            disk = DiskPrefixes(Path(folder), "x", limit=10**10)
            assert disk.read(ids, _PROMPT, model.make_cache()) == _PROMPT
            times.append(time.perf_counter() - started)
    return read, min(times)


def _perplexities() -> Iterator[tuple[str, float]]:
    """Print and yield the relative change of the perplexity of the demo's replies per format."""
    llm = load(DEMO)
    talks = []
    for text in conversations(_TALKS).held_out:
        ids, scored = list[int](), list[bool]()
        for piece in _REPLY.split(text):
            new = llm.tokenizer.encode(piece)
            reply = bool(_REPLY.fullmatch(piece))
            ids += new
            scored += [reply and place >= _ROLE for place in range(len(new))]
        talks.append((ids, scored))

    def losses(form: CacheFormat) -> list[float]:
        found = list[float]()
        for ids, scored in talks:

            def job(model: Qwen3, ids: list[int] = ids) -> mx.array:
                cache = model.make_cache(cache_format=form)
                logits = model(mx.array([ids]), cache)[0, :-1].astype(mx.float32)
                chosen = mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=-1)[:, 0]
                return mx.logsumexp(logits, axis=-1) - chosen

            each: list[float] = llm.compute(job).tolist()  # type: ignore[assignment]
            found += [loss for loss, wanted in zip(each, scored[1:], strict=True) if wanted]
        return found

    plain = losses(CACHE_FORMATS["bf16"])
    count = len(plain)
    print(f"\nreplies of the demo, {count:,} tokens: perplexity {math.exp(sum(plain) / count):.4f}")
    for name, form in CACHE_FORMATS.items():
        if form.key_bits:
            changes = [a - b for a, b in zip(losses(form), plain, strict=True)]
            mean = sum(changes) / count
            spread = math.sqrt(sum((change - mean) ** 2 for change in changes) / count**2)
            print(f"{name:8}{100 * math.expm1(mean):+.3f} % (standard error {100 * spread:.3f} %)")
            yield name, math.expm1(mean)
    llm.close()


if __name__ == "__main__":
    main()
