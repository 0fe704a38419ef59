"""Decoding with compiled graphs: what lies between two attentions is traced once, then replayed.

Between the attention of one layer and that of the next nothing depends on the number of tokens
seen: output projection, norms, feed-forward, and the projections of the next layer. Each such piece
is a compiled function, which the host replays faster than it builds the piece anew. Its weights are
inputs, so that pieces of one layout share a function, in all layers and networks.

T sequences of one token each, D hidden size.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from threading import Lock
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx import backend
from qwen3_mlx.cache.attention import LayerCache, RopeFn
from qwen3_mlx.model.block import Block
from qwen3_mlx.model.fused import RowFused
from qwen3_mlx.model.linear import Linear
from qwen3_mlx.model.moe import QuantizedSwitchLinear, SwitchLinear

_MAX_ROWS = 32  # each number of rows is traced by itself
# All that these compute depends on their arrays alone.
_LEAVES = (Linear, nn.QuantizedLinear, nn.RMSNorm, SwitchLinear, QuantizedSwitchLinear)
# By layout, and kept for ever: why, see `rope._rotations`.
_functions: dict[object, Callable[..., Any]] = {}
_tracing = Lock()


def max_rows() -> int:
    """Return the most tokens of a pass that runs by compiled functions."""
    # On a CPU, MLX starts a C++ compiler for each new function.
    return _MAX_ROWS if backend.on_gpu() else 0


class CompiledLayers:
    """The compiled functions of a network's layers, as long as those stay what they are."""

    def __init__(self) -> None:
        """Compile nothing yet: layers may still be replaced."""
        self._pieces: dict[bool, _Pieces | None] = {}

    def halves(
        self,
        layers: Sequence[Block],
        norm: nn.RMSNorm,
        x: mx.array,
        cache: Sequence[LayerCache],
        rope: RopeFn,
    ) -> tuple[mx.array, mx.array] | None:
        """Compute `Decoder.halves` of embeddings x [1, T, D]; None if a layer is not plain."""
        single = x.shape[1] == 1
        pieces = self._pieces.get(single)
        if pieces is None or not pieces.current([*layers, norm]):
            pieces = self._pieces[single] = _pieces(layers, norm, single=single)
        return pieces.run(x, cache, rope) if pieces else None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A compiled function, and where the arrays are that it takes."""

    function: Callable[..., Any]
    slots: Sequence[tuple[nn.Module, str]]

    def __call__(self, *inputs: mx.array) -> Any:
        return self.function([module[name] for module, name in self.slots], *inputs)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The pieces before, between and after the attentions, and what they were compiled of."""

    ends: Sequence[Block | nn.RMSNorm]  # the layers, and the norm behind them
    pieces: Sequence[_Piece]
    children: Sequence[tuple[nn.Module, str, nn.Module]]  # parent, name, child
    fused: Sequence[tuple[nn.Module, RowFused]]  # of a single token

    def current(self, ends: Sequence[Block | nn.RMSNorm]) -> bool:
        """Return whether these are the layers and the norm, with the same modules and matrices."""
        return (
            len(ends) == len(self.ends)
            and all(map(is_, ends, self.ends))
            and all(parent[name] is child for parent, name, child in self.children)
            and all(owner.fused is fused and fused.holds(owner) for owner, fused in self.fused)
        )

    def run(
        self, x: mx.array, cache: Sequence[LayerCache], rope: RopeFn
    ) -> tuple[mx.array, mx.array]:
        """Compute `Decoder.halves` of embeddings x [1, T, D]."""
        layers, (first, *others), middle = self.ends[:-1], self.pieces, x
        half = len(layers) // 2
        x, *heads = first(x)
        for index, (layer, piece) in enumerate(zip(layers, others, strict=True)):
            if index == half:
                middle = x
            x, *heads = piece(x, cache[index].attend(*heads, scale=layer.scale, rope=rope))
        return middle, x


def _pieces(layers: Sequence[Block], norm: nn.RMSNorm, *, single: bool) -> _Pieces | None:
    """Return the pieces of a network; None if one of its layers is not plain."""
    # From the last, which an adapter has changed if it changes any: this is asked before each pass.
    if not all(_is_plain(module) for layer in reversed(layers) for module in layer.modules()):
        return None
    modules = [module for layer in layers for module in layer.modules()]
    owners = [owner for layer in layers for owner in (layer.self_attn, layer.mlp)]
    fused = [(owner, owner.fused) for owner in owners if single and owner.fused]
    if not all(one.holds(owner) for owner, one in fused):
        return None
    children = [
        (module, name, child)
        for module in modules
        for name, child in module.items()
        if isinstance(child, nn.Module)
    ]
    ends: list[Block | nn.RMSNorm] = [*layers, norm]
    pieces = [_piece(*pair, single=single) for pair in zip([None, *layers], ends, strict=True)]
    return _Pieces(ends, pieces, children, fused)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in _LEAVES or next(_arrays(module), None) is None


def _piece(former: Block | None, latter: Block | nn.RMSNorm, *, single: bool) -> _Piece:
    """Return the piece between the attentions of two layers, or before the first, or the last."""
    ends = [end for end in (former, latter) if end is not None]
    layout = (former is None, single, *(_layout(end) for end in ends))
    if layout not in _functions:  # or another thread sets it meanwhile
        _functions.setdefault(layout, _compile(former, latter, single=single))
    return _Piece(_functions[layout], _slots(former, latter, single=single))


def _compile(
    former: Block | None, latter: Block | nn.RMSNorm, *, single: bool
) -> Callable[..., Any]:
    """Compile a function of the arrays of `_slots` and of the inputs of a piece."""
    # Copies without weights: the function is kept, and must not keep a network.
    former, latter = _skeleton(former), _skeleton(latter)
    slots = _slots(former, latter, single=single)

    def piece(arrays: Sequence[mx.array], x: mx.array, *attended: mx.array) -> Sequence[mx.array]:
        with _tracing:  # the skeletons are shared by threads
            for (module, name), array in zip(slots, arrays, strict=True):
                module[name] = array
            if former:
                x = former.after_attention(x, *attended)
            if isinstance(latter, nn.RMSNorm):
                return (latter(x),)
            return x, *latter.before_attention(x)

    compiled: Callable[..., Any] = mx.compile(piece)
    return compiled


def _slots(
    former: Block | None, latter: Block | nn.RMSNorm, *, single: bool
) -> list[tuple[nn.Module, str]]:
    """Return the places of the arrays that a piece reads, in the order of its layout."""
    modules = []
    if former:
        modules += [former.self_attn.o_proj, former.post_attention_layernorm]
        modules += _leaves(former.mlp, single=single)
    if isinstance(latter, nn.RMSNorm):
        modules.append(latter)
    else:
        modules.append(latter.input_layernorm)
        attention = latter.self_attn
        leaves = _leaves(attention, single=single)
        modules += [leaf for leaf in leaves if leaf is not attention.o_proj]
    return [(module, name) for module in modules for name in _arrays(module)]


def _leaves(owner: nn.Module, *, single: bool) -> list[nn.Module]:
    """Return the modules with the arrays that `owner` reads: of a single token, joint ones."""
    fused = owner.fused if single else None
    leaves = [
        module
        for path, module in owner.named_modules()
        if type(module) in _LEAVES and not (fused and path in fused.names)
    ]
    return [*leaves, fused.joint] if fused else leaves


def _arrays(module: nn.Module) -> Iterator[str]:
    return (name for name, value in module.items() if isinstance(value, mx.array))


def _layout(module: nn.Module) -> object:
    """Return all that distinguishes the graph of a module from that of another."""
    return tuple(
        (
            path,
            type(part),
            tuple((name, part[name].shape) for name in _arrays(part)),
            tuple((k, v) for k, v in vars(part).items() if isinstance(v, int | float | str)),
            bool(getattr(part, "fused", None)),
        )
        for path, part in module.named_modules()
    )


def _skeleton(module: Any) -> Any:
    """Return a copy without arrays; there are places for them."""
    if module is None:
        return None
    parts = list(module.modules())
    parts += [part.fused.joint for part in parts if getattr(part, "fused", None)]
    empty = mx.zeros(0)
    arrays = [part[name] for part in parts for name in _arrays(part)]
    return copy.deepcopy(module, {id(array): empty for array in arrays})
