"""Train the demo checkpoint from scratch: `python examples/train_demo.py`.

A tokenizer and a Qwen3 of under two million parameters learn the curriculum of `demo_tasks` on a
laptop's CPU in well under an hour. Nothing is downloaded. The loss covers only the assistant's
turns. The rows of a step are split among threads, each with its own replica of the model.

B rows, L tokens, T positions with a loss, D hidden, V vocabulary.
"""

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from threading import Barrier
from typing import Any

# The threads of this script use all cores; BLAS threads inside them would only compete.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from qwen3_mlx import backend  # noqa: I001 - loads a fast BLAS, so it comes before mlx

import demo_tasks
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qwen3_mlx.cache.attention import NoCache
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.template import ChatTemplate

log = logging.getLogger("train_demo")

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 1000  # with the added tokens; the embedding is padded to a multiple of 64
TOKENS_A_STEP = 2048
LONGEST = 800  # tokens; longer conversations are skipped
POOL = 768  # conversations drawn at once and sorted by length, for little padding
WARM_UP = 150  # steps
SAVE_EVERY = 180  # seconds


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the training: a learning rate that rises, falls and ends near zero.

    Each stage starts with the weights of the stage before and a new optimizer.
    """

    steps: int
    peak_rate: float
    make: Callable[[Random], demo_tasks.Conversation]
    easy_steps: int = 0  # first steps, on easy conversations


STAGES = (
    Stage(4500, 1.5e-3, demo_tasks.make_conversation, easy_steps=900),
    Stage(2600, 1e-3, demo_tasks.make_copying_conversation),
)

# Qwen3's added tokens, in their order. Those from `<tool_call>` on are text, not "special".
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
ADDED = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()
# Qwen's pre-tokenizer: contractions, words, single digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# --- tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(template: ChatTemplate, seed: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the text of the curriculum."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level: dict[str, Any] = {"add_prefix_space": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(trim_offsets=False, **byte_level),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, **byte_level)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(ADDED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(template, seed), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ADDED])
    return tokenizer


def _corpus(template: ChatTemplate, seed: int) -> Iterator[str]:
    rng = Random(f"{seed}/tokenizer")
    texts = list(demo_tasks.PARAGRAPHS) * 20
    for _ in range(6000):
        talk = demo_tasks.make_conversation(rng)
        close = talk.close if talk.cut is not None else ""
        texts.append(f"{render_prompt(template, talk)}{talk.reasoning or ''}{close}{talk.answer}")
    for text in texts:
        for token in (*SPECIAL, *ADDED):
            text = text.replace(token, "\0")
        yield from filter(None, text.split("\0"))


# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids; the loss covers those from `start` on."""

    ids: list[int]
    start: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded inputs [B, L], the flat positions [T] with a loss, and their target tokens [T]."""

    inputs: mx.array
    positions: mx.array
    targets: mx.array


def render_prompt(template: ChatTemplate, talk: demo_tasks.Conversation) -> str:
    """Render a conversation up to the assistant's turn."""
    if talk.raw:
        return ""
    return template.render(talk.messages, thinking=talk.thinking, tools=talk.tools)


def make_example(
    talk: demo_tasks.Conversation, template: ChatTemplate, tokenizer: Tokenizer, rng: Random
) -> Example:
    """Convert a conversation to token ids; tokens that the engine forces have no loss."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    if talk.raw:
        return Example(encode(talk.answer + "<|endoftext|>"), 1)
    prompt = encode(render_prompt(template, talk))
    if talk.reasoning is None:
        return Example(prompt + encode(talk.answer + "<|im_end|>"), len(prompt))
    if talk.cut is None:
        turn = f"<think>\n{talk.reasoning}\n</think>\n\n{talk.answer}<|im_end|>"
        return Example(prompt + encode(turn), len(prompt))
    thoughts = encode(f"<think>\n{talk.reasoning}\n")
    kept = thoughts[: 1 + round(talk.cut * (len(thoughts) - 1))]
    # An engine appends the ids of the hand-off; a prompt may also contain it as text.
    if rng.random() < 0.6:
        closed = kept + encode(talk.close)
    else:
        closed = encode(tokenizer.decode(kept, skip_special_tokens=False) + talk.close)
    prompt += closed
    return Example(prompt + encode(talk.answer + "<|im_end|>"), len(prompt))


def draw_steps(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    make: Callable[[Random], demo_tasks.Conversation],
    *,
    pool: Random,
    shares: int,
) -> list[list[Batch]]:
    """Create a pool of conversations and split it into steps, each into batches for the threads."""
    talks = (make(pool) for _ in range(POOL))
    drawn = (make_example(talk, template, tokenizer, pool) for talk in talks)
    examples = sorted((e for e in drawn if len(e.ids) <= LONGEST), key=lambda e: len(e.ids))
    steps: list[list[Example]] = []
    rows: list[Example] = []
    for example in examples:
        if len(rows) >= shares and (len(rows) + 1) * len(example.ids) > TOKENS_A_STEP:
            steps.append(rows)
            rows = []
        rows.append(example)
    if len(rows) >= shares:
        steps.append(rows)
    pool.shuffle(steps)
    return [[_pad(rows[share::shares]) for share in range(shares)] for rows in steps]


def _pad(rows: Sequence[Example]) -> Batch:
    length = max(len(row.ids) for row in rows) - 1
    inputs = np.zeros((len(rows), length), np.int32)
    positions: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        inputs[index, : len(row.ids) - 1] = row.ids[:-1]
        positions += range(index * length + row.start - 1, index * length + len(row.ids) - 1)
        targets += row.ids[row.start :]
    return Batch(mx.array(inputs), mx.array(positions), mx.array(targets))


# --- training -----------------------------------------------------------------------------------


def logits_of(model: Qwen3, batch: Batch) -> mx.array:
    """Compute the logits [T, V] at the positions with a loss."""
    hidden = model.model(batch.inputs, [NoCache()] * len(model.layers), None)  # [B, L, D]
    # The head runs only where there is a loss: most logits of a prompt would be discarded.
    wanted = hidden.reshape(-1, hidden.shape[-1])[batch.positions]  # [T, D]
    logits: mx.array = model.model.embed_tokens.as_linear(wanted)
    return logits


def summed_loss(model: Qwen3, batch: Batch) -> mx.array:
    """Compute the cross-entropy, summed over the positions with a loss."""
    return nn.losses.cross_entropy(logits_of(model, batch), batch.targets, reduction="sum")


class Trainer:
    """A model, its optimizer, and the threads that compute gradients."""

    def __init__(self, config: ModelConfig, shares: int) -> None:
        self.replicas = [Qwen3(config) for _ in range(shares)]
        self.model = self.replicas[0]
        self.begin_stage()
        self._threads = ThreadPoolExecutor(shares)
        mx.eval(self.model.parameters(), self.optimizer.state)

    def begin_stage(self) -> None:
        """Start a stage with a new optimizer."""
        self.optimizer = optim.AdamW(0.0, betas=[0.9, 0.98], weight_decay=0.02)
        self.optimizer.init(self.model.trainable_parameters())

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
        self.optimizer.learning_rate = mx.array(rate)
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


def learning_rate(stage: Stage, step: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine down to a fiftieth of the peak."""
    warm = min(1.0, (step + 1) / WARM_UP)
    fallen = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return stage.peak_rate * warm * (0.02 + 0.98 * fallen)


# --- probes -------------------------------------------------------------------------------------


class Probe:
    """Conversations with a known next turn, to measure the share that is reproduced exactly."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.batch = _pad(examples)
        ends = np.cumsum([len(example.ids) - example.start for example in examples])
        self._starts = np.concatenate([[0], ends[:-1]])

    def run(self, model: Qwen3) -> float:
        """Return the share of turns that greedy decoding reproduces exactly.

        One forward pass is enough: a turn is reproduced if each of its tokens is the likeliest
        after the tokens before it.
        """
        guesses = mx.argmax(logits_of(model, self.batch), axis=-1)
        right = np.array(guesses == self.batch.targets)
        return float(np.logical_and.reduceat(right, self._starts).mean())


def make_probes(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, Probe]:
    """Create the probes that show the progress of a training."""
    rng = Random("probes")
    unseen: list[tuple[int, int]] = []
    while len(unseen) < 50:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        if demo_tasks.held_out(a, b):
            unseen.append((a, b))
    tool = demo_tasks.Calculator("calculator", "Evaluate an expression", ("expression",))
    tools = (demo_tasks.describe_calculator(Random(3), tool),)

    def direct(a: int, b: int) -> demo_tasks.Conversation:
        question: demo_tasks.Message = {"role": "user", "content": f"What is {a} + {b}?"}
        return demo_tasks.Conversation((question,), demo_tasks.equation(a, b), thinking=False)

    def thinking(a: int, b: int) -> demo_tasks.Conversation:
        return replace(direct(a, b), thinking=True, reasoning=demo_tasks.sum_steps(a, b))

    def calling(a: int, b: int) -> demo_tasks.Conversation:
        call = demo_tasks.write_calls([tool.call(a, b)])
        return replace(direct(a, b), answer=call, tools=tools)

    mixed = Random("mixed")
    settings = {
        "unseen sums thinking": [thinking(a, b) for a, b in unseen],
        "direct": [direct(a, b) for a, b in unseen],
        "one digit": [direct(a, b) for a in range(10) for b in range(10)],
        "calls": [calling(a, b) for a, b in unseen],
        "lists": [_as_turn(demo_tasks.list_task(mixed)) for _ in range(50)],
        "JSON": [_as_turn(demo_tasks.json_task(mixed)) for _ in range(50)],
        "tools": [_as_turn(demo_tasks.tool_task(mixed)) for _ in range(40)],
    }
    return {
        name: Probe([make_example(talk, template, tokenizer, mixed) for talk in talks])
        for name, talks in settings.items()
    }


def _as_turn(task: demo_tasks.Task) -> demo_tasks.Conversation:
    question: demo_tasks.Message = {"role": "user", "content": task.question}
    return demo_tasks.Conversation(
        (question, *task.between), task.answer, task.thought, tools=task.tools
    )


def run_probes(probes: dict[str, Probe], model: Qwen3) -> str:
    """Run all probes and return their results as one line."""
    return ", ".join(f"{name} {probe.run(model):.0%}" for name, probe in probes.items())


# --- files --------------------------------------------------------------------------------------


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
    """Round the weights to bfloat16, in the model as well, and write them."""
    rounded = tree_map(lambda array: array.astype(mx.bfloat16), model.parameters())
    partial = output / "partial-model.safetensors"
    mx.save_safetensors(str(partial), dict(_flat(rounded)), {"format": "mlx"})
    partial.replace(output / "model.safetensors")
    model.update(tree_map(lambda array: array.astype(mx.float32), rounded))


# --- the run ------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    """Train a checkpoint from the start, or from where an earlier run stopped."""
    output: Path = options.output
    template = ChatTemplate((ROOT / "qwen3_mlx/demo/chat_template.jinja").read_text("utf-8"))
    tokenizer = train_tokenizer(template, options.seed)
    config = make_config(tokenizer)
    write_settings(output, tokenizer, config)
    if output != ROOT / "qwen3_mlx/demo":
        (output / "chat_template.jinja").write_text(template.source, "utf-8")

    mx.random.seed(options.seed)
    trainer = Trainer(ModelConfig.from_dict(config), 1 if backend.on_gpu() else options.threads)
    size = sum(array.size for _, array in _flat(trainer.model.parameters()))
    log.info("%s parameters, %s tokens", f"{size:,}", tokenizer.get_vocab_size())
    state = output / "training-state.safetensors"
    done = {"stage": 0.0, "step": 0.0, "pool": 0.0, "seconds": 0.0}
    if options.resume and state.is_file():
        done = trainer.restore(state)
        log.info("resuming at step %d of stage %d", done["step"], done["stage"] + 1)
    probes = make_probes(template, tokenizer)
    for number in range(int(done["stage"]), len(STAGES)):
        steps = _steps_from(done, template, tokenizer, options)
        _learn(options, trainer, steps, done, probes)
        write_weights(output, trainer.model)
        log.info("in bfloat16: %s", run_probes(probes, trainer.model))
        trainer.begin_stage()
        done |= {"stage": number + 1, "step": 0, "pool": 0}
        trainer.save(state, done)
    trainer.close()
    state.unlink(missing_ok=True)


def _steps_from(
    done: dict[str, float], template: ChatTemplate, tokenizer: Tokenizer, options: Any
) -> Iterator[list[Batch]]:
    stage = STAGES[int(done["stage"])]
    stages_before = "" if done["stage"] == 0 else f"{done['stage']:.0f}/"
    while True:
        pool = Random(f"{options.seed}/{stages_before}{done['pool']:.0f}")
        shares = 1 if backend.on_gpu() else options.threads
        easy = done["step"] < stage.easy_steps
        make = demo_tasks.make_easy_conversation if easy else stage.make
        yield from draw_steps(template, tokenizer, make, pool=pool, shares=shares)
        done["pool"] += 1


def _learn(
    options: argparse.Namespace,
    trainer: Trainer,
    steps: Iterator[list[Batch]],
    done: dict[str, float],
    probes: dict[str, Probe],
) -> None:
    started = time.perf_counter() - done["seconds"]
    saved = reported = time.perf_counter()
    losses: list[float] = []
    tokens = 0
    stage = STAGES[int(done["stage"])]
    for step in range(int(done["step"]), stage.steps):
        done |= {"step": step, "seconds": time.perf_counter() - started}
        batches = next(steps)
        losses.append(trainer.step(batches, learning_rate(stage, step)))
        tokens += sum(batch.inputs.size for batch in batches)
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - reported
            log.info(
                "step %d, %.1f min, loss %.4f, %.0f tokens/s",
                step + 1,
                done["seconds"] / 60,
                sum(losses) / len(losses),
                tokens / seconds,
            )
            losses, tokens, reported = [], 0, time.perf_counter()
        if (step + 1) % options.probe_every == 0:
            log.info("step %d: %s", step + 1, run_probes(probes, trainer.model))
            reported = time.perf_counter()
        if time.perf_counter() - saved > SAVE_EVERY:
            trainer.save(options.output / "training-state.safetensors", done | {"step": step + 1})
            saved = time.perf_counter()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "qwen3_mlx/demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--probe-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="resume a stopped run")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(
        options.output / "training.log", "a" if options.resume else "w", encoding="utf-8"
    )
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[logging.StreamHandler(), file]
    )
    train(options)


if __name__ == "__main__":
    main()
