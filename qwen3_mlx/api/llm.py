"""The public API: it composes checkpoint, text and engine, and holds no algorithm of its own."""

import asyncio
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
    Said,
    StartedReply,
    Stream,
    collect,
    with_parsed,
)
from qwen3_mlx.arguments import plain, refuse_unknown, token_ids
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.engine.activity import Activity
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.memory_ledger import Share, release
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.events import Event
from qwen3_mlx.text.fair_queue import PATIENT, Caller
from qwen3_mlx.text.messages import Message, normalise
from qwen3_mlx.text.tokenizer import Prompt
from qwen3_mlx.text.tool_calls import Tool, run_tool, tool_functions

T = TypeVar("T")
_OF_CONVERSATION = ("system", "messages", "file", "drop_oldest")
_LEAST_SHARE = 8  # of the context, one part in so many is a reply's, where turns are dropped


class LLM:
    """A loaded checkpoint to talk to; made by `load`.

    Every method may be called from any thread. Generations run together, a step of all at a time.
    Callbacks (`progress`, say) run on the thread that computes: what they raise ends their request,
    and a call that would wait there for the same LLM, such as `chat`, raises a `Qwen3Error`.
    `context` is the most tokens that a prompt and its reply may have together.
    """

    def __init__(
        self,
        model: Qwen3,
        words: TextProcessor,
        worker: Worker,
        context: int | None = None,
        disk: DiskPrefixes | None = None,
        speculator: Speculator | None = None,
        wired: int = 0,
    ) -> None:
        self.config = model.config
        self.tokenizer = words.tokenizer
        self.thinking = words.thinking
        self._worker = worker
        # A model may be made for fewer ids than its tokenizer knows, but never chooses others.
        vocabulary = min(len(words.tokenizer), self.config.vocab_size)
        engine = Engine(
            model,
            worker,
            vocabulary=vocabulary,
            context=context,
            disk=disk,
            speculator=speculator,
        )
        self.context = engine.context
        self._replies: ReplyGenerator | None = ReplyGenerator(words, engine)
        self._shut = weakref.finalize(self, _shut_down, worker, engine.share, wired)
        self._shut.atexit = False  # at the end of the process the worker sees to itself

    def __repr__(self) -> str:
        if self._replies is None:
            return "<LLM, closed>"
        return f"<LLM {self.model.source}, context {self.context:,}>"

    @property
    def model(self) -> Qwen3:
        """The network; its arrays belong to the worker thread."""
        return self._open().engine.model

    @with_keywords(Options)
    def stream(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Stream:
        """Reply to a user's words or a conversation, as a stream of events; see `Options`.

        Raises:
            TypeError, ValueError: an argument is not what it must be.
            Qwen3Error: the checkpoint cannot do as asked; a ContextError: the prompt does not fit.
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
        """Begin a conversation: with a system prompt, messages so far, or those saved in a file.

        It keeps its history, and uses the time after a reply to prepare for the next
        (`prefetch_next_turn`). With `drop_oldest` it goes on when the context window is full,
        without its oldest turns.
        """
        history = [*messages, *(read_messages(file) if file is not None else [])]
        if system is not None:
            history.insert(0, {"role": "system", "content": system})

        def start(
            messages: Sequence[Message],
            options: Options,
            heard: Callable[[ReplyBuilder], None],
            details: dict[str, str],
        ) -> Stream:
            task = self._open().chat(messages, GenerationOptions.of(options))
            least = self._open().engine.context // _LEAST_SHARE if drop_oldest else 1
            details = task.details | details
            return self._stream(replace(task, details=details, least_room=least), heard)

        GenerationOptions.of(options, *_OF_CONVERSATION)  # what is wrong is told now
        kept: Options = {"prefetch_next_turn": True, **options}
        return Conversation(start, messages=history, options=kept, drop_oldest=drop_oldest)

    @with_keywords(Options)
    def astream(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> AsyncStream:
        """Do as `stream` does, for asyncio; to be called with the event loop running."""
        with self._worker.wait():  # or the loop that runs here would wait for its own thread
            pass
        task = self.prepare(messages, **options)
        loop, cancelled = asyncio.get_running_loop(), Flag()
        events: asyncio.Queue[Said] = asyncio.Queue()

        def deliver(event: Event | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody reads this any more
                cancelled.set()

        return AsyncStream(events, cancelled, self, self.begin(task, deliver, cancelled))

    def prepare(
        self,
        messages: str | Sequence[Message],
        caller: Caller = PATIENT,
        **options: Unpack[Options],
    ) -> PreparedRequest:
        """Lay out a reply, for `begin`: what `stream` would refuse is refused.

        That takes its time where a new grammar is compiled; a `caller` may go away meanwhile.
        """
        return self._open().chat(messages, GenerationOptions.of(options), caller)

    @with_keywords(Options)
    def count_tokens(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> int:
        """Count the tokens of the prompt that `stream` would reply to.

        Raises:
            TypeError, ValueError: an argument is not what it must be.
            ContextError: it has several times the tokens of the context.
        """
        return self._open().count_tokens(messages, GenerationOptions.of(options))

    def prepare_text(
        self,
        prompt: str | Sequence[int],
        caller: Caller = PATIENT,
        *,
        score_prompt: bool = False,
        only_read: bool = False,
        **options: Unpack[Options],
    ) -> PreparedRequest:
        """Lay out the continuation of raw text, or of token ids, for `begin`, as `prepare` does.

        With `score_prompt` the first event is `PromptTokens`, with as many alternatives as the
        option `logprobs` says. With `only_read` there is no continuation.
        """
        words = prompt if isinstance(prompt, str) else token_ids(prompt)
        task = self._open().text(words, GenerationOptions.of(options), caller)
        if only_read:
            task = replace(task, only_read=True, least_room=0)
        return replace(task, score_prompt=score_prompt)

    def load_grammars(self) -> None:
        """Make what the first form of an answer or of calls needs, which takes a second or two."""
        self._open().words.grammars.load()

    def begin(
        self,
        task: PreparedRequest,
        deliver: Callable[[Event | BaseException], None],
        cancelled: Flag,
    ) -> StartedReply:
        """Start what was laid out, below `stream` and `astream`; `cancelled` ends it within a step.

        `deliver` is told the events, the last of which is `Finish`, or the error that ends them; on
        another thread, which it must not hold up.

        Raises:
            ValueError: what is asked for leaves no room for an answer.
            ContextError: the prompt does not fit.
        """
        return self._open().start(task, deliver, cancelled)

    def activity(self) -> Activity:
        """Return what the engine is doing; from any thread, at once, whatever it computes."""
        return self._open().engine.activity()

    def call_soon(self, job: Callable[[], None]) -> None:
        """Have `job` done, without delay, after the step in work; for `deliver` to use.

        An error that it raises is logged.

        Raises:
            Qwen3Error: this LLM is closed.
        """
        self._worker.post(job)

    @with_keywords(Options)
    def chat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Reply:
        """Reply to a user's words or a conversation, and return the reply whole; see `Options`.

        Raises what `stream` does.
        """
        return with_parsed(collect(self.stream(messages, **options)), options.get("schema"))

    @with_keywords(Options)
    def batch(
        self, prompts: Sequence[str | Sequence[Message]], **options: Unpack[Options]
    ) -> list[Reply]:
        """Do as `chat` does for each of the prompts, together, and give the replies in order.

        `seed` is that of each reply. Ctrl-C cancels all; an error in one ends the others, too.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list; chat() takes a single one")
        progress = options.pop("progress", None)
        asked = GenerationOptions.of(options)
        tasks = [self._open().chat(prompt, asked) for prompt in prompts]
        streams: list[Stream] = []
        ended = count(1)

        def tell(_: ReplyBuilder) -> None:
            if progress:
                progress(next(ended), len(tasks))

        try:
            streams += (self._stream(task, tell) for task in tasks)
            return [with_parsed(collect(stream), asked.schema) for stream in streams]
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
        """Do as `chat` does, and call the tools that the model asks for until it answers.

        `tools` must be functions. What goes wrong in one is told to the model. The reply's
        `messages` are all that was said on the way.

        Raises:
            Qwen3Error: the model still calls tools after `max_steps` replies.
        """
        GenerationOptions.of(options, "max_steps")
        functions = tool_functions(options.get("tools"))
        history, said = normalise(messages), list[dict[str, Any]]()
        for _ in range(max_steps):
            reply = self.chat([*history, *said], **options)
            if options.pop("continue_last", False):
                history = history[:-1]  # the reply's message has all of it
            if options.get("tool_choice") != "none":
                options["tool_choice"] = "auto"  # a call that was demanded has been made
            said += reply.messages
            if reply.finish_reason != "tool_calls":
                return replace(reply, messages=said)
            said += [run_tool(call, functions) for call in reply.tool_calls]
        raise Qwen3Error(f"the model still calls tools after {max_steps} replies (max_steps)")

    @with_keywords(TextOptions, loop_guard=False)
    def complete(self, prompt: str, **options: Unpack[TextOptions]) -> Reply:
        """Continue raw text, without a chat template; tags of thinking are text like any other.

        The loop guard is off, unless it is asked for.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, not {type(prompt).__name__}")
        refuse_unknown(options, TextOptions.__annotations__)
        stated: TextOptions = {"loop_guard": False, **options}
        return collect(self._stream(self.prepare_text(prompt, **stated)))

    def logits(self, ids: Sequence[int]) -> mx.array:
        """Give the logits [len(ids), V], float32 and evaluated, that follow each of the ids.

        They are the network's own: with `kv_bits`, too, they are computed through a plain cache. It
        is done a chunk at a time between the steps of what runs.

        Raises:
            TypeError, ValueError: there is no id, or one is no whole number or not in the
                vocabulary.
            Qwen3Error: the memory that is free does not suffice; the message shows the sum. A
                ContextError: there are more ids than the context has.
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
        """Run `job` with the network, on the thread that owns it, and give its result, evaluated.

        The result is an array, or a tuple, list or dictionary of arrays. Arrays that `job` brings
        along must be evaluated: a lazy one belongs to the thread that made it.
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
        """Write the prompt for a conversation with the checkpoint's own template, as it is sent.

        The names of control tokens in messages are text: `tokenizer.encode` of what is returned, a
        string that remembers them, makes control tokens of those alone that the template wrote.
        With `continue_last` it ends where the last message does.

        Raises:
            ValueError: the last message cannot be continued.
            Qwen3Error: there is no template, it refuses, or `thinking` cannot be had.
        """
        return render(
            self._open().words,
            messages,
            plain(thinking),
            tools,
            add_generation_prompt,
            plain(continue_last),
        )

    def forget(self) -> None:
        """Free the memory of earlier prompts, which is kept for what may go on from them."""
        self._worker.call(self._open().engine.forget)

    def close(self) -> None:
        """Cancel what runs, end the worker thread and free the memory; may be called twice."""
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
        self, task: PreparedRequest, heard: Callable[[ReplyBuilder], None] | None = None
    ) -> Stream:
        """Start a reply; `heard` is told all that was said, before `Finish` or an error is."""
        events: SimpleQueue[Said] = SimpleQueue()
        cancelled = Flag()
        started = self._open().start(task, events.put, cancelled, heard)
        return Stream(events, cancelled, self, started, wait=self._worker.wait)


def _shut_down(worker: Worker, share: Share, wired: int) -> None:
    if worker.left_behind:  # with all threads of MLX, for which `unwire` would wait
        return
    worker.stop()
    release(share)
    backend.unwire(wired)
