"""Loading a GGUF file beside the same shape in MLX's 4 bits: python -m benchmarks.gguf [FOLDER]

A random Qwen3-0.6B with the mix of Q4_K_M (Q4_K, and Q6_K for the embedding and half of attn_v and
ffn_down) and a vocabulary of the published size, and a random checkpoint in MLX's format. Each is
loaded in a process of its own, in turn: to floats, as a CPU does by itself, and as it is stored.
FOLDER keeps both.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import chain, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.checkpoint import random_checkpoint
from qwen3_mlx.checkpoint.gguf_file import TYPES
from qwen3_mlx.files import PACKED
from qwen3_mlx.model.sizes import published_config

_SIZE, _REPEATS = "0.6B", 3
_KEYS = {"seconds": "seconds", "cpu": "CPU s", "held": "held GB", "peak": "peak GB"}
_LOAD = """
import json, resource, sys, time
from qwen3_mlx import load
import mlx.core as mx
started, cpu = time.perf_counter(), time.process_time()
with load(sys.argv[1], dequantize=sys.argv[2] == "floats", context=1024) as llm:
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = mx.get_active_memory()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak / 1e6, "held": held / 1e9}))
"""


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="keep the checkpoints here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        sources = {
            "MLX, 4 bits": random_checkpoint(folder / f"random-{_SIZE}-4bit", _SIZE),
            "GGUF, Q4_K_M": random_gguf(folder / f"random-{_SIZE}-Q4_K_M.gguf"),
        }
        _run(sources["GGUF, Q4_K_M"], "stored")  # writes the folder that describes it
        for way in ("floats", "stored"):
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
            for _ in range(_REPEATS):
                for name, source in sources.items():
                    runs[name].append(_run(source, way))
            print(f"{way:16}" + "".join(f"{key:>10}" for key in _KEYS.values()))
            found = {
                name: [median(run[key] for run in each) for key in _KEYS]
                for name, each in runs.items()
            }
            for name, figures in found.items():
                print(f"{name:16}" + "".join(f"{figure:>10.2f}" for figure in figures))
            ratios = (other / mlx for mlx, other in zip(*found.values(), strict=True))
            print(f"{'ratio':16}" + "".join(f"{ratio:>9.2f}x" for ratio in ratios))


def _run(source: Path, way: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(source), way], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def random_gguf(file: Path) -> Path:
    """Write a random GGUF file unless it exists."""
    if file.is_file():
        return file
    config = published_config(_SIZE)
    tensors = _tensors(config)
    rng = np.random.default_rng(0)
    with file.open("wb") as stream:
        header = _header(config, tensors)
        stream.write(header + b"\0" * (-len(header) % 32))
        for kind, shape in tensors.values():
            stream.write(_numbers(rng, kind, shape))
    return file


def _tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor: all have whole numbers of 32 bytes."""
    hidden, inner, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    head = config["head_dim"]
    q, kv = (config[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
    found = {
        "token_embd.weight": ("Q6_K", (config["vocab_size"], hidden)),
        "output_norm.weight": ("F32", (hidden,)),
    }
    for n in range(layers):
        rich = "Q6_K" if n % 2 else "Q4_K"
        layer = {
            **dict.fromkeys(("attn_norm", "ffn_norm"), ("F32", (hidden,))),
            **dict.fromkeys(("attn_q_norm", "attn_k_norm"), ("F32", (head,))),
            "attn_q": ("Q4_K", (q, hidden)),
            "attn_k": ("Q4_K", (kv, hidden)),
            "attn_v": (rich, (kv, hidden)),
            "attn_output": ("Q4_K", (hidden, q)),
            **dict.fromkeys(("ffn_gate", "ffn_up"), ("Q4_K", (inner, hidden))),
            "ffn_down": (rich, (hidden, inner)),
        }
        found |= {f"blk.{n}.{name}.weight": tensor for name, tensor in layer.items()}
    return found


def _numbers(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> bytes:
    count = int(np.prod(shape))
    if kind == "F32":
        return rng.uniform(0.5, 1.5, count).astype(np.float32).tobytes()
    numbers, size = PACKED[kind]
    blocks = rng.integers(0, 256, (count // numbers, size), dtype=np.uint8)
    for place in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
        scales = np.full(len(blocks), 2e-4, np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.tobytes()


def _header(config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    tokens = _vocabulary(config["vocab_size"])
    family = "qwen3."
    keys: dict[str, bytes] = {
        "general.architecture": _text_value("qwen3"),
        family + "block_count": _number_value(config["num_hidden_layers"]),
        family + "context_length": _number_value(config["max_position_embeddings"]),
        family + "embedding_length": _number_value(config["hidden_size"]),
        family + "feed_forward_length": _number_value(config["intermediate_size"]),
        family + "attention.head_count": _number_value(config["num_attention_heads"]),
        family + "attention.head_count_kv": _number_value(config["num_key_value_heads"]),
        family + "attention.key_length": _number_value(config["head_dim"]),
        family + "attention.layer_norm_rms_epsilon": b"\x06\0\0\0" + np.float32(1e-6).tobytes(),
        family + "rope.freq_base": b"\x06\0\0\0" + np.float32(config["rope_theta"]).tobytes(),
        "tokenizer.ggml.model": _text_value("gpt2"),
        "tokenizer.ggml.pre": _text_value("qwen2"),
        "tokenizer.ggml.tokens": _texts_value(tokens),
        "tokenizer.ggml.token_type": _types_value(len(tokens)),
        "tokenizer.ggml.merges": _texts_value(_MERGES),
        "tokenizer.ggml.eos_token_id": _number_value(len(tokens) - 1),
    }
    written = b"GGUF" + _u32(3) + _u64(len(tensors)) + _u64(len(keys))
    written += b"".join(_text(name) + value for name, value in keys.items())
    place = 0
    for name, (kind, shape) in tensors.items():
        numbers, size = PACKED.get(kind) or (1, 4)
        written += _text(name) + _u32(len(shape)) + b"".join(map(_u64, reversed(shape)))
        written += _u32(next(number for number, known in TYPES.items() if known == kind)) + _u64(
            place
        )
        place += int(np.prod(shape)) // numbers * size
    return written


_LETTERS = [chr(number) for number in chain(range(33, 127), range(161, 173), range(174, 323))][:256]
_MERGES = [f"{one} {other}" for one, other in product(_LETTERS, _LETTERS)]


def _vocabulary(size: int) -> list[str]:
    pairs = [merge.replace(" ", "") for merge in _MERGES]
    more = (f"[PAD{number}]" for number in range(size))
    return list(dict.fromkeys([*_LETTERS, *pairs, *more]))[: size - 2] + [
        "<|endoftext|>",
        "<|im_end|>",
    ]


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _text(text: str) -> bytes:
    raw = text.encode()
    return _u64(len(raw)) + raw


def _text_value(text: str) -> bytes:
    return _u32(8) + _text(text)


def _number_value(number: int) -> bytes:
    return _u32(4) + _u32(number)


def _texts_value(texts: list[str]) -> bytes:
    return _u32(9) + _u32(8) + _u64(len(texts)) + b"".join(map(_text, texts))


def _types_value(count: int) -> bytes:
    kinds = np.full(count, 1, np.int32)
    kinds[-2:] = 3
    return _u32(9) + _u32(5) + _u64(count) + kinds.tobytes()


if __name__ == "__main__":
    main()
