"""The public class `LLM`: a loaded checkpoint that generates replies.

It composes checkpoint, text and engine, and holds no algorithm of its own.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from typing import Any, Self, TypeVar, Unpack

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.api.conversation import Conversation, read_messages
from qwen3_mlx.api.generation import PreparedRequest, ReplyGenerator
from qwen3_mlx.api.options import GenerationOptions, Options, TextOptions, with_keywords
from qwen3_mlx.api.prompts import TextProcessor, render
from qwen3_mlx.api.stream import (
    AsyncStream,
    Reply,
    ReplyBuilder,
    StartedReply,
    Stream,
    StreamItem,
    collect,
    with_parsed,
)
from qwen3_mlx.arguments import plain, refuse_unknown, token_ids
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat
from qwen3_mlx.engine.activity import Activity
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.memory_ledger import Share, release
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.events import Event
from qwen3_mlx.text.fair_queue import LOCAL_CALLER, Caller
from qwen3_mlx.text.messages import Message, normalise
from qwen3_mlx.text.tokenizer import Prompt
from qwen3_mlx.text.tool_calls import Tool, run_tool, tool_functions

T = TypeVar("T")
_CONVERSATION_KEYWORDS = ("system", "messages", "file", "drop_oldest")
# Where the oldest turns are dropped, a reply has room for at least this fraction of the context.
_MIN_REPLY_SHARE = 1 / 8


class LLM:
    """A loaded checkpoint that generates replies; created by `load`.

    Every method may be called from any thread. Requests are batched: each step of the engine
    advances all of them by one token. Use the LLM as a context manager, or call `close`.

    Callbacks such as `progress` run on the worker thread, which computes. An exception raised in a
    callback ends its request. A blocking call on the same LLM, such as `chat`, raises a
    `Qwen3Error` there instead of waiting for itself.

    Attributes:
        config: the shape of the network, a `ModelConfig`.
        tokenizer: encodes text to token ids and decodes them.
        thinking: which modes the checkpoint has (thinking, direct or both), a `Thinking`.
        context: the context window in tokens: the most that a prompt and its reply have together.
        cache_format: the format of the KV caches, a `CacheFormat`.
        model: the network; its arrays belong to the worker thread, see `compute`.
    """

    def __init__(
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
    ) -> None:
        self.config = model.config
        self.cache_format = cache_format
        self.tokenizer = processor.tokenizer
        self.thinking = processor.thinking
        self._worker = worker
        # A network may have fewer rows than the tokenizer has ids, or more, as padding: only ids
        # that both know may be sampled.
        vocabulary = min(len(processor.tokenizer), self.config.vocab_size)
        engine = Engine(
            model,
            worker,
            vocabulary=vocabulary,
            cache_format=cache_format,
            context=context,
            disk=disk,
            speculator=speculator,
        )
        self.context = engine.context
        self._replies: ReplyGenerator | None = ReplyGenerator(processor, engine)
        self._shut = weakref.finalize(self, _shut_down, worker, engine.share, wired)
        self._shut.atexit = False  # at exit the worker thread stops by itself

    def __repr__(self) -> str:
        if self._replies is None:
            return "<LLM, closed>"
        return f"<LLM {self.model.source}, context {self.context:,}>"

    @property
    def model(self) -> Qwen3:
        """The network; its arrays belong to the worker thread, see `compute`."""
        return self._open().engine.model

    @with_keywords(Options)
    def stream(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Stream:
        """Start a reply and return the stream of its events.

        Args:
            messages: the user's text, or a conversation: a sequence of dicts with `role` ("system",
                "user", "assistant" or "tool") and `content`, as in OpenAI's API.
            **options: see `Options`.

        Returns:
            A `Stream`: an iterator over `Reasoning`, `Text`, `ToolCallDelta` and `ToolCall` events;
            `Finish` is the last. Closing the stream ends the generation.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of its range.
            ContextError: prompt and reply do not fit the context window.
            Qwen3Error: the checkpoint cannot honour an option, or this LLM is closed.
        """
        return self._stream(self._open().chat(messages, GenerationOptions.of(options)))

    @with_keywords(Options, prefetch_next_turn=True)
    def conversation(
        self,
        *,
        system: str | None = None,
        messages: Sequence[Message] = (),
        file: str | Path | None = None,
        drop_oldest: bool = False,
        **options: Unpack[Options],
    ) -> Conversation:
        """Create a conversation, which keeps its own history.

        Args:
            system: text of a system message, placed first; default None.
            messages: the messages so far; default none.
            file: a file that `Conversation.save` wrote; its messages follow `messages`.
            drop_oldest: when the context window is full, True drops the oldest turns;
                False (the default) raises a `ContextError`.
            **options: defaults of every reply; see `Options`. `prefetch_next_turn` is on: idle time
                after a reply is used to prefill the next turn.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of its range.
            Qwen3Error: the file is missing or is not a saved conversation.
        """
        history = [*messages, *(read_messages(file) if file is not None else [])]
        if system is not None:
            history.insert(0, {"role": "system", "content": system})

        def start(
            messages: Sequence[Message],
            options: Options,
            on_end: Callable[[ReplyBuilder], None],
            details: dict[str, str],
        ) -> Stream:
            min_room = int(self.context * _MIN_REPLY_SHARE) if drop_oldest else 1
            prepared = self._open().chat(messages, GenerationOptions.of(options), min_room=min_room)
            return self._stream(replace(prepared, details=prepared.details | details), on_end)

        GenerationOptions.of(options, *_CONVERSATION_KEYWORDS)  # fail before the first reply
        defaults: Options = {"prefetch_next_turn": True, **options}
        return Conversation(start, messages=history, options=defaults, drop_oldest=drop_oldest)

    @with_keywords(Options)
    def astream(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> AsyncStream:
        """Start a reply and return its events as an asynchronous stream.

        Takes the arguments of `stream`. Must be called while an asyncio event loop runs. Cancelling
        the task that reads the stream ends the generation.

        Raises:
            RuntimeError: no event loop is running.
            The errors of `stream`.
        """
        # Raises if this is the worker thread: an event loop there would wait for its own thread.
        with self._worker.wait():
            pass
        return AsyncStream.of(partial(self.submit, self.prepare(messages, **options)), self)

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

    @with_keywords(Options)
    def count_tokens(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> int:
        """Return the number of tokens of the prompt that `stream` would render.

        Takes the arguments of `stream`. The prompt may be longer than the context window.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of its range.
            ContextError: the prompt has more than twice the tokens of the context window.
        """
        return self._open().count_tokens(messages, GenerationOptions.of(options))

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

    def activity(self) -> Activity:
        """Return what the engine is doing, without waiting for the step that runs."""
        return self._open().engine.activity()

    def call_soon(self, job: Callable[[], None]) -> None:
        """Schedule `job` to run after the current step, and return at once; for use in `deliver`.

        An exception raised by `job` is logged.

        Raises:
            Qwen3Error: this LLM is closed.
        """
        self._worker.post(job)

    @with_keywords(Options)
    def chat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Reply:
        """Generate a reply and return it as a whole.

        Args:
            messages: the user's text, or a conversation: a sequence of dicts with `role` ("system",
                "user", "assistant" or "tool") and `content`, as in OpenAI's API.
            **options: see `Options`.

        Returns:
            A `Reply`: `text`, `reasoning`, `tool_calls`, `finish_reason`, `usage` and more; with
            `schema`, the answer as data in `parsed`.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of its range.
            ContextError: prompt and reply do not fit the context window.
            Qwen3Error: the checkpoint cannot honour an option, or this LLM is closed.
        """
        return with_parsed(collect(self.stream(messages, **options)), options.get("schema"))

    @with_keywords(Options)
    def batch(
        self, prompts: Sequence[str | Sequence[Message]], **options: Unpack[Options]
    ) -> list[Reply]:
        """Generate replies to several prompts in one batch and return them in order.

        Args:
            prompts: texts or conversations, each as in `chat`.
            **options: of every reply; see `Options`. Each reply uses the same `seed`. `progress` is
                called with (done, total) replies.

        Ctrl-C cancels all replies. An error in one ends the others as well.

        Raises:
            TypeError: `prompts` is a single string.
            The errors of `chat`.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list; chat() takes a single one")
        progress = options.pop("progress", None)
        validated = GenerationOptions.of(options)
        prepared = [self._open().chat(prompt, validated) for prompt in prompts]
        streams: list[Stream] = []
        ended = count(1)

        def on_end(_: ReplyBuilder) -> None:
            if progress:
                progress(next(ended), len(prepared))

        try:
            # Appended one by one, so that an error while starting closes those that have started.
            streams += (self._stream(request, on_end) for request in prepared)
            return [with_parsed(collect(stream), validated.schema) for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    @with_keywords(Options)
    def run(
        self,
        messages: str | Sequence[Message],
        *,
        max_steps: int = 8,
        **options: Unpack[Options],
    ) -> Reply:
        """Generate replies, calling the tools that the model requests, until it answers.

        Args:
            messages: the user's text or a conversation, as in `chat`.
            max_steps: the most replies, the last included; default 8.
            **options: see `Options`. `tools` must be Python functions. A demanded call
                (`tool_choice`) is demanded of the first reply only.

        An exception raised by a tool is passed to the model as the result of the call.

        Returns:
            The last `Reply`; its `messages` are all replies and tool results of this run.

        Raises:
            Qwen3Error: the model still calls tools after `max_steps` replies.
            The errors of `chat`.
        """
        GenerationOptions.of(options, "max_steps")
        functions = tool_functions(options.get("tools"))
        history, added = normalise(messages), list[dict[str, Any]]()
        for _ in range(max_steps):
            reply = self.chat([*history, *added], **options)
            if options.pop("continue_last", False):
                history = history[:-1]  # the reply's message includes the continued one
            if options.get("tool_choice") != "none":
                options["tool_choice"] = "auto"  # the demanded call has been made
            added += reply.messages
            if reply.finish_reason != "tool_calls":
                return replace(reply, messages=added)
            added += [run_tool(call, functions) for call in reply.tool_calls]
        raise Qwen3Error(f"the model still calls tools after {max_steps} replies (max_steps)")

    @with_keywords(TextOptions, loop_guard=False)
    def complete(self, prompt: str, **options: Unpack[TextOptions]) -> Reply:
        """Continue raw text, without a chat template.

        Args:
            prompt: the text to continue. Names of control tokens in it become control tokens.
            **options: see `TextOptions`. `loop_guard` is off by default.

        Returns:
            A `Reply` whose `text` is the continuation; thinking tags are part of the text.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of its range.
            ContextError: prompt and reply do not fit the context window.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, not {type(prompt).__name__}")
        refuse_unknown(options, TextOptions.__annotations__)
        merged: TextOptions = {"loop_guard": False, **options}
        return collect(self._stream(self.prepare_text(prompt, **merged)))

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
        engine, call = self._open().engine, self._worker.call
        logits = call(partial(engine.logits, tokens))
        while call(partial(engine.read_on, logits)):
            pass
        return logits.values

    def compute(self, job: Callable[[Qwen3], T]) -> T:
        """Run `job(model)` on the worker thread and return its result, evaluated.

        The result is an array, or a tuple, list or dictionary of arrays. Arrays that `job` closes
        over must be evaluated: a lazy array can only be evaluated on the thread that created it.
        """
        model = self._open().engine.model

        def run() -> T:
            result = job(model)
            mx.eval(result)
            return result

        return self._worker.call(run)

    def render(
        self,
        messages: str | Sequence[Message],
        thinking: bool | None = None,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
    ) -> Prompt:
        """Return the prompt of a conversation, rendered by the checkpoint's chat template.

        Args:
            messages: the user's text or a conversation, as in `chat`.
            thinking: as in `Options`; default None.
            tools: functions or descriptions that the template presents to the model; default None.
            add_generation_prompt: end with the start of the assistant's turn; default True.
            continue_last: end where the last message ends, for a reply that continues it; default
                False.

        Returns:
            A `Prompt`, a string that remembers which control tokens the template wrote. Names of
            control tokens in messages stay text: `tokenizer.encode` of the prompt makes control
            tokens only of those that the template wrote.

        Raises:
            ValueError: the last message cannot be continued.
            Qwen3Error: there is no template, it refuses the messages, or the checkpoint does not
                have the `thinking` mode.
        """
        return render(
            self._open().processor,
            messages,
            plain(thinking),
            tools,
            add_generation_prompt,
            plain(continue_last),
        )

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


def _shut_down(worker: Worker, share: Share, wired: int) -> None:
    # In a forked process the worker's and MLX's threads are missing: `unwire` would wait for them.
    if worker.forked:
        return
    worker.stop()
    release(share)
    backend.unwire(wired)
