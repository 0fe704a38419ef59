"""The checkpoints that `load` reads: described and checked before their weights are fetched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.api.capacity import check_fits, plan_load
from qwen3_mlx.arguments import Progress
from qwen3_mlx.cache.quantized import CacheFormat, cache_format
from qwen3_mlx.checkpoint.adapters import Adapter
from qwen3_mlx.checkpoint.decoded import open_weights
from qwen3_mlx.checkpoint.description import fetch_weights, read_config
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.local import mark_used
from qwen3_mlx.checkpoint.shard import Share, open_share
from qwen3_mlx.checkpoint.stored_formats import formats_held, is_foreign
from qwen3_mlx.checkpoint.weights import (
    has_all_weights,
    with_described_head,
    with_stored_head,
)
from qwen3_mlx.engine.memory import Plan
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import FormatOf
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import DEMO, hub_name, with_yarn
from qwen3_mlx.text.tokenizer import Tokenizer

DRAFT_NGRAM = "ngram"  # value of `draft` for drafting without a model


@dataclass(frozen=True, slots=True)
class ResolvedCheckpoint:
    """A checkpoint whose files except the weights are here, and how its weights will be held.

    Attributes:
        place: the folder or the hub name.
        folder: the local folder of the files.
        config: the contents of config.json.
        network: the shape of the network, as the adapter leaves it.
        stored: the format of each module as stored, if the checkpoint is quantized.
        options: dtype and quantization in memory.
        cache: the format of the KV cache.
        adapter: what is added to the weights, if anything is.
        choices: the adapters of which requests choose, by name.
        share: the part that this machine holds; None is all of it.
        build: creates the network, unevaluated, of a config.
    """

    place: Source
    folder: Path
    config: Mapping[str, Any]
    network: ModelConfig
    stored: FormatOf | None
    options: LoadOptions
    cache: CacheFormat
    adapter: Adapter | None = None
    choices: Mapping[str, Adapter] = field(default_factory=dict)
    share: Share | None = None
    build: Callable[[ModelConfig], Qwen3] = Qwen3

    @classmethod
    def at(
        cls,
        place: Source,
        options: LoadOptions,
        kv_bits: int | str | None,
        context: int | None = None,
        adapter: str | Path | Mapping[str, str | Path] | None = None,
    ) -> "ResolvedCheckpoint":
        folder, config = read_config(place)
        config = with_described_head(config, folder)
        if context is not None:
            config = with_yarn(config, context)
        network, stored = ModelConfig.from_dict(config), formats_held(config, folder)
        if options.quantize and is_foreign(config):
            stored = None  # decoded, and quantized as asked
        if network.experts and not backend.on_gpu() and options.dtype != mx.float32:
            if adapter or options.dequantize or not (stored or options.quantize):
                raise Qwen3Error(
                    "MLX multiplies experts in float32 only on a CPU: leave dtype out, or quantize "
                    "them: bits=8"
                )
            options = replace(options, dequantize=False)
        cache = cache_format(kv_bits, network.head_dim)
        found = cls(place, folder, config, network, stored, options, cache)
        if isinstance(adapter, Mapping):
            return found.with_choices(
                {n: Adapter.at(one, network, place.name) for n, one in adapter.items()}
            )
        return (
            found
            if adapter is None
            else found.with_adapter(Adapter.at(adapter, network, place.name))
        )

    def with_choices(self, choices: Mapping[str, Adapter]) -> "ResolvedCheckpoint":
        """Return it with adapters of which requests choose.

        Raises:
            CheckpointError: one of them changes more than the matrices of layers.
        """
        for choice in choices.values():
            choice.refuse_choosing()
        # Each is padded to the largest rank.
        size = len(choices) * max((choice.size for choice in choices.values()), default=0)
        options = replace(self.options, adapter_bytes=size * self.options.dtype.size)
        return replace(self, choices=choices, options=options)

    def with_adapter(self, adapter: Adapter | None) -> "ResolvedCheckpoint":
        """Return it with an adapter, which fits it."""
        if adapter is None:
            return self
        network = ModelConfig.from_dict(adapter.config(self.config))
        nbytes = adapter.size * self.options.dtype.size
        options = replace(self.options, adapter_bytes=nbytes)
        return replace(self, adapter=adapter, network=network, options=options)

    def as_stored(self) -> "ResolvedCheckpoint":
        """Return it without the option to quantize, if it is quantized already."""
        return replace(self, options=replace(self.options, quantize=None)) if self.stored else self

    def in_bfloat16(self) -> "ResolvedCheckpoint":
        """Return it with bfloat16 as the dtype, for good."""
        return replace(self, options=replace(self.options, dtype=mx.bfloat16, provisional=False))

    def plan(self, context: int | None) -> Plan:
        return plan_load(self.network, self.stored, self.options, context, self.cache)

    def fetched(self) -> "ResolvedCheckpoint":
        """Fetch the weights and return the checkpoint, with the head that they have."""
        # Of a tied head `at` has looked for another one already.
        known = self.network.tie_word_embeddings and has_all_weights(self.folder)
        wanted = self.share.has_tensor(self.network) if self.share else None
        folder = fetch_weights(self.place, self.folder, wanted=wanted)
        config = self.config if known else with_stored_head(self.config, folder, wanted)
        found = replace(self, folder=folder, config=config, network=ModelConfig.from_dict(config))
        return found.with_adapter(self.adapter)

    def read(self, progress: Progress) -> Qwen3:
        options, share = self.options, self.share
        in_floats = True if options.quantize else options.dequantize
        place = self.folder, self.config, options.dtype
        config, weights = (
            open_share(*place, share, in_floats=in_floats)
            if share
            else open_weights(*place, in_floats=in_floats)
        )
        choices = [*self.choices.values()]
        model = load_model(
            config, weights, options, progress, self.adapter, choices, build=self.build
        )
        model.source, model.adapters = self.place.name, tuple(self.choices)
        mark_used(self.folder)
        return model


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoint to load, and that of its draft model.

    Attributes:
        target: the checkpoint to load.
        draft: that of the draft model, if there is one.
        speculates: whether tokens are drafted, by a model or by n-grams.
        context: the context window asked for; None is what fits.
    """

    target: ResolvedCheckpoint
    draft: ResolvedCheckpoint | None
    speculates: bool
    context: int | None

    @classmethod
    def resolve(
        cls,
        source: str | Path | None,
        revision: str | None,
        draft: str | Path | None,
        options: LoadOptions,
        kv_bits: int | str | None,
        context: int | None,
        adapter: str | Path | Mapping[str, str | Path] | None,
        progress: Progress | None,
    ) -> "Checkpoints":
        """Resolve the arguments of `load`; only descriptions are fetched."""
        place = Source(hub_name(DEMO if source is None else source), revision, progress)
        target, small = ResolvedCheckpoint.at(place, options, kv_bits, context, adapter), None
        if draft is not None and draft != DRAFT_NGRAM:
            place = Source(hub_name(draft), progress=progress)
            small = ResolvedCheckpoint.at(place, options, kv_bits).as_stored()
        return cls(target, small, draft is not None, context)

    def plan(self) -> int:
        """Return the bytes that both take, with the context asked for or else a short one."""
        beside = self.draft.plan(self.context).held if self.draft else 0
        return self.target.plan(self.context).total + beside

    def check_memory(self) -> None:
        """Check that both fit the memory that is available; raises what `check_fits` raises."""
        target = self.target
        check_fits(
            target.place.name,
            target.network,
            target.stored,
            target.options,
            self.context,
            target.cache,
            self.draft.plan(self.context).held if self.draft else 0,
        )

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of both.

        Raises:
            CheckpointError: the draft model has another one.
        """
        tokenizer = Tokenizer(self.target.folder / "tokenizer.json")
        if self.draft:
            knows = Tokenizer(self.draft.folder / "tokenizer.json").knows_all_of(tokenizer)
            if not knows or self.draft.network.vocab_size < self.target.network.vocab_size:
                raise CheckpointError(
                    f"draft: {self.draft.place.name} has other tokens than "
                    f"{self.target.place.name}; take a smaller model of its family, or "
                    f"draft={DRAFT_NGRAM!r}"
                )
        return tokenizer

    def fetched(self) -> "Checkpoints":
        """Fetch the weights; the memory is checked again if they have a head of their own."""
        fetched = replace(self, target=self.target.fetched())
        if fetched.target.network != self.target.network and not self.target.share:
            fetched.check_memory()
        return replace(fetched, draft=self.draft.fetched() if self.draft else None)

    def in_bfloat16(self) -> "Checkpoints":
        """Return both with bfloat16 as the dtype, for good."""
        draft = self.draft.in_bfloat16() if self.draft else None
        return replace(self, target=self.target.in_bfloat16(), draft=draft)
