"""The training: one step at a time, with Adam, on the thread that owns the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.training import LossOf, Objective, divergence, mean_loss, rows_at_once
from qwen3_mlx.tuning.batches import Batch, Batches, in_batches
from qwen3_mlx.tuning.layers import FULL, attach, base_model, trained_parameters
from qwen3_mlx.tuning.lessons import Lesson
from qwen3_mlx.tuning.loss import cross_entropy, learned_states
from qwen3_mlx.tuning.settings import Settings


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The losses of a step, in nats a token: of the lessons, and on what is to be kept."""

    loss: float
    kept_kl: float | None
    tokens: int


class Trainer:
    """A model in training; created and called on the worker thread.

    Attributes:
        step: how many steps are done.
        adapted: the names of the adapted modules within a layer.
    """

    def __init__(
        self,
        model: Qwen3,
        settings: Settings,
        lessons: Sequence[Lesson],
        keep: Sequence[Lesson] = (),
    ) -> None:
        """Prepare a model: it is changed for good.

        Raises:
            Qwen3Error: the type cannot train this model.
        """
        self.step = 0
        self._model, self._settings = model, settings
        self._layers = min(settings.layers or len(model.layers), len(model.layers))
        self.adapted = attach(
            model,
            settings.type,
            rank=settings.rank,
            scale=settings.scale,
            layers=self._layers,
            seed=settings.seed,
        )
        self._batches = Batches(lessons, settings.step_lessons, settings.seed)
        self._keep = Batches(keep, settings.step_lessons, settings.seed) if keep else None
        self._untrained = {}
        if keep and settings.type == FULL:
            self._untrained = trained_parameters(model)
        self._rows = rows_at_once(model.config.vocab_size, checkpointing=settings.checkpointing)
        self._optimizer = optim.Adam(learning_rate=settings.rate)
        self._optimizer.init(model.trainable_parameters())
        self._gradients = nn.value_and_grad(model, self._loss)
        mx.eval(self._optimizer.state)

    def advance(self) -> StepLoss:
        """Train with the next batches and return their mean loss.

        Raises:
            Qwen3Error: the loss is not finite; the parameters are those of the step before.
        """
        lessons = self._batches.at(self.step)
        keep = self._keep.at(self.step) if self._keep else []
        size, losses = self._settings.batch, [0.0, 0.0]
        gradients: Any = None
        counts = [sum(lesson.learned for lesson in some) for some in (lessons, keep)]
        for pair in zip_longest(in_batches(lessons, size), in_batches(keep, size)):
            batches = [Batch.of(some) if some else None for some in pair]
            states = self._base_states(batches[1]) if batches[1] else None
            (_, parts), more = self._gradients(*batches, states, counts)
            for part in filter(None, parts):
                for stage in part.stages:
                    mx.eval(stage)
            losses = [
                loss + (_number(part.loss) if part else 0)
                for loss, part in zip(losses, parts, strict=True)
            ]
            del parts
            if gradients is not None:
                more = tree_map(mx.add, gradients, more)
            gradients = more
            if size < len(lessons):
                mx.eval(gradients)
        check_finite(f"step {self.step + 1}", sum(losses))
        self._optimizer.update(self._model, gradients)
        del gradients, more
        mx.eval(self._model.trainable_parameters(), self._optimizer.state)
        self.step += 1
        return StepLoss(losses[0], losses[1] if keep else None, counts[0])

    def _loss(
        self,
        batch: Batch | None,
        kept: Batch | None,
        states: mx.array | None,
        counts: Sequence[int],
    ) -> tuple[mx.array, list[Objective | None]]:
        """Return the sum to differentiate and its parts, of one batch or of two.

        `counts` are the learned tokens of all batches of the step, and those of what is kept.
        """
        total, parts = mx.array(0.0), list[Objective | None]([None, None])
        if batch:
            learned = self._objective(batch, cross_entropy(self._model, batch), counts[0])
            total, parts[0] = learned.proxy, learned
        if kept and states is not None:
            moved = self._objective(kept, self._divergence(states), counts[1])
            total, parts[1] = total + self._settings.keep_weight * moved.proxy, moved
        return total, parts

    def _objective(self, batch: Batch, loss_of: LossOf, count: int) -> Objective:
        checkpointing = self._settings.checkpointing
        states = learned_states(self._model, batch, checkpointing=checkpointing)
        return Objective.of(loss_of, states, self._rows, count)

    def _base_states(self, batch: Batch) -> mx.array:
        with base_model(self._model, self._untrained):
            states = learned_states(self._model, batch)
            mx.eval(states)
        return states

    def _divergence(self, base_states: mx.array) -> LossOf:
        head = self._model.head  # which is not trained, so it is the base model's, too
        return divergence(head, head, base_states)

    def mean_loss(self, lessons: Sequence[Lesson]) -> float:
        """Return the mean cross entropy of all learned tokens of some lessons, in nats."""
        return self._mean(lessons, lambda batch: cross_entropy(self._model, batch))

    def mean_divergence(self, lessons: Sequence[Lesson]) -> float:
        """Return the mean KL divergence from the base model on lessons, in nats a token."""
        return self._mean(lessons, lambda batch: self._divergence(self._base_states(batch)))

    def _mean(self, lessons: Sequence[Lesson], kind: Callable[[Batch], LossOf]) -> float:
        total, count = 0.0, 0
        for some in in_batches(lessons, self._settings.batch):
            batch = Batch.of(some)
            loss_of, states = kind(batch), learned_states(self._model, batch)
            total += mean_loss(loss_of, states, self._rows) * batch.targets.size
            count += batch.targets.size
        return total / count

    def parameters(self) -> dict[str, mx.array]:
        """Return what is trained, by the names of an adapter's tensors."""
        return trained_parameters(self._model)

    def load(self, parameters: dict[str, mx.array]) -> None:
        """Replace what is trained."""
        self._model.load_weights(list(parameters.items()), strict=False)

    def state(self) -> dict[str, mx.array]:
        """Return the arrays that a run continues from."""
        named: list[tuple[str, Any]] = tree_flatten(self._optimizer.state)  # type: ignore[assignment]
        return {
            **{f"model/{name}": array for name, array in self.parameters().items()},
            **{f"optimizer/{name}": array for name, array in named},
        }

    def restore(self, state: dict[str, mx.array], step: int) -> None:
        """Continue from the arrays of `state`, after so many steps."""
        parts: dict[str, dict[str, mx.array]] = {"model": {}, "optimizer": {}}
        for name, array in state.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = array
        self.load(parts["model"])
        self._optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
        mx.eval(self._model.trainable_parameters(), self._optimizer.state)
        self.step = step

    def adapter_config(self, source: str) -> dict[str, Any]:
        """Return the adapter_config.json of what is trained, in mlx-lm's format."""
        settings = self._settings
        low_rank = {
            "rank": settings.rank,
            "scale": settings.scale,
            "dropout": 0.0,
            "keys": self.adapted,
        }
        return {
            "model": source,
            "fine_tune_type": settings.type,
            "num_layers": self._layers,
            "lora_parameters": None if settings.type == FULL else low_rank,
        }

    def reply(self, prompt: Sequence[int], ends: frozenset[int], max_tokens: int) -> list[int]:
        """Return the likeliest reply to a prompt, token by token.

        It is computed here and not by the engine, whose kept prompts are of other weights.
        """
        cache = self._model.make_cache(len(prompt) + max_tokens)
        tokens, read = list[int](), list(prompt)
        while len(tokens) < max_tokens:
            logits = self._model(mx.array([read]), cache, wanted=[len(read) - 1])
            token = int(_number(logits.argmax()))
            if token in ends:
                break
            tokens.append(token)
            read = [token]
        return tokens


def check_finite(what: str, loss: float) -> None:
    """Check the loss of a step or a validation.

    Raises:
        Qwen3Error: it is infinite or NaN.
    """
    if not math.isfinite(loss):
        raise Qwen3Error(
            f"the loss of {what} is not finite: take a smaller learning_rate, or check the weights"
        )


def _number(array: mx.array) -> float:
    return float(array.item())  # type: ignore[arg-type]  # none of them is complex
