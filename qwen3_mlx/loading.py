"""From a name to an `LLM`: what is found is checked, fetched, read and put together."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from threading import Event as Flag
from typing import Any

from qwen3_mlx import backend
from qwen3_mlx.asking import Progress
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.quantized import cache_format
from qwen3_mlx.checkpoint.hub import DESCRIPTION_FILES, Source
from qwen3_mlx.checkpoint.identity import identity
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.quantization import Format, formats_stored
from qwen3_mlx.checkpoint.weights import Weights, weight_names
from qwen3_mlx.engine.params import sampling_defaults
from qwen3_mlx.engine.runner import warm_up
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.files import read_json
from qwen3_mlx.fit import refuse_what_cannot_fit
from qwen3_mlx.llm import LLM
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.published import stretched
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.replies import Words
from qwen3_mlx.text.grammar import Grammars
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Tokenizer


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
    prompt_cache: str | Path | None = None,
    prompt_cache_gb: float = 8,
    progress: Progress | None = None,
) -> LLM:
    """Load a checkpoint: a folder, a hub name, or None for the embedded demo.

    Args:
        source: a folder in the published or in MLX's format, or a name such as Qwen/Qwen3-8B.
        revision: the hub's branch, tag or commit.
        bits: quantize the weights while loading, to 2, 3, 4, 5, 6 or 8 bits.
        group_size: how many weights share a scale then: 32, 64 or 128.
        dtype: bfloat16, float16 or float32; None is bfloat16 on a GPU and float32 on a CPU.
        dequantize: hold quantized weights as `dtype`; None does so on a CPU, where that computes
            faster, if the float32 weights take at most half of the memory.
        context: the most tokens of prompt and reply together, if not what the model and the memory
            allow. Beyond the model's window that switches YaRN on, for the checkpoints that it is
            published for; the quality of short texts may suffer from it.
        kv_bits: keep keys and values of what has been read in 8 bits, "k8v4" (keys 8, values 4) or
            4 bits, for longer contexts in the same memory; None keeps them in `dtype`.
        prompt_cache: a folder where long prompts are kept as they have been read, so that they need
            not be read again after a restart; models may share it.
        prompt_cache_gb: the most that all of them may take there, in GB.
        progress: told (done, total) modules loaded, from another thread.

    Raises:
        ValueError: an argument is out of its range.
        CheckpointError: the checkpoint cannot be found, read or honoured.
        Qwen3Error: it does not fit; the message shows the sum, and what would.
    """
    wanted = Format(4 if bits is None else bits, group_size)  # a wrong group size is never silent
    _check(context, dequantize, prompt_cache_gb)
    options = LoadOptions(
        backend.compute_dtype(dtype), None if bits is None else wanted, dequantize
    )
    place = Source(str(files("qwen3_mlx") / "demo" if source is None else source), revision)
    folder = place.fetch(DESCRIPTION_FILES)
    config = read_json(folder / "config.json")
    if context is not None:
        config = stretched(config, context)
    # What cannot be run, or does not fit, is refused before gigabytes are fetched.
    network, stored = ModelConfig.from_dict(config), formats_stored(config, folder)
    form = cache_format(kv_bits, network.head_dim)
    refuse_what_cannot_fit(place.name, network, stored, options, context, form)
    abandoned = Flag()

    def follow(done: int, total: int) -> None:
        if abandoned.is_set():
            raise Qwen3Error("loading was interrupted")
        if progress:
            progress(done, total)

    def read_weights() -> Qwen3:
        backend.limit_cache()
        backend.suit_threads(network.hidden_size)
        model = load_model(config, Weights(folder), options, follow)
        model.cache_format = form
        backend.wire_weights()
        if backend.on_gpu():  # which builds its kernels at their first use
            warm_up(model)
        return model

    tokenizer = Tokenizer(folder / "tokenizer.json")
    folder = place.fetch(weight_names(folder) or ["model.safetensors"])
    held_as = (options, form, backend.on_gpu())
    disk = _open_disk(prompt_cache, prompt_cache_gb, folder, config, held_as)
    worker = Worker()
    try:
        model = worker.call(read_weights)
        return LLM(model, _words_of(folder, config, tokenizer), worker, context, disk)
    except BaseException:
        abandoned.set()
        worker.stop()
        raise


def _check(context: object, dequantize: object, prompt_cache_gb: float) -> None:
    """Refuse what is wrong in itself, before anything is fetched."""
    if context is not None and (type(context) is not int or context < 1):
        raise ValueError(f"context must be a number of tokens from 1 up, not {context!r}")
    if dequantize is not None and not isinstance(dequantize, bool):
        raise TypeError(f"dequantize must be True, False or None, not {dequantize!r}")
    if not prompt_cache_gb > 0:
        raise ValueError(f"prompt_cache_gb must be more than 0, not {prompt_cache_gb!r}")


def _open_disk(
    place: str | Path | None,
    most: float,
    folder: Path,
    config: Mapping[str, Any],
    held_as: Sequence[object],
) -> DiskPrefixes | None:
    if place is None:
        return None
    try:
        held = identity(folder, config, held_as)
        return DiskPrefixes(Path(place), held, limit=int(most * 1e9))
    except OSError as error:
        raise Qwen3Error(f"prompt_cache: {error}") from error


def _words_of(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> Words:
    generation = folder / "generation_config.json"
    generation_config = read_json(generation) if generation.is_file() else {}
    try:
        sampling_defaults(generation_config, thinking=False, hybrid=False)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{generation.name}: {error}") from error
    # Some conversions lose generation_config.json, and with it the second of Qwen3's end tokens.
    end_ids = {*_end_ids(config, "config.json"), *_end_ids(generation_config, generation.name)}
    if (end_of_text := tokenizer.id_of("<|endoftext|>")) is not None:
        end_ids.add(end_of_text)
    template = ChatTemplate.from_folder(folder)
    return Words(
        tokenizer,
        template,
        Thinking.of(template, tokenizer),
        generation_config,
        frozenset(end_ids),
        Grammars(tokenizer, frozenset(end_ids)),
    )


def _end_ids(config: Mapping[str, Any], where: str) -> list[int]:
    stated = config.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(type(token) is not int or token < 0 for token in ids):
        raise CheckpointError(f"{where}: eos_token_id is {stated!r}, not one or more token ids")
    return ids
