"""Train the demo checkpoint from scratch: `python examples/train_demo.py`.

A tokenizer and a Qwen3 of under two million parameters learn the curriculum of
`demo_conversations` on the CPU in one to two hours. Nothing is downloaded. The loss covers only the
assistant's turns. The rows of a step are split among threads, each with its own replica of the
model. The same command continues a run that was stopped.
"""

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from threading import Barrier
from typing import Any

# The threads of this script use all cores; BLAS threads inside them would only compete.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from qwen3_mlx import backend  # noqa: I001 - loads a fast BLAS, so it comes before mlx

import demo_conversations
import exam_demo
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from demo_examples import Batch, draw_steps
from demo_network import new_model, summed_loss
from demo_probes import Probe, make_probes, run_probes
from demo_tokenizer import train_tokenizer
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tokenizers import Tokenizer

from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.template import ChatTemplate

log = logging.getLogger("train_demo")

ROOT = Path(__file__).resolve().parent.parent
STEPS = 7700
EASY_STEPS = 7700
PEAK_RATE = 2e-3
MUON = 8.0  # times that for the matrices of the layers
WARM_UP = 150  # steps
FALL = 0.4  # of the steps, in which the learning rate falls to zero
STATE = "training-state.safetensors"
SAVE_EVERY = 120  # seconds
PROBE_EVERY = 250  # steps


def new_optimizer() -> optim.MultiOptimizer:
    """Create Muon for the matrices of the layers, and AdamW for the embedding and the norms."""
    return optim.MultiOptimizer(
        [
            optim.Muon(0.0, momentum=0.95, weight_decay=0.0),
            optim.AdamW(0.0, betas=[0.9, 0.98], weight_decay=0.02),
        ],
        [lambda name, array: array.ndim == 2 and "embed" not in name],
    )


class Trainer:
    """A model, its optimizer, and the threads that compute gradients."""

    def __init__(self, config: ModelConfig, shares: int) -> None:
        self.replicas = [new_model(config) for _ in range(shares)]
        self.model = self.replicas[0]
        self.optimizer = new_optimizer()
        self.optimizer.init(self.model.trainable_parameters())
        self._threads = ThreadPoolExecutor(shares)
        mx.eval(self.model.parameters(), self.optimizer.state)

    def step(self, batches: Sequence[Batch], rate: float) -> float:
        """Update the model with one step's batches and return the mean loss per token."""
        for replica in self.replicas[1:]:
            replica.update(self.model.parameters())
        results = list(self._threads.map(_gradients, self.replicas, batches))
        count = sum(batch.targets.size for batch in batches)
        gradients = results[0][1]
        for _, others in results[1:]:
            gradients = tree_map(mx.add, gradients, others)
        gradients = tree_map(lambda gradient: gradient / count, gradients)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        for optimizer, factor in zip(self.optimizer.optimizers, (MUON, 1.0), strict=True):
            optimizer.learning_rate = mx.array(rate * factor)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.parameters(), self.optimizer.state)
        return sum(loss for loss, _ in results) / count

    def close(self) -> None:
        """Stop the threads; in MLX each thread must clear its own streams."""
        barrier = Barrier(len(self.replicas))  # so that each thread takes one of the jobs

        def clear_streams(_: Qwen3) -> None:
            barrier.wait()
            mx.clear_streams()

        list(self._threads.map(clear_streams, self.replicas))
        self._threads.shutdown()

    def save(self, file: Path, progress: dict[str, float]) -> None:
        """Write the state of the training to a file, atomically."""
        arrays = {f"model/{name}": array for name, array in _flat(self.model.parameters())}
        arrays |= {f"optimizer/{name}": array for name, array in _flat(self.optimizer.state)}
        partial = file.with_name("partial-" + file.name)
        mx.save_safetensors(str(partial), arrays, {k: str(v) for k, v in progress.items()})
        partial.replace(file)

    def restore(self, file: Path) -> dict[str, float]:
        """Read the state that `save` wrote and return its progress."""
        loaded = mx.load(str(file), return_metadata=True)
        assert isinstance(loaded, tuple)  # return_metadata gives a tuple
        arrays, progress = loaded
        parts: dict[str, list[tuple[str, mx.array]]] = {"model": [], "optimizer": []}
        for name, array in arrays.items():
            part, _, rest = name.partition("/")
            parts[part].append((rest, array))
        self.model.load_weights(parts["model"])
        self.optimizer.state = tree_unflatten(parts["optimizer"])
        mx.eval(self.model.parameters(), self.optimizer.state)
        return {name: float(value) for name, value in progress.items() if name != "format"}


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    flat: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]
    return flat


def _gradients(model: Qwen3, batch: Batch) -> tuple[float, Any]:
    # Evaluated on the thread that built the graph: MLX's streams belong to their threads.
    loss, gradients = nn.value_and_grad(model, summed_loss)(model, batch)
    mx.eval(loss, gradients)
    return float(loss.item()), gradients


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate: a linear warm-up, the peak, and a linear fall at the end."""
    return PEAK_RATE * min((step + 1) / WARM_UP, 1.0, (steps - step) / (FALL * steps))


# --- files ----------------------------------------------------------------------------------------


def make_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the model's config.json with the keys of the published checkpoints."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 448,
        "max_position_embeddings": 8192,
        "max_window_layers": 4,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": math.ceil(tokenizer.get_vocab_size() / 64) * 64,
    }


def write_settings(output: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Write all files of the checkpoint except the weights."""
    tokenizer.save(str(output / "tokenizer.json"))
    end, text_end = config["eos_token_id"], config["bos_token_id"]
    files = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": text_end,
            "do_sample": True,
            "eos_token_id": [end, text_end],
            "pad_token_id": text_end,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": config["max_position_embeddings"],
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (output / name).write_text(text + "\n", encoding="utf-8")


def write_weights(output: Path, model: Qwen3) -> None:
    """Write the weights, rounded to bfloat16."""
    rounded = tree_map(lambda array: array.astype(mx.bfloat16), model.parameters())
    partial = output / "partial-model.safetensors"
    mx.save_safetensors(str(partial), dict(_flat(rounded)), {"format": "mlx"})
    partial.replace(output / "model.safetensors")


# --- the run ------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    """Train a checkpoint from the start, or from where an earlier run stopped, and examine it."""
    output: Path = options.output
    template = ChatTemplate((ROOT / "qwen3_mlx/demo/chat_template.jinja").read_text("utf-8"))
    if (state := output / STATE).is_file():
        tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(template, options.seed)
    config = make_config(tokenizer)
    write_settings(output, tokenizer, config)
    if output != ROOT / "qwen3_mlx/demo":
        (output / "chat_template.jinja").write_text(template.source, "utf-8")

    mx.random.seed(options.seed)
    shares = 1 if backend.on_gpu() else options.threads
    trainer = Trainer(ModelConfig.from_dict(config), shares)
    size = sum(array.size for _, array in _flat(trainer.model.parameters()))
    log.info("%s parameters, %s tokens", f"{size:,}", tokenizer.get_vocab_size())
    done = {"step": 0.0, "pool": 0.0, "seconds": 0.0, "best": 0.0}
    if state.is_file():
        done |= trainer.restore(state)
        log.info("continued at step %d", done["step"])

    def draw() -> Iterator[list[Batch]]:
        while True:
            easy = done["step"] < EASY_STEPS
            make = (
                demo_conversations.make_easy_conversation
                if easy
                else demo_conversations.make_conversation
            )
            pool = Random(f"{options.seed}/{done['pool']:.0f}")
            yield from draw_steps(template, tokenizer, make, pool=pool, shares=shares)
            done["pool"] += 1

    _learn(options, trainer, draw(), done, make_probes(template, tokenizer))
    trainer.close()
    for row in exam_demo.examine(output):
        log.info("%s", row)
    state.unlink(missing_ok=True)


def _learn(
    options: argparse.Namespace,
    trainer: Trainer,
    batches: Iterator[list[Batch]],
    done: dict[str, float],
    probes: dict[str, Probe],
) -> None:
    started = time.perf_counter() - done["seconds"]
    saved = reported = time.perf_counter()
    losses: list[float] = []
    tokens = 0
    for step in range(int(done["step"]), options.steps):
        shares = next(batches)
        losses.append(trainer.step(shares, learning_rate(step, options.steps)))
        tokens += sum(batch.inputs.size for batch in shares)
        done |= {"step": step + 1, "seconds": time.perf_counter() - started}
        if (step + 1) % 50 == 0:
            log.info(
                "step %d, %.1f min, loss %.4f, %.0f tokens/s",
                step + 1,
                done["seconds"] / 60,
                sum(losses) / len(losses),
                tokens / (time.perf_counter() - reported),
            )
            losses, tokens, reported = [], 0, time.perf_counter()
        if (step + 1) % PROBE_EVERY == 0 or step + 1 == options.steps:
            results = run_probes(probes, trainer.model)
            shown = ", ".join(f"{name} {share:.0%}" for name, share in results.items())
            mean = sum(results.values()) / len(results)
            log.info("step %d: mean %.1f%%: %s", step + 1, 100 * mean, shown)
            if mean >= done["best"]:
                done["best"] = mean
                write_weights(options.output, trainer.model)
        if time.perf_counter() - saved > SAVE_EVERY or step + 1 == options.steps:
            trainer.save(options.output / STATE, done)
            saved = time.perf_counter()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "qwen3_mlx/demo")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(options.output / "training.log", "a", encoding="utf-8")
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[logging.StreamHandler(), file]
    )
    train(options)


if __name__ == "__main__":
    main()
