"""Fine-tuning beside mlx-lm's trainer: python -m benchmarks.tune [--steps N]

The same model, lessons and initial parameters, in one process: losses, trained parameters, CPU time
and peak memory of both. mlx-lm's model computes in float32 with the BLAS that this package loads,
as ours does; its step is not compiled: MLX's CPU build would call a compiler for each shape.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["MLX_DISABLE_COMPILE"] = "1"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads would add CPU time by waiting

from qwen3_mlx import backend  # noqa: I001 - first: the BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.tuner.trainer as theirs
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from qwen3_mlx import convert, load
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.tuning.batches import Batches
from qwen3_mlx.tuning.lessons import Lesson
from qwen3_mlx.tuning.settings import Settings
from qwen3_mlx.tuning.trainer import Trainer

_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@dataclass
class Run:
    """What a training gave and took; `peak` is that above the loaded model, in bytes."""

    losses: list[float]
    parameters: dict[str, mx.array]
    cpu: float
    peak: int


class _Silent:
    """A user interface in place of mlx-lm's, which prints."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: contextlib.nullcontext(lambda: None)


theirs.TrainUI = _Silent


def draw_lessons(count: int, longest: int, vocabulary: int) -> list[Lesson]:
    """Draw lessons of random tokens, of which the first eight are context."""
    draw = random.Random(0)
    return [
        Lesson([draw.randrange(vocabulary) for _ in range(draw.randint(longest // 2, longest))], 8)
        for _ in range(count)
    ]


def run_ours(
    folder: str | Path, settings: Settings, lessons: Sequence[Lesson], steps: int, quantized: bool
) -> tuple[Run, dict[str, mx.array], Sequence[str]]:
    """Train with this package; also return the initial parameters and the adapted modules."""
    with load(folder, dtype="float32", dequantize=not quantized) as llm:
        call, box = llm._worker.call, list[Trainer]()
        base = call(_memory_now)
        call(lambda: box.append(Trainer(llm.model, settings, lessons)))
        trainer = box.pop()
        first = call(trainer.parameters)
        cpu = time.process_time()
        losses = [call(trainer.advance).loss for _ in range(steps)]
        cpu = time.process_time() - cpu
        return (
            Run(losses, call(trainer.parameters), cpu, mx.get_peak_memory() - base),
            first,
            trainer.adapted,
        )


def run_theirs(
    folder: str | Path,
    settings: Settings,
    lessons: Sequence[Lesson],
    steps: int,
    first: Mapping[str, mx.array],
    adapted: Sequence[str],
) -> Run:
    """Train with mlx-lm, from the same parameters with the same batches."""
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    base = _memory_now()
    model.freeze()
    if settings.type == "full":
        for layer in model.layers:
            layer.unfreeze()
    else:
        low_rank = {"rank": settings.rank, "scale": settings.scale, "dropout": 0.0}
        linear_to_lora_layers(
            model,
            len(model.layers),
            {**low_rank, "keys": set(adapted)},
            use_dora=settings.type == "dora",
        )
        model.load_weights(list(first.items()), strict=False)
    assert set(_trainable(model)) == set(first)
    losses: list[float] = []

    class Report:
        def on_train_loss_report(self, found: dict[str, float]) -> None:
            losses.append(found["train_loss"])

        def on_val_loss_report(self, _: object) -> None: ...

    def batches(**_: object) -> Iterator[tuple[mx.array, mx.array]]:
        order = Batches(lessons, settings.batch, settings.seed)
        for step in range(steps):
            some = order.at(step)
            width = max(len(lesson.ids) for lesson in some)
            padded = [[*lesson.ids, *[0] * (width - len(lesson.ids))] for lesson in some]
            spans = [(lesson.start, len(lesson.ids) - 1) for lesson in some]
            yield mx.array(padded), mx.array(spans)

    call = type(model.layers[0]).__call__
    cpu = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        theirs.train(
            model,
            optim.Adam(learning_rate=settings.rate),
            lessons,
            None,
            theirs.TrainingArgs(
                batch_size=settings.batch,
                iters=steps,
                steps_per_report=1,
                steps_per_save=10**9,
                adapter_file=f"{scratch}/adapters.safetensors",
                grad_checkpoint=settings.checkpointing,
            ),
            iterate_batches=batches,
            training_callback=Report(),
        )
    cpu = time.process_time() - cpu
    type(model.layers[0]).__call__ = call  # mlx-lm patches the class
    return Run(losses, _trainable(model), cpu, mx.get_peak_memory() - base)


def _trainable(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def _memory_now() -> int:
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def moe_checkpoint(folder: Path) -> Path:
    """Write a random mixture of experts, with the demo's tokenizer."""
    source = Path(str(backend.__file__)).parent / "demo"
    config = json.loads((source / "config.json").read_text()) | _MOE
    mx.random.seed(0)
    model = Qwen3(ModelConfig.from_dict(config))
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), model.tensors(), metadata={"format": "mlx"}
    )
    return folder


def compare(
    folder: str | Path, settings: Settings, steps: int, quantized: bool = False
) -> tuple[Run, Run]:
    """Train with both, from the same parameters with the same batches."""
    lessons = draw_lessons(settings.batch * steps, settings.max_length, 1000)
    ours, first, adapted = run_ours(folder, settings, lessons, steps, quantized)
    return ours, run_theirs(folder, settings, lessons, steps, first, adapted)


def largest_difference(ours: Run, other: Run) -> tuple[float, float]:
    """Return the largest differences of losses and of parameters."""
    losses = max(abs(a - b) for a, b in zip(ours.losses, other.losses, strict=True))
    changed = [
        mx.abs(array - other.parameters[name]).max() for name, array in ours.parameters.items()
    ]
    return losses, max(float(change.item()) for change in changed)  # type: ignore[arg-type]


def main() -> None:
    """Print a table of the cases."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    demo = Path(str(backend.__file__)).parent / "demo"
    with tempfile.TemporaryDirectory() as scratch:
        moe, quantized = moe_checkpoint(Path(scratch) / "moe"), Path(scratch) / "4bit"
        convert("demo", quantized)
        cases: list[tuple[str, Path, dict[str, Any]]] = [
            ("lora", demo, {}),
            ("dora", demo, {"type": "dora"}),
            ("full", demo, {"type": "full", "learning_rate": 1e-5}),
            ("lora, checkpointing", demo, {"checkpointing": True}),
            ("lora, 4-bit base", quantized, {}),
            ("lora, experts", moe, {}),
        ]
        print("| | loss differs by | parameters differ by | CPU s | mlx-lm | peak MB | mlx-lm |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, folder, changes in cases:
            settings = Settings(**{"batch": 8, "max_length": 64, "learning_rate": 1e-4, **changes})
            ours, other = compare(folder, settings, steps, folder == quantized)
            loss, parameters = largest_difference(ours, other)
            print(
                f"| {name} | {loss:.1e} | {parameters:.1e} | {ours.cpu:.2f} "
                f"| {other.cpu:.2f} ({ours.cpu / other.cpu:.2f}x) | {ours.peak / 1e6:.1f} "
                f"| {other.peak / 1e6:.1f} ({ours.peak / other.peak:.2f}x) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
