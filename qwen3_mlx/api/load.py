"""The public function `load`: resolves, checks, fetches and reads a checkpoint into an `LLM`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from threading import Event as Flag
from typing import Any

from qwen3_mlx import backend
from qwen3_mlx.api.capacity import check_fits, plan_load
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.prompts import TextProcessor
from qwen3_mlx.arguments import Progress, plain
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.quantized import CacheFormat, cache_format
from qwen3_mlx.checkpoint.description import fetch_weights, read_config
from qwen3_mlx.checkpoint.fingerprint import fingerprint
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.stored import formats_stored
from qwen3_mlx.checkpoint.weights import Weights, has_all_weights, untie_if_needed
from qwen3_mlx.engine.forward import warm_up
from qwen3_mlx.engine.memory import Plan
from qwen3_mlx.engine.sampling_params import stated_sampling
from qwen3_mlx.engine.speculation.draft_model import DraftModel
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format, FormatOf
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import hub_name, with_yarn
from qwen3_mlx.text.grammar_compiler import GrammarCompiler
from qwen3_mlx.text.prompt import ControlTokens
from qwen3_mlx.text.template import ChatTemplate, read_tokenizer_config, special_tokens
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_ANSWER = "xq7wanswer"  # a text to find in what a template renders
_MAX_PROMPT_CACHE_GB = 1e9
DRAFT_NGRAM = "ngram"  # value of `draft` for drafting without a model


def load(  # noqa: PLR0913 - one keyword a choice
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    dequantize: bool | None = None,
    context: int | None = None,
    kv_bits: int | str | None = None,
    draft: str | Path | None = None,
    prompt_cache: str | Path | None = None,
    prompt_cache_gb: float = 8,
    progress: Progress | None = None,
    download_progress: Progress | None = None,
) -> LLM:
    """Load a checkpoint and return an `LLM`.

    Args:
        source: the checkpoint: a folder in the published or in MLX's format; a hub name such as
            "Qwen/Qwen3-8B"; or a size such as "8B" or "30b-a3b", which stands for the 4-bit
            checkpoint on the hub, Qwen/Qwen3-8B-MLX-4bit. Default None, the embedded demo. A folder
            that is named like a size is "./8B" or a Path.
        revision: branch, tag or commit on the hub; default None, the main branch.
        bits: quantize the weights while loading, to 2, 3, 4, 5, 6 or 8 bits; default None, which
            keeps them as stored. A checkpoint on the hub is downloaded whole for that: 16 GB for
            Qwen/Qwen3-8B.
        group_size: number of weights that share a scale when `bits` is given: 32, 64 (default) or
            128.
        dtype: "bfloat16", "float16" or "float32", for computation and for weights that are not
            quantized; default None, which is bfloat16 on a GPU and float32 on a CPU.
        dequantize: True holds quantized weights as `dtype`, False as stored. Default None, which is
            True on a CPU, where float32 computes faster, if the float32 weights take at most half
            of the memory.
        context: context window in tokens: the most that a prompt and its reply have together.
            Default None, which is what the model and the memory allow. More than the model's own
            window switches YaRN on, for checkpoints that it is published for; it may lower the
            quality of short texts.
        kv_bits: precision of the KV cache: 8, "k8v4" (keys 8 bits, values 4 bits) or 4, for longer
            contexts in the same memory; default None, which keeps `dtype`.
        draft: speculative decoding, which checks several draft tokens in one forward pass and
            changes no reply; default None, off. "ngram" proposes what followed the same tokens
            before. A folder, hub name or size of a smaller checkpoint of the same family, such as
            "0.6B" for "8B", adds a draft model.
        prompt_cache: a folder for the KV caches of long prompts, so that they need not be read
            again after a restart; default None, off. Several models may share it.
        prompt_cache_gb: the most that this folder may take, in GB (10^9 bytes); default 8.
        progress: callable (done, total) modules loaded; default None. Called from another thread.
        download_progress: callable (done, total) bytes downloaded from the hub; default None.
            Called from other threads. An interrupted download resumes where it stopped.

    Returns:
        An `LLM`. Close it, or use it as a context manager, to free its memory.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of its range.
        CheckpointError: the checkpoint cannot be found or read, or has a feature that is not
            supported.
        Qwen3Error: the checkpoint does not fit the memory; the message shows the sum, and what
            would fit.
    """
    bits, group_size, context, kv_bits = map(plain, (bits, group_size, context, kv_bits))
    dequantize, prompt_cache_gb = plain(dequantize), plain(prompt_cache_gb)
    wanted = Format(4 if bits is None else bits, group_size)  # checks group_size without bits, too
    _check(context, dequantize, prompt_cache_gb)
    options = LoadOptions(
        backend.compute_dtype(dtype), None if bits is None else wanted, dequantize
    )
    demo = str(files("qwen3_mlx") / "demo")
    target = _ResolvedCheckpoint.at(
        Source(demo if source is None else hub_name(source), revision, download_progress),
        options,
        kv_bits,
        context,
    )
    small = _draft_model(draft, options, kv_bits, download_progress)
    # Refuse what cannot run or does not fit before gigabytes are downloaded.
    beside = small.plan(context).held if small else 0
    target.refuse_if_too_large(context, beside)
    tokenizer = Tokenizer(target.folder / "tokenizer.json")
    if small:
        _refuse_another_family(small, target, tokenizer)
    abandoned = Flag()

    def follow(done: int, total: int) -> None:
        if abandoned.is_set():
            raise Qwen3Error("loading was interrupted")
        if progress:
            progress(done, total)

    backend.refuse_fork()
    described, target = target.network, target.fetched()
    if target.network != described:  # the weights have an untied head, which takes more memory
        target.refuse_if_too_large(context, beside)
    small = small.fetched() if small else None

    wired = 0

    def read_weights() -> tuple[Qwen3, Speculator | None]:
        nonlocal wired
        backend.limit_buffer_cache()
        backend.tune_blas_threads(target.network.hidden_size)
        models = [found.read(follow) for found in (target, small) if found]
        wired = sum(array.nbytes for model in models for array in model.tensors().values())
        backend.wire(wired)
        if backend.on_gpu():  # a GPU compiles its kernels at first use
            for model in models:
                warm_up(model)
        drafting = DraftModel(models[1]) if small else None
        return models[0], Speculator(target.network, drafting) if draft is not None else None

    held_as = (target.options, target.cache, backend.on_gpu())
    disk = _open_disk(prompt_cache, prompt_cache_gb, target.folder, target.config, held_as)
    worker = Worker()
    try:
        model, speculator = worker.call(read_weights)
        words = _load_text_processor(target.folder, target.config, tokenizer)
        return LLM(model, words, worker, context, disk, speculator, wired)
    except BaseException:
        abandoned.set()
        worker.stop()
        backend.unwire(wired)
        raise


@dataclass(frozen=True, slots=True)
class _ResolvedCheckpoint:
    """A checkpoint whose files except the weights are here, and how its weights will be held.

    Attributes:
        place: the folder or the hub name.
        folder: the local folder of the files.
        config: the contents of config.json.
        network: the shape of the network.
        stored: the format of each module as stored, if the checkpoint is quantized.
        options: dtype and quantization in memory.
        cache: the format of the KV cache.
    """

    place: Source
    folder: Path
    config: Mapping[str, Any]
    network: ModelConfig
    stored: FormatOf | None
    options: LoadOptions
    cache: CacheFormat

    @classmethod
    def at(
        cls,
        place: Source,
        options: LoadOptions,
        kv_bits: int | str | None,
        context: int | None = None,
    ) -> "_ResolvedCheckpoint":
        folder, config = read_config(place)
        if has_all_weights(folder):
            config = untie_if_needed(config, folder)
        if context is not None:
            config = with_yarn(config, context)
        network, stored = ModelConfig.from_dict(config), formats_stored(config, folder)
        cache = cache_format(kv_bits, network.head_dim)
        return cls(place, folder, config, network, stored, options, cache)

    def as_stored(self) -> "_ResolvedCheckpoint":
        """Return it without the option to quantize, if it is quantized already."""
        return replace(self, options=replace(self.options, quantize=None)) if self.stored else self

    def plan(self, context: int | None) -> Plan:
        return plan_load(self.network, self.stored, self.options, context, self.cache)

    def fetched(self) -> "_ResolvedCheckpoint":
        """Fetch the weights and return the checkpoint, its head untied if the weights have one."""
        complete = has_all_weights(self.folder)  # then `at` has looked for a head already
        folder = fetch_weights(self.place, self.folder)
        config = self.config if complete else untie_if_needed(self.config, folder)
        return replace(self, folder=folder, config=config, network=ModelConfig.from_dict(config))

    def refuse_if_too_large(self, context: int | None, beside: int) -> None:
        check_fits(
            self.place.name, self.network, self.stored, self.options, context, self.cache, beside
        )

    def read(self, progress: Progress) -> Qwen3:
        model = load_model(self.config, Weights(self.folder), self.options, progress)
        model.cache_format, model.source = self.cache, self.place.name
        return model


def _draft_model(
    draft: str | Path | None,
    options: LoadOptions,
    kv_bits: int | str | None,
    progress: Progress | None,
) -> _ResolvedCheckpoint | None:
    if draft is None or draft == DRAFT_NGRAM:
        return None
    place = Source(hub_name(draft), progress=progress)
    return _ResolvedCheckpoint.at(place, options, kv_bits).as_stored()


def _refuse_another_family(
    small: _ResolvedCheckpoint, target: _ResolvedCheckpoint, tokenizer: Tokenizer
) -> None:
    knows = Tokenizer(small.folder / "tokenizer.json").knows_all_of(tokenizer)
    if not knows or small.network.vocab_size < target.network.vocab_size:
        raise CheckpointError(
            f"draft: {small.place.name} has other tokens than {target.place.name}; "
            f"take a smaller model of its family, or draft={DRAFT_NGRAM!r}"
        )


def _check(context: object, dequantize: object, prompt_cache_gb: float) -> None:
    """Raise for arguments that are wrong by themselves, before anything is fetched."""
    if context is not None and (type(context) is not int or context < 1):
        raise ValueError(f"context must be a number of tokens from 1 up, not {context!r}")
    if dequantize is not None and not isinstance(dequantize, bool):
        raise TypeError(f"dequantize must be True, False or None, not {dequantize!r}")
    if (
        not isinstance(prompt_cache_gb, int | float)
        or not 0 < prompt_cache_gb < _MAX_PROMPT_CACHE_GB
    ):
        raise ValueError(f"prompt_cache_gb must be more than 0 GB, not {prompt_cache_gb!r}")


def _open_disk(
    place: str | Path | None,
    max_gb: float,
    folder: Path,
    config: Mapping[str, Any],
    held_as: Sequence[object],
) -> DiskPrefixes | None:
    if place is None:
        return None
    try:
        key = fingerprint(folder, config, held_as)  # caches are valid for the same weights only
        return DiskPrefixes(Path(place), key, limit=int(max_gb * 1e9))
    except FileExistsError as error:
        raise Qwen3Error(f"prompt_cache: {place} is a file; name a folder") from error
    except OSError as error:
        raise Qwen3Error(
            f"prompt_cache: {place} cannot be used: {error.strerror or error}; name another folder"
        ) from error


def _load_text_processor(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer
) -> TextProcessor:
    generation = folder / "generation_config.json"
    generation_config = read_json(generation) if generation.is_file() else {}
    sampling, complaints = stated_sampling(generation_config)
    for complaint in complaints:
        _log.warning("%s: %s", generation.name, complaint)
    # Some conversions drop generation_config.json, which states the second of Qwen3's end tokens.
    end_ids = {*_end_ids(config, "config.json"), *_end_ids(generation_config, generation.name)}
    if (end_of_text := tokenizer.id_of("<|endoftext|>")) is not None:
        end_ids.add(end_of_text)
    end_ids |= _named_end(folder, tokenizer)
    grammars = GrammarCompiler(tokenizer, frozenset(end_ids))
    template, no_template = (
        None,
        "this checkpoint has no chat template; take one that has, such as Qwen/Qwen3-8B, "
        "or continue raw text with complete()",
    )
    try:
        template = ChatTemplate.from_folder(folder)
    except CheckpointError as error:
        _log.warning("there is no chat, only raw text: %s", error)
        no_template = str(error)
    return TextProcessor(
        tokenizer,
        template,
        ControlTokens(tokenizer, template.source if template else ""),
        Thinking.of(template, tokenizer),
        sampling,
        frozenset(end_ids),
        _turn_end(template, tokenizer) if template else frozenset(),
        grammars,
        no_template,
    )


def _named_end(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Return the id of tokenizer_config's `eos_token`; many fine-tunes change it there only."""
    config = read_tokenizer_config(folder)
    token = tokenizer.id_of(special_tokens(config).get("eos_token", ""))
    if token is not None:
        return {token}
    if stated := config.get("eos_token"):
        _log.warning("tokenizer_config.json: its eos_token %r is no token; it ends nothing", stated)
    return set()


def _turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the id of the special token that the template writes after an assistant's turn.

    A conversation with a known answer is rendered, and the text after that answer examined. Empty
    if there is no such token.
    """
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    for messages in (turn, [{"role": "system", "content": "?"}, *turn]):
        try:
            rendered = template.render(messages, add_generation_prompt=False)
        except Qwen3Error:  # some templates demand a system turn
            continue
        after = rendered.partition(_ANSWER)[2].lstrip()
        for name, is_special in tokenizer.added_tokens.items():
            token = tokenizer.id_of(name)
            if is_special and token is not None and after.startswith(name):
                return frozenset([token])
    return frozenset()


def _end_ids(config: Mapping[str, Any], where: str) -> list[int]:
    stated = config.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(type(token) is not int or token < 0 for token in ids):
        raise CheckpointError(f"{where}: eos_token_id is {stated!r}, not one or more token ids")
    return ids
