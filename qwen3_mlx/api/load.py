"""The public function `load`: resolves, checks, fetches and reads a checkpoint into an `LLM`."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Event as Flag

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.api.checkpoints import Checkpoints
from qwen3_mlx.api.cluster import Cluster
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.prompt_cache import open_prompt_cache
from qwen3_mlx.api.text_processor import load_text_processor
from qwen3_mlx.arguments import Progress, plain
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.checkpoint.calibration_text import default_text
from qwen3_mlx.checkpoint.load import LoadOptions
from qwen3_mlx.cluster.hosts import ClusterOptions
from qwen3_mlx.cluster.lead import NOT_LED, LedDisk
from qwen3_mlx.engine.forward import warm_up
from qwen3_mlx.engine.overflow_check import overflows
from qwen3_mlx.engine.speculation.draft_model import DraftModel
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.kind import CHAT
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
    hosts: str | Sequence[str] | None = None,
    split: str = "pipeline",
    layers: str | Sequence[int] | None = None,
    hostfile: str | Path | None = None,
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
        hosts: several machines that hold the model together; default None, this one. A list of
            names for ssh, of which the first is this machine, by its address on the link; "join"
            in the place of a name is a machine where `qwen3 follow` is started by hand. "local:2"
            starts two ranks here, to try it; "env" takes the hosts of mlx.launch. See
            docs/cluster.md.
        split: "pipeline" (default) gives each host whole layers, "tensor" a part of every layer.
        layers: the number of layers of each host, such as [18, 18]; default None, by free memory.
        hostfile: the hosts as a file in the format of mlx.launch, in place of `hosts`.
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
    machines = ClusterOptions(hosts, split, layers, hostfile)
    if machines and adapter is not None:
        raise Qwen3Error(
            "adapters run on one machine: merge it first (qwen3 convert MODEL OUTPUT --adapter "
            "ADAPTER), or load the model without hosts"
        )
    checkpoints = Checkpoints.resolve(
        source, revision, draft, options, kv_bits, context, adapter, download_progress
    )
    if not machines:
        # Refuse what does not fit or cannot run before gigabytes are downloaded.
        checkpoints.check_memory()
    tokenizer = checkpoints.tokenizer()
    backend.refuse_fork()
    cluster = Cluster(machines, checkpoints.target.network) if machines else None
    reader, worker = _Reader(progress, tokenizer, cluster.sharing if cluster else 1), Worker()
    try:
        if cluster:
            checkpoints = cluster.divide(checkpoints, prompt_cache, prompt_cache_gb)
        checkpoints = checkpoints.fetched()
        folder, config = checkpoints.target.folder, checkpoints.target.config
        words = load_text_processor(folder, config, tokenizer)
        if cluster and words.kind.name != CHAT:
            raise Qwen3Error(NOT_LED)
        held_as = checkpoints.target.options
        kind = LedDisk if cluster else DiskPrefixes
        disk = open_prompt_cache(prompt_cache, prompt_cache_gb, checkpoints.target, kind)
        if cluster:
            checkpoints = cluster.connect(checkpoints)
        checkpoints, models = worker.call(partial(reader.read, checkpoints))
        if (target := checkpoints.target).options != held_as:
            disk = open_prompt_cache(prompt_cache, prompt_cache_gb, target, kind)
        if cluster:
            cluster.start(models[0], disk, worker)
        speculator = worker.call(partial(reader.prepare, checkpoints, models))
        return LLM(
            models[0],
            words,
            worker,
            context,
            disk,
            speculator,
            reader.wired,
            cache_format=target.cache,
            cluster=cluster,
        )
    except BaseException:
        reader.abandon()
        if cluster:
            cluster.close(at_once=True)
        worker.stop()
        backend.unwire(reader.wired)
        raise


class _Reader:
    """Reads the weights on the worker thread, until it is abandoned.

    Attributes:
        wired: bytes that were wired, which must be unwired in the end.
    """

    def __init__(self, progress: Progress | None, tokenizer: Tokenizer, sharing: int) -> None:
        """Create it; so many processes of this machine compute together."""
        self.wired = 0
        self._sharing = sharing
        self._progress = progress
        self._tokenizer = tokenizer
        self._abandoned = Flag()

    def read(self, checkpoints: Checkpoints) -> tuple[Checkpoints, list[Qwen3]]:
        """Read the weights of the network, and of the draft model if there is one.

        Return the networks, and the checkpoints as they are held: of a provisional dtype that
        overflows, in bfloat16.
        """
        backend.limit_buffer_cache()
        backend.tune_blas_threads(checkpoints.target.network.hidden_size, self._sharing)
        models = self._read_all(checkpoints)
        if checkpoints.target.options.provisional:
            ids = self._tokenizer.encode(default_text()[:_SAMPLE_CHARACTERS])
            if any(overflows(model, ids) for model in models):
                models.clear()  # before others are read
                mx.clear_cache()
                checkpoints = checkpoints.in_bfloat16()
                models = self._read_all(checkpoints)
        self.wired = sum(model.nbytes for model in models)
        backend.wire(self.wired)
        return checkpoints, models

    def prepare(self, checkpoints: Checkpoints, models: Sequence[Qwen3]) -> Speculator | None:
        """Run the networks once where that takes time; return the speculator if there is one."""
        target, drafting = checkpoints.target, None
        if backend.on_gpu() or target.share:  # a GPU compiles its kernels at first use
            for model in models:
                warm_up(model, target.cache)
        if not checkpoints.speculates:
            return None
        if checkpoints.draft:
            drafting = DraftModel(models[1], target.cache)
        return Speculator(target.network, drafting)

    def _read_all(self, checkpoints: Checkpoints) -> list[Qwen3]:
        both = checkpoints.target, checkpoints.draft
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
