"""Memory of a training step: what it takes beside the model, computed before it begins.

    trained parameters and optimizer + activations + the larger of head and backward

- Low-rank matrices are new; Adam holds two numbers for each trained parameter. A step adds the
  gradients, as the activations are freed.
- Activations are held of each trained layer, and with checkpointing only its input. Attention is
  not fused in training: its probabilities are among them.
- The head holds the logits of a block of rows and their gradient; backward is what one layer takes
  while its gradients are computed.

The counts of arrays are those that fit peaks measured on a CPU in float32: 42 shapes of 2 to 8
layers, the largest error was 9 %; as many with checkpointing, 15 %.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen3_mlx.engine.memory import RESERVE, in_gb, modules
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.training import rows_at_once
from qwen3_mlx.tuning.batches import in_batches
from qwen3_mlx.tuning.layers import DORA, FULL, ROUTER
from qwen3_mlx.tuning.lessons import Lesson
from qwen3_mlx.tuning.settings import Settings

_FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class StepShape:
    """The largest batch: its lessons, their padded length and the tokens learned of them."""

    lessons: int
    length: int
    learned: int

    @classmethod
    def of(cls, lessons: Sequence[Lesson], batch: int) -> "StepShape":
        """Return the shape of the largest of the batches of some lessons."""
        shapes = [
            cls(len(some), len(some[-1].ids) - 1, sum(lesson.learned for lesson in some))
            for some in in_batches(lessons, batch)
        ]
        return max(shapes, key=lambda shape: shape.lessons * shape.length)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The bytes of a training step beside the model, term by term."""

    parameters: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.activations + self.working

    def __str__(self) -> str:
        terms = {
            "parameters and optimizer": self.parameters,
            "activations": self.activations,
            "head or backward": self.working,
        }
        added = " + ".join(f"{name} {in_gb(size)}" for name, size in terms.items())
        return f"{added} = {in_gb(self.total)}"


def count_trained(config: ModelConfig, settings: Settings) -> int:
    """Count the trained parameters."""
    first = max(0, config.num_hidden_layers - (settings.layers or config.num_hidden_layers))
    tuned = tuple(f"model.layers.{index}." for index in range(first, config.num_hidden_layers))
    inside = [module for module in modules(config) if module.path.startswith(tuned)]
    if settings.type == FULL:
        return sum(module.size for module in inside)
    magnitudes = 1 if settings.type == DORA else 0
    return sum(
        module.count * (settings.rank * (module.rows + module.columns) + magnitudes * module.rows)
        for module in inside
        if module.columns and not module.path.endswith(f".{ROUTER}")
    )


def step_memory(
    config: ModelConfig, settings: Settings, shapes: Sequence[StepShape], itemsize: int
) -> StepMemory:
    """Estimate the memory of a step.

    `shapes` are those of the batches of one step: of the lessons, and of what is to be kept.
    `itemsize` is the bytes of the compute dtype.
    """
    full, trained = settings.type == FULL, count_trained(config, settings)
    size = itemsize if full else _FLOAT
    # The untrained values are needed to compare with, where something is to be kept; gradients are
    # held from one batch to the next.
    copies = (1 + len(shapes) if full else 3) + (settings.accumulate > 1)
    held = copies * trained * size
    parts = [_activations(config, settings, shape, itemsize) for shape in shapes]
    activations = sum(part[0] for part in parts)
    working = max(part[1] for part in parts)
    return StepMemory(held, activations, max(working, trained * size - activations))


def _activations(
    config: ModelConfig, settings: Settings, shape: StepShape, itemsize: int
) -> tuple[int, int]:
    """Return the bytes of a batch that are held, and those of its head or of a layer's backward."""
    tokens = shape.lessons * shape.length
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    scores = config.num_attention_heads * shape.length
    width, routed = config.intermediate_size, 0
    if experts := config.experts:  # of each token some experts are computed, each on a copy
        width = experts.num_experts_per_tok * experts.moe_intermediate_size
        routed = 2 * experts.num_experts_per_tok * hidden
    layers = min(settings.layers or config.num_hidden_layers, config.num_hidden_layers)
    held = 4 * hidden + 4 * queries + 3 * keys + 5 * width + scores + routed
    backward = 6 * hidden + 5 * (queries + keys) + 4 * width + 2 * scores + routed
    if settings.type == DORA:  # the outputs before they are scaled
        held += 2 * hidden + queries + 2 * keys + 2 * width
    layer_bytes = layers * itemsize * held
    if settings.checkpointing:
        layer_bytes = layers * itemsize * hidden
        backward = 12 * hidden + 8 * (queries + keys) + 12 * width + 3 * scores + 2 * routed
    rows = rows_at_once(config.vocab_size, checkpointing=settings.checkpointing)
    logits = 2 * min(rows, shape.learned) * config.vocab_size * _FLOAT
    head = logits + 2 * tokens * hidden * itemsize
    return int(tokens * layer_bytes), int(max(head, tokens * backward * itemsize))


def check_step_fits(
    config: ModelConfig,
    settings: Settings,
    lessons: Sequence[Lesson],
    keep: Sequence[Lesson],
    itemsize: int,
    available: int,
) -> StepMemory:
    """Return the memory of a step, which must fit.

    `available` bytes are free beside the model.

    Raises:
        Qwen3Error: it does not; the message has the sum, and what would fit.
    """

    def needed(changed: Settings) -> StepMemory:
        cut = [
            [replace(lesson, ids=lesson.ids[: changed.max_length]) for lesson in some]
            for some in (lessons, keep)
        ]
        shapes = [StepShape.of(some, changed.batch) for some in cut if some]
        return step_memory(config, changed, shapes, itemsize)

    memory = needed(settings)
    if memory.total + RESERVE <= available:
        return memory
    ways = [
        next((way for way in group if needed(way[1]).total + RESERVE <= available), None)
        for group in _smaller(settings, [*lessons, *keep])
    ]
    fitting = [
        f"{way[0]} would fit ({in_gb(needed(way[1]).total + RESERVE)})" for way in ways if way
    ]
    raise Qwen3Error(
        f"a training step does not fit beside the model: {memory}, and {in_gb(RESERVE)} in "
        f"reserve; {in_gb(available)} are free; "
        + ("; ".join(fitting) or "take fewer layers, a smaller model or fewer bits")
    )


def _smaller(
    settings: Settings, lessons: Sequence[Lesson]
) -> Iterator[Iterator[tuple[str, Settings]]]:
    """Yield kinds of settings that take less memory: from each, one after another by name."""

    def halved(name: str, value: int, least: int) -> Iterator[tuple[str, Settings]]:
        while (value := value // 2) >= least:
            changed: dict[str, Any] = {name: value}
            if name == "batch":
                changed["accumulate"] = -(-settings.step_lessons // value)
            names = " with ".join(f"{key}={number}" for key, number in changed.items())
            yield names, replace(settings, **changed)

    yield iter([("checkpointing=True", replace(settings, checkpointing=True))])
    yield halved("batch", settings.batch, 1)
    longest = max(len(lesson.ids) for lesson in lessons)
    yield halved("max_length", longest, max(lesson.start for lesson in lessons) + 1)
    if settings.type != FULL:
        yield halved("rank", settings.rank, 1)
