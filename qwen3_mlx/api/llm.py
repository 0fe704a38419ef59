"""The public class `LLM`: a loaded checkpoint that generates replies.

It composes checkpoint, text and engine, and holds no algorithm of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Unpack

import mlx.core as mx

from qwen3_mlx.api.conversation import Conversation, read_messages
from qwen3_mlx.api.loaded_model import LoadedModel
from qwen3_mlx.api.options import GenerationOptions, Options, TextOptions, with_keywords
from qwen3_mlx.api.prompts import render
from qwen3_mlx.api.stream import AsyncStream, Reply, ReplyBuilder, Stream, collect, with_parsed
from qwen3_mlx.api.tool_loop import run_tools
from qwen3_mlx.arguments import Progress, plain, refuse_unknown
from qwen3_mlx.text.messages import Message
from qwen3_mlx.text.tokenizer import Prompt
from qwen3_mlx.text.tool_calls import Tool

_CONVERSATION_KEYWORDS = ("system", "messages", "file", "drop_oldest")
# Where the oldest turns are dropped, a reply has room for at least this fraction of the context.
_MIN_REPLY_SHARE = 1 / 8


class LLM(LoadedModel):
    """A loaded checkpoint that generates replies; created by `load`.

    Every method may be called from any thread. Requests are batched: each step of the engine
    advances all of them by one token. Use the LLM as a context manager, or call `close`.

    Callbacks such as `progress` run on the worker thread, which computes. An exception raised in a
    callback ends its request. A blocking call on the same LLM, such as `chat`, raises a
    `Qwen3Error` there instead of waiting for itself.

    Attributes:
        config: the shape of the network, a `ModelConfig`.
        tokenizer: encodes text to token ids and decodes them.
        kind: what the checkpoint is for: "chat", "embedding" or "reranker".
        thinking: which modes the checkpoint has (thinking, direct or both), a `Thinking`.
        prefix_id: the id of the token to put before a text without context: the beginning of a
            text or else its end, as tokenizer_config.json names them; None if it names neither.
        context: the context window in tokens: the most that a prompt and its reply have together.
        cache_format: the format of the KV caches, a `CacheFormat`.
        adapters: the names of the adapters that `with_adapter` takes.
        model: the network; its arrays belong to the worker thread, see `compute`. On several
            machines it is the share of this one.
        cluster: the machines that hold the model together; None on one.
    """

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

        # Fail before the first reply.
        self._open().refuse_no_chat()
        GenerationOptions.of(options, *_CONVERSATION_KEYWORDS)
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
            **options: see `Options`. `tools` must be Python functions, or tools of `mcp.connect`. A
                demanded call (`tool_choice`) is demanded of the first reply only.

        An exception raised by a tool is passed to the model as the result of the call.

        Returns:
            The last `Reply`; its `messages` are all replies and tool results of this run.

        Raises:
            Qwen3Error: the model still calls tools after `max_steps` replies.
            The errors of `chat`.
        """
        GenerationOptions.of(options, "max_steps")
        return run_tools(self.chat, messages, max_steps, options)

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

    def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        pooling: str | None = None,
        truncate: bool = False,
        progress: Progress | None = None,
    ) -> mx.array:
        """Compute the vectors of texts with an embedding model.

        Args:
            texts: the texts, each a string or its token ids. The names of control tokens in a text
                become those tokens; the end token of the tokenizer is appended. An empty text has
                a vector, too.
            instruction: the task that the texts are queries of, in a sentence. Default None, for
                documents, which have no instruction.
            prompt_name: a prompt that the checkpoint names, such as "query", in place of an
                instruction; default None.
            dimensions: cut the vectors to their first dimensions, 1 to the hidden size; default
                None, all. The published models are trained for 32 and more.
            pooling: "last" takes the hidden state of the last token of any Qwen3, whatever the
                checkpoint's files say; default None.
            truncate: True cuts texts that are longer than the context window at their end; default
                False, which refuses them.
            progress: callable (done, total) tokens; default None.

        Returns:
            The vectors [len(texts), dimensions], float32, each of length 1: their products are
            cosines. A text's vector does not depend on the other texts.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of its range.
            ContextError: a text is longer than the context window.
            Qwen3Error: this is no embedding model, or one with another pooling; a text has a token
                that the model does not know; or free memory does not suffice.
        """
        prepared = self.prepare_embedding(
            texts,
            instruction=instruction,
            prompt_name=prompt_name,
            dimensions=dimensions,
            pooling=pooling,
            truncate=truncate,
        )
        return self.compute_texts(prepared, progress)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        scoring: str | None = None,
        progress: Progress | None = None,
    ) -> list[float]:
        """Compute how well documents answer a query, with a reranker.

        Args:
            query: the query.
            documents: the documents. One that is too long is cut at its end, with a warning. Names
                of control tokens in query, instruction and documents are plain text.
            instruction: the task, in a sentence; default None, that of the checkpoint, which is a
                web search.
            scoring: "yes-no" takes the probability of "yes" against "no" of any Qwen3; default
                None.
            progress: callable (done, total) tokens; default None.

        Returns:
            A probability for each document, in their order.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of its range.
            ContextError: the query leaves no room for a document.
            Qwen3Error: this is no reranker, or free memory does not suffice.
        """
        prepared = self.prepare_rerank(query, documents, instruction=instruction, scoring=scoring)
        scores: list[float] = self.compute_texts(prepared, progress)[:, 0].tolist()  # type: ignore[assignment]
        return scores

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
