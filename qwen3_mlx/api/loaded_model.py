"""A loaded checkpoint with its engine and its worker thread: the base of `LLM`.

It prepares requests, submits them, and computes; servers use it without the verbs of `LLM`.
"""

import weakref
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from queue import SimpleQueue
from threading import Event as Flag
from typing import Self, TypeVar, Unpack

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.api.cluster import Cluster
from qwen3_mlx.api.embedding import prepare_embedding
from qwen3_mlx.api.options import GenerationOptions, Options, with_keywords
from qwen3_mlx.api.prepared_request import PreparedRequest
from qwen3_mlx.api.prepared_texts import PreparedTexts
from qwen3_mlx.api.reply_generator import ReplyGenerator
from qwen3_mlx.api.reranking import prepare_rerank
from qwen3_mlx.api.stream import ReplyBuilder, StartedReply, Stream, StreamItem
from qwen3_mlx.api.text_processor import TextProcessor
from qwen3_mlx.arguments import Progress, token_ids
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat
from qwen3_mlx.engine.activity import Activity
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.memory_ledger import Share, release
from qwen3_mlx.engine.request import Scores
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import ClusterError, Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.events import Event
from qwen3_mlx.text.fair_queue import LOCAL_CALLER, Caller
from qwen3_mlx.text.messages import Message

T = TypeVar("T")


class LoadedModel:
    """A checkpoint in memory, and the engine that serves it; `LLM` describes its attributes."""

    def __init__(  # noqa: PLR0913 - all that `load` has made
        self,
        model: Qwen3,
        processor: TextProcessor,
        worker: Worker,
        context: int | None = None,
        disk: DiskPrefixes | None = None,
        speculator: Speculator | None = None,
        wired: int = 0,
        *,
        cache_format: CacheFormat = PLAIN,
        cluster: Cluster | None = None,
    ) -> None:
        self.config = cluster.network if cluster else model.config
        self.cluster = cluster
        self.cache_format = cache_format
        self.tokenizer = processor.tokenizer
        self.thinking = processor.thinking
        self.prefix_id = processor.prefix_id
        self.kind = processor.kind.name
        self._worker = worker
        self._shared: LoadedModel | None = None
        # A network may have fewer rows than the tokenizer has ids, or more, as padding: only ids
        # that both know may be sampled.
        vocabulary = min(len(processor.tokenizer), self.config.vocab_size)
        available: int | None = None
        if cluster:
            available, context = cluster.limits(context)
        engine = Engine(
            model,
            worker,
            vocabulary=vocabulary,
            cache_format=cache_format,
            available=available,
            context=context,
            disk=disk,
            speculator=speculator,
        )
        if cluster:
            cluster.guard(worker, engine)
        self.context = engine.context
        self.adapters = model.adapters
        self._replies: ReplyGenerator | None = ReplyGenerator(processor, engine)
        self._shut = weakref.finalize(self, _shut_down, worker, engine.share, wired, cluster)
        self._shut.atexit = False  # at exit the worker thread stops by itself

    def __repr__(self) -> str:
        if self._replies is None:
            return "<LLM, closed>"
        return f"<LLM {self.model.source}, context {self.context:,}>"

    def with_adapter(self, name: str | None) -> Self:
        """Return this LLM with one of its `adapters`, or with None without any.

        It shares everything with this one: requests with different adapters run in one batch.
        Closing either closes both.

        Raises:
            ValueError: there is no such adapter.
        """
        if name is not None and name not in self.adapters:
            there = ", ".join(self.adapters) or "none"
            raise ValueError(f"there is no adapter {name!r}; there is {there}")
        replies, view = self._open(), copy(self)
        number = None if name is None else self.adapters.index(name)
        view._replies = ReplyGenerator(replies.processor, replies.engine, number)
        view._shared = self  # which would close the model if it were freed
        return view

    @property
    def model(self) -> Qwen3:
        """The network; its arrays belong to the worker thread, see `compute`."""
        return self._open().engine.model

    @property
    def processor(self) -> TextProcessor:
        """The text side of the checkpoint: tokenizer, chat template, end tokens."""
        return self._open().processor

    def prepare(
        self,
        messages: str | Sequence[Message],
        caller: Caller = LOCAL_CALLER,
        *,
        clamp_max_tokens: bool = False,
        **options: Unpack[Options],
    ) -> PreparedRequest:
        """Prepare a request for `submit`: validate, render, encode and compile grammars.

        Takes the arguments of `stream` and raises its errors. Compiling a new grammar takes time;
        `caller` may cancel the request meanwhile. With `clamp_max_tokens` a `max_tokens` that the
        context window has no room for is reduced instead of refused.
        """
        validated = GenerationOptions.of(options)
        return self._open().chat(messages, validated, caller, clamp_max_tokens=clamp_max_tokens)

    def prepare_text(
        self,
        prompt: str | Sequence[int],
        caller: Caller = LOCAL_CALLER,
        *,
        clamp_max_tokens: bool = False,
        score_prompt: bool = False,
        prefill_only: bool = False,
        **options: Unpack[Options],
    ) -> PreparedRequest:
        """Prepare the continuation of raw text or of token ids for `submit`; see `prepare`.

        With `score_prompt` the first event is `PromptTokens`: the log probabilities of the prompt's
        own tokens, each with `logprobs` alternatives. With `prefill_only` the prompt is prefilled
        and no token generated.
        """
        return self._open().text(
            prompt if isinstance(prompt, str) else token_ids(prompt),
            GenerationOptions.of(options),
            caller,
            clamp_max_tokens=clamp_max_tokens,
            score_prompt=score_prompt,
            prefill_only=prefill_only,
        )

    @with_keywords(Options)
    def count_tokens(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> int:
        """Return the number of tokens of the prompt that `stream` would render.

        Takes the arguments of `stream`. The prompt may be longer than the context window.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of its range.
            ContextError: the prompt has more than twice the tokens of the context window.
        """
        return self._open().count_tokens(messages, GenerationOptions.of(options))

    def load_grammars(self) -> None:
        """Load the grammar compiler ahead of the first constrained reply; takes 1 to 2 s."""
        self._open().processor.grammars.load()

    def submit(
        self,
        prepared: PreparedRequest,
        deliver: Callable[[Event | BaseException], None],
        cancelled: Flag,
    ) -> StartedReply:
        """Submit a prepared request; `stream` and `astream` are built on this.

        `deliver` is called with each event, the last of which is `Finish`, or with the error that
        ends the reply. It runs on the worker thread and must not block. Setting `cancelled` ends
        the generation within a step.
        """
        return self._open().start(prepared, deliver, cancelled)

    @property
    def failure(self) -> ClusterError | None:
        """Why a machine that computes has failed; None while all work, and on one machine."""
        return self.cluster.failure if self.cluster else None

    def on_failure(self, call: Callable[[ClusterError], None]) -> None:
        """Call `call(error)`, on another thread, if a machine that computes fails.

        All requests end with the error then, and the model must be loaded again. On one machine it
        is never called.
        """
        if self.cluster:
            self.cluster.crew.on_failure(call)

    def activity(self) -> Activity:
        """Return what the engine is doing, without waiting for the step that runs."""
        return self._replies_if_open().engine.activity()

    def call_soon(self, job: Callable[[], None]) -> None:
        """Schedule `job` to run after the current step, and return at once; for use in `deliver`.

        An exception raised by `job` is logged.

        Raises:
            Qwen3Error: this LLM is closed.
        """
        self._worker.post(job)

    def compute(self, job: Callable[[Qwen3], T]) -> T:
        """Run `job(model)` on the worker thread and return its result, evaluated.

        The result is an array, or a tuple, list or dictionary of arrays. Arrays that `job` closes
        over must be evaluated: a lazy array can only be evaluated on the thread that created it.

        Raises:
            Qwen3Error: several machines hold the model together.
        """
        replies = self._open()
        if self.cluster:
            raise Qwen3Error(
                "evaluating, tuning and computing with the network itself need it on one machine: "
                "load the model without hosts"
            )
        model = replies.engine.model

        def run() -> T:
            with model.selection.choosing([replies.adapter]):
                result = job(model)
            mx.eval(result)
            return result

        return self._worker.call(run)

    def logits(self, ids: Sequence[int]) -> mx.array:
        """Return the logits [len(ids), V] after each of the ids, float32 and evaluated.

        They are the network's own, before bias, penalties, temperature and masks. A plain KV cache
        is used, with `kv_bits` as well. The ids are processed chunk by chunk between the steps of
        running requests.

        Raises:
            TypeError, ValueError: there are no ids, or one is not a whole number or not in the
                vocabulary.
            ContextError: there are more ids than the context window has.
            Qwen3Error: free memory does not suffice; the message shows the sum.
        """
        rows = self.config.vocab_size
        tokens = token_ids(ids.tolist() if isinstance(ids, mx.array) else ids)
        if not tokens or any(not 0 <= token < rows for token in tokens):
            raise ValueError(f"ids must be one or more numbers from 0 to {rows - 1}")
        replies, call = self._open(), self._worker.call
        engine = replies.engine
        logits = call(partial(engine.logits, tokens, replies.adapter))
        while call(partial(engine.advance_job, logits)):
            pass
        return logits.values

    def score(self, ids: Sequence[int], start: int = 1, cancelled: Flag | None = None) -> Scores:
        """Return the log probabilities of the ids from `start` on, each after all ids before it.

        They are in nats, those of the network itself, each with the likeliest token in its place.
        Only some rows of logits are in memory at a time. Requests of several threads are batched,
        and run beside replies. A context of 16 or more tokens that an earlier prompt began with is
        not computed again. Setting `cancelled` ends the request within a step.

        Raises:
            TypeError, ValueError: `start` is not from 1 to len(ids) - 1, or an id is not a whole
                number or not in the vocabulary.
            ContextError: all ids but the last are more than the context window has.
            Qwen3Error: the request was cancelled, or the weights are damaged.
        """
        replies = self._open()
        tokens = replies.window.encode(token_ids(ids))
        if not 1 <= start < len(tokens):
            raise ValueError(
                f"start must be at least 1 and less than the number of ids, {len(tokens):,}, "
                f"not {start}"
            )
        replies.window.room(len(tokens) - 1, 0, 0)
        outcomes: SimpleQueue[Scores | BaseException] = SimpleQueue()
        with self._worker.wait():
            replies.engine.score(tokens, start, outcomes.put, cancelled or Flag(), replies.adapter)
            outcome = outcomes.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def prepare_embedding(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        pooling: str | None = None,
        truncate: bool = False,
    ) -> PreparedTexts:
        """Check and encode texts for `compute_texts`; takes the arguments of `embed`."""
        replies = self._open()
        return prepare_embedding(
            replies.processor,
            replies.engine,
            texts,
            instruction=instruction,
            prompt_name=prompt_name,
            dimensions=dimensions,
            pooling=pooling,
            truncate=truncate,
        )

    def prepare_rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        scoring: str | None = None,
    ) -> PreparedTexts:
        """Check and encode a query and documents for `compute_texts`; see `rerank`."""
        replies = self._open()
        return prepare_rerank(
            replies.processor,
            replies.engine,
            query,
            documents,
            instruction=instruction,
            scoring=scoring,
        )

    def compute_texts(self, prepared: PreparedTexts, progress: Progress | None = None) -> mx.array:
        """Return the results [N, F] of N prepared texts, float32 and evaluated.

        The texts are read chunk by chunk between the steps of running requests. `progress` is
        called with (done, total) tokens, here between two chunks; what it raises ends the work.
        """
        if not prepared.texts:
            return mx.zeros((0, prepared.width))
        replies, call = self._open(), self._worker.call
        engine, shared, texts = replies.engine, prepared.shared, prepared.texts
        job = call(partial(engine.last_states, shared, texts, prepared.finish, replies.adapter))
        total = prepared.num_read
        while call(partial(engine.advance_job, job)):
            if progress:
                progress(job.num_done, total)
        if progress:
            progress(total, total)
        return call(job.values)

    def forget(self) -> None:
        """Clear the prefix cache: free the KV caches that are kept from earlier prompts."""
        self._worker.call(self._open().engine.forget)

    def close(self) -> None:
        """Cancel running requests, stop the worker thread, free the memory; may be called twice."""
        self._shut()
        self._replies = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> ReplyGenerator:
        replies = self._replies_if_open()
        if self.failure:
            raise self.failure
        return replies

    def _replies_if_open(self) -> ReplyGenerator:
        if self._replies is None:
            raise Qwen3Error("this LLM is closed; load it again")
        return self._replies

    def _stream(
        self, prepared: PreparedRequest, on_end: Callable[[ReplyBuilder], None] | None = None
    ) -> Stream:
        """Start a reply; `on_end` gets the collected reply before `Finish` or an error is sent."""
        events: SimpleQueue[StreamItem] = SimpleQueue()
        cancelled = Flag()
        started = self._open().start(prepared, events.put, cancelled, on_end)
        return Stream(events, cancelled, self, started, wait=self._worker.wait)


def _shut_down(worker: Worker, share: Share, wired: int, cluster: Cluster | None) -> None:
    # In a forked process the worker's and MLX's threads are missing: `unwire` would wait for them.
    if worker.forked:
        return
    worker.stop()
    release(share)
    if cluster:
        cluster.close()
    if not (cluster and cluster.failure):  # a device that hangs would be waited for
        backend.unwire(wired)
