"""The public function `load`: resolves, checks, fetches and reads a checkpoint into an `LLM`."""

from collections.abc import Mapping
from pathlib import Path
from threading import Event as Flag

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.api.checkpoints import Checkpoints, ResolvedCheckpoint
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.text_processor import load_text_processor
from qwen3_mlx.arguments import Progress, plain
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.checkpoint.calibration_text import default_text
from qwen3_mlx.checkpoint.fingerprint import fingerprint
from qwen3_mlx.checkpoint.load import LoadOptions
from qwen3_mlx.engine.forward import warm_up
from qwen3_mlx.engine.overflow_check import overflows
from qwen3_mlx.engine.speculation.draft_model import DraftModel
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.tokenizer import Tokenizer

_MAX_PROMPT_CACHE_GB = 1e9
_SAMPLE_CHARACTERS = 4096  # of the text on which float16 is tried, about 1,000 tokens


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
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    prompt_cache: str | Path | None = None,
    prompt_cache_gb: float = 8,
    progress: Progress | None = None,
    download_progress: Progress | None = None,
) -> LLM:
    """Load a checkpoint and return an `LLM`.

    Args:
        source: the checkpoint: a folder in the published or in MLX's format; a hub name such as
            "Qwen/Qwen3-8B"; or a size such as "8B" or "30b-a3b", which stands for the 4-bit
            checkpoint on the hub, Qwen/Qwen3-8B-MLX-4bit. Default None, the embedded demo, which is
            "demo" as well. A folder that is called so is "./8B", "./demo" or a Path.
        revision: branch, tag or commit on the hub; default None, the main branch.
        bits: quantize the weights while loading, to 2, 3, 4, 5, 6 or 8 bits; default None, which
            keeps them as stored. A checkpoint on the hub is downloaded whole for that: 16 GB for
            Qwen/Qwen3-8B.
        group_size: number of weights that share a scale when `bits` is given: 32, 64 (default) or
            128.
        dtype: "bfloat16", "float16" or "float32", for computation and for weights that are not
            quantized; default None, which is bfloat16 on a GPU and float32 on a CPU. "auto" is the
            same, but for the chips M1 and M2, which compute float16 faster: there it is float16 if
            no layer comes near the end of its range on a sample text, and otherwise bfloat16.
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
        adapter: a fine-tuned adapter for this checkpoint (LoRA, DoRA or whole tensors): a folder of
            mlx-lm's or PEFT's, or a hub name; default None. Quantized weights stay as they are, and
            the adapter is computed beside them. Or several by name: `LLM.with_adapter` then chooses
            one.
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
    _check(context, dequantize, prompt_cache_gb)
    options = LoadOptions.of(bits, dtype, dequantize, group_size)
    checkpoints = Checkpoints.resolve(
        source, revision, draft, options, kv_bits, context, adapter, download_progress
    )
    # Refuse what does not fit or cannot run before gigabytes are downloaded.
    checkpoints.check_memory()
    tokenizer = checkpoints.tokenizer()
    backend.refuse_fork()
    checkpoints = checkpoints.fetched()
    disk = _open_disk(prompt_cache, prompt_cache_gb, checkpoints.target)
    reader, worker = _Reader(checkpoints, progress, tokenizer), Worker()
    try:
        model, speculator = worker.call(reader.read)
        if (target := reader.checkpoints.target) is not checkpoints.target:
            disk = _open_disk(prompt_cache, prompt_cache_gb, target)
        words = load_text_processor(target.folder, target.config, tokenizer)
        cache, wired = target.cache, reader.wired
        return LLM(model, words, worker, context, disk, speculator, wired, cache_format=cache)
    except BaseException:
        reader.abandon()
        worker.stop()
        backend.unwire(reader.wired)
        raise


class _Reader:
    """Reads the weights on the worker thread, until it is abandoned.

    Attributes:
        checkpoints: what is read; the dtype may be another after reading.
        wired: bytes that were wired, which must be unwired in the end.
    """

    def __init__(
        self, checkpoints: Checkpoints, progress: Progress | None, tokenizer: Tokenizer
    ) -> None:
        self.wired = 0
        self.checkpoints = checkpoints
        self._progress = progress
        self._tokenizer = tokenizer
        self._abandoned = Flag()

    def read(self) -> tuple[Qwen3, Speculator | None]:
        """Read the weights; return the network, and the speculator if there is speculation."""
        backend.limit_buffer_cache()
        backend.tune_blas_threads(self.checkpoints.target.network.hidden_size)
        models = self._read_all()
        if self.checkpoints.target.options.provisional:
            ids = self._tokenizer.encode(default_text()[:_SAMPLE_CHARACTERS])
            if any(overflows(model, ids) for model in models):
                models.clear()  # before others are read
                mx.clear_cache()
                self.checkpoints = self.checkpoints.in_bfloat16()
                models = self._read_all()
        target, small = self.checkpoints.target, self.checkpoints.draft
        self.wired = sum(model.nbytes for model in models)
        backend.wire(self.wired)
        if backend.on_gpu():  # a GPU compiles its kernels at first use
            for model in models:
                warm_up(model, target.cache)
        if not self.checkpoints.speculates:
            return models[0], None
        drafting = DraftModel(models[1], target.cache) if small else None
        return models[0], Speculator(target.network, drafting)

    def _read_all(self) -> list[Qwen3]:
        both = self.checkpoints.target, self.checkpoints.draft
        return [found.read(self._follow) for found in both if found]

    def abandon(self) -> None:
        """End the reading after the current module."""
        self._abandoned.set()

    def _follow(self, done: int, total: int) -> None:
        if self._abandoned.is_set():
            raise Qwen3Error("loading was interrupted")
        if self._progress:
            self._progress(done, total)


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
    place: str | Path | None, max_gb: float, target: ResolvedCheckpoint
) -> DiskPrefixes | None:
    if place is None:
        return None
    held_as = (target.options, target.cache, backend.on_gpu())
    adapter = target.adapter.files if target.adapter else []
    try:
        # Caches are valid for the same weights only.
        key = fingerprint(target.folder, target.config, held_as, adapter)
        return DiskPrefixes(Path(place), key, limit=int(max_gb * 1e9))
    except FileExistsError as error:
        raise Qwen3Error(f"prompt_cache: {place} is a file; name a folder") from error
    except OSError as error:
        raise Qwen3Error(
            f"prompt_cache: {place} cannot be used: {error.strerror or error}; name another folder"
        ) from error
