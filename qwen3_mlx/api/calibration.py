"""Calibration text as token ids: to measure on, to learn from, and to decide."""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from qwen3_mlx.checkpoint.calibration_text import default_text
from qwen3_mlx.checkpoint.distill import Distillation
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.text.tokenizer import Tokenizer

_SEQUENCE = 128  # tokens of a piece of calibration text
_MAX_SEQUENCES = 64  # to measure on, and to decide by
_MAX_ACTIVATION_BYTES = 512_000_000
_HELD_OUT = 8  # one part of so many


def calibration_ids(folder: Path, network: ModelConfig, text: str | None) -> mx.array:
    """Return N pieces of a text as token ids [N, L], spread evenly over it.

    N is limited so that the activations of all layers and their gradients, in float32, stay within
    `_MAX_ACTIVATION_BYTES`.

    Raises:
        ValueError: the text is too short.
        CheckpointError: tokenizer.json is broken, or of another model.
    """
    ids = _token_ids(folder, network, default_text() if text is None else text)
    if len(ids) < 2 * _SEQUENCE:
        raise ValueError(f"the calibration text has {len(ids)} tokens; give some hundreds or more")
    piece_bytes = 2 * network.num_hidden_layers * network.hidden_size * _SEQUENCE * 4
    return _pieces(ids, min(_MAX_SEQUENCES, max(4, _MAX_ACTIVATION_BYTES // piece_bytes)))


def distillation(folder: Path, network: ModelConfig, text: str | None, steps: int) -> Distillation:
    """Return the settings of `steps` steps: the last eighth of the text decides.

    Paragraphs that the text repeats are left out, so that nothing is in both parts. The number of
    pieces is limited so that the original's last hidden states stay within `_MAX_ACTIVATION_BYTES`.

    Raises:
        ValueError: the text is too short.
        CheckpointError: tokenizer.json is broken, or of another model.
    """
    paragraphs = dict.fromkeys((default_text() if text is None else text).split("\n\n"))
    ids = _token_ids(folder, network, "\n\n".join(paragraphs))
    if len(ids) < _HELD_OUT * _SEQUENCE:
        raise ValueError(
            f"the calibration text has {len(ids):,} tokens without its repetitions, and to learn "
            f"from it takes {_HELD_OUT * _SEQUENCE:,}, better tens of thousands"
        )
    cut = len(ids) - len(ids) // _HELD_OUT
    most = _MAX_ACTIVATION_BYTES // (network.hidden_size * _SEQUENCE * 4)
    return Distillation(steps, _pieces(ids[:cut], most), _pieces(ids[cut:], _MAX_SEQUENCES))


def _token_ids(folder: Path, network: ModelConfig, text: str) -> list[int]:
    ids = Tokenizer(folder / "tokenizer.json").encode(text)
    if max(ids, default=0) >= network.vocab_size:
        raise CheckpointError("tokenizer.json has more tokens than the model knows")
    return ids


def _pieces(ids: Sequence[int], most: int) -> mx.array:
    """Return up to `most` pieces [N, L] of ids, spread evenly over them."""
    count = min(most, len(ids) // _SEQUENCE)
    starts = [piece * (len(ids) // count) for piece in range(count)]
    return mx.array([ids[start : start + _SEQUENCE] for start in starts], dtype=mx.int32)
