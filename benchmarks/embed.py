"""Embedding speed beside others: python -m benchmarks.embed [--peer PYTHON] [FOLDER]

64 texts of 4 to 160 tokens on a random checkpoint of Qwen3-0.6B's shape, in float32: each program
in a process of its own, in turn, after a text to warm up. mlx-lm has no embeddings; its network's
hidden states are taken, a text at a time, with the BLAS that this package loads. PYTHON is that of
an environment with sentence-transformers, which is left out otherwise. FOLDER keeps the checkpoint.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from qwen3_mlx import backend  # first: the BLAS

# isort: split

import numpy as np

from benchmarks.checkpoint import random_checkpoint
from qwen3_mlx.text.tokenizer import Tokenizer

_SIZE, _TEXTS, _REPEATS = "0.6B", 64, 3
_SHORTEST, _LONGEST = 4, 160  # tokens
_CLOSE = 1e-4  # between the vectors of both: 28 layers in float32
_OURS = """
import json, sys, time
from qwen3_mlx import load
task = json.load(sys.stdin)
llm = load(task["folder"], dtype="float32")
llm.embed(task["texts"][:1])
started, cpu = time.perf_counter(), time.process_time()
vectors = llm.embed(task["texts"])
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "vectors": vectors.tolist()}))
"""
_MLX_LM = """
import json, sys, time
from qwen3_mlx import backend  # first: the BLAS
import mlx.core as mx
import mlx_lm
task = json.load(sys.stdin)
model, tokenizer = mlx_lm.load(task["folder"])
model.set_dtype(mx.float32)
def embed(texts):
    vectors = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)  # the demo's appends no end
        last = model.model(mx.array([ids]))[0, -1]
        vectors.append((last / mx.linalg.norm(last)).tolist())
    return vectors
embed(task["texts"][:1])
started, cpu = time.perf_counter(), time.process_time()
vectors = embed(task["texts"])
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
name = f"mlx-lm {mlx_lm.__version__}, hidden states"
print(json.dumps({"seconds": seconds, "cpu": cpu, "vectors": vectors, "name": name}))
"""
_SENTENCE_TRANSFORMERS = """
import json, sys, time
import sentence_transformers, torch
task = json.load(sys.stdin)
model = sentence_transformers.SentenceTransformer(
    task["folder"], device="cpu", model_kwargs={"dtype": torch.float32}
)
model.encode(task["texts"][:1])
started, cpu = time.perf_counter(), time.process_time()
vectors = model.encode(task["texts"], show_progress_bar=False)
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
name = f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}"
print(json.dumps({"seconds": seconds, "cpu": cpu, "vectors": vectors.tolist(), "name": name}))
"""
_MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]


def main() -> None:
    """Measure all and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embed", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="keep the random checkpoint here")
    parser.add_argument("--peer", help="Python of an environment with sentence-transformers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = embedding_checkpoint((options.folder or Path(scratch)) / f"random-{_SIZE}-embed")
        tokenizer = Tokenizer(folder / "tokenizer.json")
        texts = mixed_texts(tokenizer)
        task = json.dumps({"folder": str(folder), "texts": texts})
        programs = {
            "ours": [sys.executable, "-c", _OURS],
            "mlx-lm": [sys.executable, "-c", _MLX_LM],
        }
        if options.peer:
            programs["sentence-transformers"] = [options.peer, "-c", _SENTENCE_TRANSFORMERS]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
        for _ in range(_REPEATS):
            for name, command in programs.items():
                runs[name].append(_run(command, task))
    print(table(runs, sum(len(tokenizer.encode(text)) for text in texts)))


def embedding_checkpoint(folder: Path) -> Path:
    """Write a random checkpoint in bfloat16 with the files of sentence-transformers."""
    random_checkpoint(folder, _SIZE, bits=None)
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(_MODULES)
    ]
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in {
        "modules.json": modules,
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_lasttoken": True,
            "pooling_mode_mean_tokens": False,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<|endoftext|>",
            "model_max_length": 32768,
        },
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def mixed_texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts whose lengths in tokens are spread evenly over their logarithm."""
    rng = random.Random(0)
    words = "What is 12 + 34 ? Repeat : one two three".split()
    texts = []
    for place in range(_TEXTS):
        length = round(_SHORTEST * (_LONGEST / _SHORTEST) ** (place / (_TEXTS - 1)))
        text = ""
        while len(tokenizer.encode(text)) < length:
            text += f" {rng.choice(words)}"
        texts.append(text)
    rng.shuffle(texts)
    return texts


def table(runs: dict[str, list[dict[str, Any]]], tokens: int) -> str:
    """Return the medians as a table; a ratio above 1 is in favour of this package.

    Exits if the vectors differ.
    """
    machine = backend.describe()
    seconds, cpu = (
        {name: median(run[key] for run in found) for name, found in runs.items()}
        for key in ("seconds", "cpu")
    )
    lines = [
        f"{machine['device']}, {machine['system']}, BLAS {machine['blas']}, "
        f"{time.strftime('%Y-%m-%d')}",
        f"{_TEXTS} texts, {tokens:,} tokens, float32, median of {_REPEATS}",
        "",
        f"{'':44}{'seconds':>10}{'CPU s':>10}{'tokens/s':>10}",
    ]
    for name, found in runs.items():
        figures = f"{seconds[name]:>10.1f}{cpu[name]:>10.1f}{tokens / seconds[name]:>10.1f}"
        lines.append(f"{found[0].get('name', 'qwen3-mlx'):44}{figures}")
    for name in runs.keys() - {"ours"}:
        ours, peer = (np.array(runs[side][0]["vectors"]) for side in ("ours", name))
        difference = float(np.abs(ours - peer).max())
        if difference > _CLOSE:
            sys.exit(f"the vectors of {name} differ by {difference:.2g}")
        ratios = "".join(f"{found[name] / found['ours']:>9.2f}x" for found in (seconds, cpu))
        lines.append(f"{f'{name}: its vectors differ by {difference:.0e}':44}{ratios}")
    return "\n".join(lines)


def _run(command: list[str], task: str) -> dict[str, Any]:
    done = subprocess.run(command, input=task, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
