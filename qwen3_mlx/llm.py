"""The public API: it composes checkpoint, text and engine, and holds no algorithm of its own."""

import asyncio
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Event as Flag
from typing import Any, Self, TypeVar, Unpack

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.asking import Asked, Options, Progress
from qwen3_mlx.checkpoint.files import read_json
from qwen3_mlx.checkpoint.hub import DESCRIPTION_FILES, Source
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.quantization import Format, formats_stored
from qwen3_mlx.checkpoint.weights import Weights, weight_names
from qwen3_mlx.conversation import Conversation, read_messages
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.params import (
    SamplingParams,
    sampling_defaults,
)
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.fit import refuse_what_cannot_fit
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.published import stretched
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.replies import Replies, Task, Words
from qwen3_mlx.streams import (
    AsyncStream,
    Collected,
    Reply,
    Said,
    Started,
    Stream,
    collect,
    with_parsed,
)
from qwen3_mlx.text.events import Event
from qwen3_mlx.text.grammar import Grammars
from qwen3_mlx.text.messages import Message, normalise
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tools import Tool, answer, functions_of

T = TypeVar("T")
_LEAST_SHARE = 8  # of the context, one part in so many is a reply's, where turns are dropped


class LLM:
    """A loaded checkpoint to talk to; made by `load`.

    Every method may be called from any thread. Generations run together, a step of all at a time.
    `context` is the most tokens that a prompt and its reply may have together.
    """

    def __init__(
        self, model: Qwen3, words: Words, worker: Worker, context: int | None = None
    ) -> None:
        self.config = model.config
        self.tokenizer = words.tokenizer
        self.thinking = words.thinking
        self._worker = worker
        # A model may be made for fewer ids than its tokenizer knows, but never chooses others.
        vocabulary = min(len(words.tokenizer), self.config.vocab_size)
        engine = Engine(model, worker, vocabulary=vocabulary, context=context)
        self.context = engine.context
        self._replies: Replies | None = Replies(words, engine)
        self._shut = weakref.finalize(self, _shut_down, worker)

    @property
    def model(self) -> Qwen3:
        """The network; its arrays belong to the worker thread."""
        return self._open().engine.model

    def stream(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Stream:
        """Reply to a user's words or a conversation, as a stream of events; see `Options`.

        Raises:
            TypeError, ValueError: an argument is not what it must be.
            Qwen3Error: the checkpoint cannot do as asked; a ContextError: the prompt does not fit.
        """
        return self._stream(self._open().chat(messages, Asked(**options)))

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

        It keeps its history, and uses the time after a reply to prepare for the next (`idle`). With
        `drop_oldest` it goes on when the context window is full, without its oldest turns.
        """
        history = [*messages, *(read_messages(file) if file is not None else [])]
        if system is not None:
            history.insert(0, {"role": "system", "content": system})

        def start(
            messages: Sequence[Message],
            options: Options,
            heard: Callable[[Collected], None],
            details: dict[str, str],
        ) -> Stream:
            task = self._open().chat(messages, Asked(**options))
            least = self._open().engine.context // _LEAST_SHARE if drop_oldest else 1
            return self._stream(replace(task, details=details, least_room=least), heard)

        Asked(**options)  # what is wrong is told now
        kept: Options = {"idle": True, **options}
        return Conversation(start, messages=history, options=kept, drop_oldest=drop_oldest)

    def astream(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> AsyncStream:
        """Do as `stream` does, for asyncio; to be called with the event loop running."""
        task = self.prepare(messages, **options)
        loop, cancelled = asyncio.get_running_loop(), Flag()
        events: asyncio.Queue[Said] = asyncio.Queue()

        def deliver(event: Event | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody reads this any more
                cancelled.set()

        return AsyncStream(events, cancelled, self, self.begin(task, deliver, cancelled))

    def prepare(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Task:
        """Lay out a reply, for `begin`: what `stream` would refuse is refused."""
        return self._open().chat(messages, Asked(**options))

    def prepare_text(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Task:
        """Lay out the continuation of raw text, or of token ids, for `begin`."""
        return Task(prompt, None, False, Asked(**options))

    def begin(
        self, task: Task, deliver: Callable[[Event | BaseException], None], cancelled: Flag
    ) -> Started:
        """Start what was laid out, below `stream` and `astream`; `cancelled` ends it within a step.

        `deliver` is told the events, the last of which is `Finish`, or the error that ends them; on
        another thread, which it must not hold up.

        Raises:
            ValueError: what is asked for leaves no room for an answer.
            ContextError: the prompt does not fit.
        """
        return self._open().start(task, deliver, cancelled)

    def soon(self, job: Callable[[], None]) -> None:
        """Have `job` done, without delay and error, after the step in work; for `deliver` to use.

        Raises:
            Qwen3Error: this LLM is closed.
        """
        self._worker.post(job)

    def chat(self, messages: str | Sequence[Message], **options: Unpack[Options]) -> Reply:
        """Do as `stream` does, and give the whole reply at once."""
        return with_parsed(collect(self.stream(messages, **options)), options.get("schema"))

    def batch(
        self, prompts: Sequence[str | Sequence[Message]], **options: Unpack[Options]
    ) -> list[Reply]:
        """Do as `chat` does for each of the prompts, together, and give the replies in order.

        `seed` is that of each reply. Ctrl-C cancels all; an error in one ends the others, too.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list; chat() takes a single one")
        progress = options.pop("progress", None)
        asked = Asked(**options)
        tasks = [self._open().chat(prompt, asked) for prompt in prompts]
        streams: list[Stream] = []
        ended = count(1)

        def tell(_: Collected) -> None:
            if progress:
                progress(next(ended), len(tasks))

        try:
            streams += (self._stream(task, tell) for task in tasks)
            return [with_parsed(collect(stream), asked.schema) for stream in streams]
        finally:
            for stream in streams:
                stream.close()

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
        functions = functions_of(options.get("tools"))
        history, said = normalise(messages), list[dict[str, Any]]()
        for _ in range(max_steps):
            reply = self.chat([*history, *said], **options)
            if options.get("tool_choice") != "none":
                options["tool_choice"] = "auto"  # a call that was demanded has been made
            said += reply.messages
            if reply.finish_reason != "tool_calls":
                return replace(reply, messages=said)
            said += [answer(call, functions) for call in reply.tool_calls]
        raise Qwen3Error(f"the model still calls tools after {max_steps} replies (max_steps)")

    def complete(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        loop_guard: bool = False,
    ) -> Reply:
        """Continue raw text, without a chat template; tags of thinking are text like any other."""
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, not {type(prompt).__name__}")
        task = self.prepare_text(
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
            loop_guard=loop_guard,
        )
        return collect(self._stream(task))

    def logits(self, ids: Sequence[int]) -> mx.array:
        """Give the logits [len(ids), V], float32 and evaluated, that follow each of the ids.

        Raises:
            ValueError: there is no id, or one is not in the vocabulary.
        """
        rows = self.config.vocab_size
        if not ids or any(not 0 <= token < rows for token in ids):
            raise ValueError(f"ids must be one or more numbers from 0 to {rows - 1}")
        tokens = list(ids)
        return self.compute(
            lambda model: model(mx.array(tokens, dtype=mx.int32)[None])[0].astype(mx.float32)
        )

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
    ) -> str:
        """Write the prompt for a conversation with the checkpoint's own template.

        Raises:
            Qwen3Error: there is no template, it refuses, or `thinking` cannot be had.
        """
        return self._open().render(messages, thinking, tools, add_generation_prompt)

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

    def _open(self) -> Replies:
        if self._replies is None:
            raise Qwen3Error("this LLM is closed; load it again")
        return self._replies

    def _stream(self, task: Task, heard: Callable[[Collected], None] | None = None) -> Stream:
        """Start a reply; `heard` is told all that was said, before `Finish` or an error is."""
        events: SimpleQueue[Said] = SimpleQueue()
        cancelled = Flag()
        started = self._open().start(task, events.put, cancelled, heard)
        return Stream(events, cancelled, self, started)


def load(
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    dequantize: bool | None = None,
    context: int | None = None,
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
        progress: told (done, total) modules loaded, from another thread.

    Raises:
        ValueError: an argument is out of its range.
        CheckpointError: the checkpoint cannot be found, read or honoured.
        Qwen3Error: it does not fit; the message shows the sum, and what would.
    """
    wanted = Format(4 if bits is None else bits, group_size)  # a wrong group size is never silent
    if context is not None and (type(context) is not int or context < 1):
        raise ValueError(f"context must be a number of tokens from 1 up, not {context!r}")
    if dequantize is not None and not isinstance(dequantize, bool):
        raise TypeError(f"dequantize must be True, False or None, not {dequantize!r}")
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
    refuse_what_cannot_fit(place.name, network, stored, options, context)
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
        backend.wire_weights()
        return model

    tokenizer = Tokenizer(folder / "tokenizer.json")
    folder = place.fetch(weight_names(folder) or ["model.safetensors"])
    worker = Worker()
    try:
        model = worker.call(read_weights)
        return LLM(model, _words_of(folder, config, tokenizer), worker, context)
    except BaseException:
        abandoned.set()
        worker.stop()
        raise


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


def _shut_down(worker: Worker) -> None:
    worker.stop()
    backend.unwire()
