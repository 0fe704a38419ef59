"""Distillation: a quantized checkpoint learns to predict what the original does.

The codes stay as they were rounded. The scale and the bias of each group, in all layers, are tuned
by Adam on KL(original || quantized) of the next token. Routers stay, and so do embedding and head,
whose gradients would be the largest arrays of all.

Memory is bounded without the original: its layers run one at a time, and only its last hidden
states are kept, and its head, which turns them into logits a block of rows at a time. Of the
quantized network layers keep only their input for the gradients. Beside a scale or bias there are
three numbers in training: its gradient and Adam's moments.

N sequences, L tokens each, D hidden, V vocabulary.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from qwen3_mlx import backend
from qwen3_mlx.arguments import Progress
from qwen3_mlx.checkpoint.formats.matrix import Matrix
from qwen3_mlx.checkpoint.layerwise import (
    batches,
    head_path,
    last_norm,
    layer_inputs,
    read_matrix,
)
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.recipes import Formats
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import (
    ShardWriter,
    TensorSpec,
    as_memoryview,
    atomic_write,
    read_header,
    read_header_and_metadata,
)
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.moe import QuantizedSwitchLinear, Routing
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.training import (
    LossOf,
    Objective,
    checkpointed_layers,
    divergence,
    mean_loss,
    rows_at_once,
)

TUNED = "conversion.tensors"
"""The file of the tuned tensors, in the working folder of a conversion."""
_BATCH = 4  # sequences
# In widths of a group's codes, its scale: so one rate serves weights of any size. It falls to zero.
_RATE = 1e-3
_ROUTER = "mlp.gate"
_FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Distillation:
    """How to tune: the steps, the text to learn from, and the text that decides, ids [N, L]."""

    steps: int
    text: mx.array
    held_out: mx.array

    @property
    def identity(self) -> str:
        """A text that is another for any other steps or text."""
        digests = [
            blake2b(as_memoryview(ids), digest_size=16).hexdigest()
            for ids in (self.text, self.held_out)
        ]
        return " ".join([str(self.steps), *digests])


@dataclass(frozen=True, slots=True)
class Distilled:
    """The outcome of a distillation.

    Attributes:
        steps: the number of steps.
        kl_before: KL(original || quantized) on the held-out text, in nats a token.
        kl_after: the same after the steps.
        kept: True if what was tuned is better, so that it was written.
    """

    steps: int
    kl_before: float
    kl_after: float
    kept: bool


def needed_bytes(network: ModelConfig, formats: Formats, distillation: Distillation) -> int:
    """Return about the most bytes that `distill` takes.

    Of five shapes measured on a CPU the largest error was 11 %. Where the original's layers run,
    the inputs and outputs of one and its weights are in memory, and those of the next. In training:
    the quantized network, the original's head and states, three numbers for each scale and bias,
    the inputs of all layers for a batch, and the larger of a layer's backward pass, with weights
    and their gradients, and a block of logits.
    """
    student = trained = 0
    layers: Counter[str] = Counter()
    for name, array in Qwen3(network).tensors().items():
        module, _, kind = name.rpartition(".")
        fmt = formats.get(module) if kind == "weight" else None
        student += fmt.nbytes(array.shape, _FLOAT) if fmt else _FLOAT * array.size
        if name.startswith("model.layers."):
            layers[name.split(".")[2]] += array.size
            trained += 2 * array.size // fmt.group_size if fmt else 0
    layer, hidden, vocabulary = max(layers.values()), network.hidden_size, network.vocab_size
    states = hidden * (distillation.text.size + distillation.held_out.size)
    width = network.intermediate_size
    if experts := network.experts:
        width = experts.num_experts_per_tok * experts.moe_intermediate_size
    heads = network.num_attention_heads + network.num_key_value_heads
    tokens = _BATCH * distillation.text.shape[1]
    backward = 3 * layer + 12 * tokens * (hidden + network.head_dim * heads + width)
    logits = 7 * vocabulary * min(tokens, rows_at_once(vocabulary, checkpointing=True))
    step = network.num_hidden_layers * tokens * hidden + max(backward, logits)
    training = hidden * vocabulary + states + 3 * trained + step
    return max(_FLOAT * (3 * states + 2 * layer), student + _FLOAT * training)


def distill(
    folder: Path,
    config: Mapping[str, Any],
    matrices: Mapping[str, Matrix],
    distillation: Distillation,
    dtype: mx.Dtype,
    progress: Progress,
) -> Distilled:
    """Tune the quantized checkpoint of `config` in `folder`, in place, if that makes it better.

    `matrices` are the tensors of the original, `dtype` is that of scales and biases.
    `progress(done, total)` counts the original's layers, and then steps. What was tuned is written
    to the file `TUNED` before a number is replaced: a run that is interrupted after that only
    repeats the replacement.

    Raises:
        CheckpointError: the original is broken, or its predictions are not finite.
    """
    tuned = folder / TUNED
    if not tuned.exists():
        facts, tensors = _tune(folder, config, matrices, distillation, dtype, progress)
        with atomic_write(tuned) as stream:
            specs = [TensorSpec(name, a.dtype, a.shape) for name, a in tensors.items()]
            writer = ShardWriter(stream, specs, facts)
            for name, array in tensors.items():
                writer.append(name, array)
    entries, facts = read_header_and_metadata(tuned)
    with tuned.open("rb") as source:
        for file in Weights(folder).files:
            with file.open("r+b") as stream:
                for name, entry in read_header(file).items():
                    if name in entries:
                        source.seek(entries[name].start)
                        stream.seek(entry.start)
                        stream.write(source.read(entry.nbytes))
                stream.flush()
                os.fsync(stream.fileno())
    before, after = float(facts["before"]), float(facts["after"])
    return Distilled(distillation.steps, before, after, kept=bool(entries))


def _tune(
    folder: Path,
    config: Mapping[str, Any],
    matrices: Mapping[str, Matrix],
    distillation: Distillation,
    dtype: mx.Dtype,
    progress: Progress,
) -> tuple[dict[str, str], dict[str, mx.array]]:
    """Return the divergences as metadata, and the tensors to replace: none if no better."""
    network = ModelConfig.from_dict(config)
    layers, steps = network.num_hidden_layers, distillation.steps
    texts = [distillation.text, distillation.held_out]
    inputs = layer_inputs(network, matrices, mx.concatenate(texts))
    for done in range(layers):
        next(inputs)
        progress(done, layers + steps)
    x = last_norm(network, matrices)(next(inputs))
    inputs.close()  # it holds the last layer
    states, held_states = mx.split(x, [len(texts[0])])
    mx.eval(states, held_states)
    del x
    head = read_matrix(matrices[f"{head_path(network)}.weight"])
    options = LoadOptions(mx.float32, dequantize=False)
    student = _Student(load_model(config, Weights(folder), options, lambda *_: None), head)
    before = student.mean_divergence(distillation.held_out, held_states)
    if not before < float("inf"):
        raise CheckpointError(
            "what the original predicts on this text, or its quantized form, is not finite, so "
            "nothing can be learned from it; look for a sound copy, or leave distill out"
        )
    rate = optim.linear_schedule(_RATE, 0, steps)
    optimizer = optim.Adam(rate, bias_correction=True)
    for done, rows in enumerate(_batches(len(texts[0]), steps), 1):
        student.advance(distillation.text[rows], states[rows], optimizer)
        progress(layers + done, layers + steps)
    tuned = student.rounded(dtype)
    after = student.mean_divergence(distillation.held_out, held_states)
    facts = {"before": repr(before), "after": repr(after)}
    return facts, tuned if after < before else {}


def _batches(count: int, steps: int) -> Iterator[mx.array]:
    """Yield the numbers of the sequences of each step: all of them in turn, in random order."""
    random, order = Random(0), list[int]()
    for _ in range(steps):
        while len(order) < _BATCH:
            order += random.sample(range(count), count)
        yield mx.array(order[:_BATCH])
        del order[:_BATCH]


def _weight(module: nn.Module) -> mx.array:
    fmt = Format(module.bits, module.group_size, module.mode)
    return fmt.dequantize_float32(module["weight"], module["scales"], module["biases"])


class _UnpackedLinear(nn.QuantizedLinear):
    """A layer that unpacks its weights first: on a CPU that is several times faster."""

    def __call__(self, x: mx.array) -> mx.array:
        out = x @ _weight(self).T
        return out + self["bias"] if "bias" in self else out


class _UnpackedExperts(QuantizedSwitchLinear):
    """The same for experts."""

    def __call__(self, x: mx.array, routing: Routing) -> mx.array:
        weight = _weight(self).swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=routing.experts, sorted_indices=routing.ordered)


_UNPACKED: dict[type, type] = {
    nn.QuantizedLinear: _UnpackedLinear,
    QuantizedSwitchLinear: _UnpackedExperts,
}


class _Student:
    """A quantized network in training; `head` [V, D] is that of the original."""

    def __init__(self, model: Qwen3, head: mx.array) -> None:
        self._model, self._head = model, head
        self._rows = rows_at_once(model.config.vocab_size, checkpointing=True)
        model.freeze()
        for layer in model.layers:
            layer.unfuse()
            for path, module in layer.named_modules():
                if "biases" in module and path != _ROUTER:
                    module.unfreeze(keys=["scales", "biases"], recurse=False)
                    if not backend.on_gpu():
                        module.__class__ = _UNPACKED[type(module)]

    def _states(self, ids: mx.array) -> mx.array:
        """Compute the last hidden states [N·L, D]."""
        with checkpointed_layers(self._model):
            x = self._model.hidden(ids)
        return x.reshape(-1, x.shape[-1])

    def _loss_of(self, base_states: mx.array) -> LossOf:
        flat = base_states.reshape(-1, base_states.shape[-1])
        return divergence(self._model.head, lambda x: x @ self._head.T, flat)

    def advance(self, ids: mx.array, base_states: mx.array, optimizer: optim.Adam) -> None:
        """Train with some sequences; `base_states` [N, L, D] are the original's."""

        def objective() -> tuple[mx.array, Objective]:
            states = self._states(ids)
            found = Objective.of(self._loss_of(base_states), states, self._rows, states.shape[0])
            return found.proxy, found

        (_, found), gradients = nn.value_and_grad(self._model, objective)()
        for stage in found.stages:
            mx.eval(stage)
        del found
        now, slopes = _named(self._model.trainable_parameters()), _named(gradients)
        del gradients
        units = {name: now[f"{name.rpartition('.')[0]}.scales"] for name in now}
        moves = optimizer.apply_gradients(
            {name: slopes.pop(name) * unit for name, unit in units.items()},
            {name: mx.zeros_like(unit) for name, unit in units.items()},
        )
        moved = [(name, now[name] + unit * moves[name]) for name, unit in units.items()]
        self._model.load_weights(moved, strict=False)
        mx.eval(moved, optimizer.state)

    def mean_divergence(self, ids: mx.array, base_states: mx.array) -> float:
        """Compute the mean divergence from the original, in nats a token."""
        total = 0.0
        for rows in batches(*ids.shape):
            loss_of, states = self._loss_of(base_states[rows]), self._states(ids[rows])
            total += mean_loss(loss_of, states, self._rows) * states.shape[0]
        return total / ids.size

    def rounded(self, dtype: mx.Dtype) -> dict[str, mx.array]:
        """Round what is trained to the dtype in which it is stored, and return it."""
        tuned = {
            name: array.astype(dtype)
            for name, array in _named(self._model.trainable_parameters()).items()
        }
        self._model.load_weights(
            [(name, array.astype(mx.float32)) for name, array in tuned.items()], strict=False
        )
        mx.eval(tuned)
        return tuned


def _named(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))
