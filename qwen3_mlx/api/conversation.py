"""The public class `Conversation`: a message history with replies, retries, edits and branches."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Unpack

from qwen3_mlx.api.options import Options, spread, with_keywords
from qwen3_mlx.api.stream import Reply, ReplyBuilder, Stream, collect
from qwen3_mlx.errors import ContextError, Qwen3Error
from qwen3_mlx.files import atomic_write
from qwen3_mlx.text.events import ToolCall
from qwen3_mlx.text.messages import normalise
from qwen3_mlx.text.tool_calls import run_tool, tool_functions

Message = dict[str, Any]
Start = Callable[
    [Sequence[Message], Options, Callable[[ReplyBuilder], None], dict[str, str]], Stream
]
"""Starts a reply to messages; the callback gets the collected reply before `Finish` is sent. The
details are passed on in `Finish`."""

_VERSION = 1
_NOT_WHOLE = "Error: the arguments are not a whole JSON object, so the tool was not called"
# The default `...` in signatures means: as the conversation has it.
_shows_keywords = with_keywords(Options, **dict.fromkeys(Options.__annotations__, ...))


class Conversation:
    """A conversation that keeps its own history; created by `LLM.conversation`.

    A reply that is cancelled stays in the history as far as it came. A reply that fails leaves the
    history as it was before.

    Attributes:
        messages: the history, a list of dicts in OpenAI's format. It is plain data and may be
            changed between replies.
        options: the options of every reply; see `Options`. The options of a single call override
            them one by one, the fields of `sampling` too.
        drop_oldest: True drops the oldest turns when the context window is full; False raises a
            `ContextError` then.
    """

    def __init__(
        self,
        start: Start,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        options: Options,
        drop_oldest: bool = False,
    ) -> None:
        """Create a conversation; `start` starts its replies.

        With `drop_oldest` whole turns are dropped, oldest first, when the context window is full;
        `Finish.details["dropped_turns"]` is their number.
        """
        self.messages: list[Message] = [dict(message) for message in messages]
        self.options = options
        self.drop_oldest = drop_oldest
        self._start = start
        self._replying = False

    @_shows_keywords
    def stream(self, words: str | None = None, **options: Unpack[Options]) -> Stream:
        """Add a user's message and return the stream of the reply.

        Args:
            words: the text of the user's message. None (the default) replies to the history as it
                stands, for example after tool results.
            **options: see `Options`; they override the conversation's own for this reply. With
                `continue_last` and no words, the last reply is continued and its message grows.

        Returns:
            A `Stream`. The reply is added to `messages` when the stream ends.

        Raises:
            TypeError, ValueError: an option is wrong, or there is nothing to reply to.
            ContextError: prompt and reply do not fit the context window.
            Qwen3Error: the last reply is not finished, or the checkpoint cannot honour an option.
        """
        if self._replying:
            raise Qwen3Error("the last reply is not finished; read its stream to the end, or close")
        messages, continued = [*self.messages], bool(options.get("continue_last"))
        if words is not None:
            messages += normalise(words)
        elif continued and messages:
            pass
        elif not messages or messages[-1]["role"] not in ("user", "tool"):
            raise ValueError("there is nothing to reply to; say something")
        before, self.messages, self._replying = self.messages, messages, True

        # Runs on the worker thread, before the reader of the stream sees the last event.
        def on_end(reply: ReplyBuilder) -> None:
            self._replying = False
            if reply.failed:
                self.messages = before
            elif reply.text or reply.reasoning or reply.tool_calls:
                self.messages = self.messages[: -1 if continued else None]
                self.messages.append(reply.message())

        try:
            return self._start_within(on_end, {**spread(self.options), **spread(options)})
        except BaseException:
            self.messages, self._replying = before, False
            raise

    def _start_within(self, on_end: Callable[[ReplyBuilder], None], options: Options) -> Stream:
        """Start a reply; with `drop_oldest`, drop the oldest turns until it fits the window."""
        dropped = 0
        while True:
            details = {"dropped_turns": str(dropped)} if dropped else {}
            try:
                return self._start(self.messages, options, on_end, details)
            except ContextError:
                turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
                if not self.drop_oldest or len(turns) < 2:
                    raise
                self.messages = self.messages[: turns[0]] + self.messages[turns[1] :]
                dropped += 1

    @_shows_keywords
    def chat(self, words: str | None = None, **options: Unpack[Options]) -> Reply:
        """Add a user's message and return the whole reply.

        Takes the arguments of `stream` and raises its errors.
        """
        return collect(self.stream(words, **options))

    def answer_calls(self, functions: Sequence[Callable[..., Any]]) -> None:
        """Run the tools that the last reply calls and add their results to the history.

        Call `stream()` or `chat()` without words afterwards, for the model's answer. An exception
        raised by a tool becomes the result that the model sees. A call whose arguments are not a
        complete JSON object is not run; its result states that.

        Args:
            functions: the Python functions that may be called, found by their names.

        Raises:
            ValueError: the last message calls no tool.
        """
        calls = self.messages[-1].get("tool_calls") if self.messages else None
        if not calls:
            raise ValueError("the last message calls no tool")
        by_name = tool_functions(functions)
        for call in calls:
            function = call["function"]
            arguments = _arguments_of(function)
            tool_call = ToolCall(call["id"], function["name"], arguments or {})
            if arguments is None:
                result = {"tool_call_id": tool_call.id, "name": tool_call.name}
                self.messages.append({"role": "tool", **result, "content": _NOT_WHOLE})
            else:
                self.messages.append(run_tool(tool_call, by_name))

    @_shows_keywords
    def retry(self, **options: Unpack[Options]) -> Stream:
        """Generate another reply to the user's last message, in place of the last one.

        Returns a `Stream`; takes the options of `stream` and raises its errors.

        Raises:
            ValueError: the history has no message of the user.
        """
        return self._from(self._turn(-1) + 1, None, options)

    @_shows_keywords
    def edit(self, words: str, turn: int = -1, **options: Unpack[Options]) -> Stream:
        """Replace a user's message, remove all messages after it, and stream the reply.

        Args:
            words: the new text of the message.
            turn: the number of the user's message: from 0, or from the end as -1, -2, ...; default
                -1, the last.
            **options: see `Options`; they override the conversation's own for this reply.

        Raises:
            ValueError: there is no such turn.
            The errors of `stream`.
        """
        return self._from(self._turn(turn), words, options)

    def branch(self, turn: int | None = None) -> "Conversation":
        """Return an independent copy of this conversation.

        With `turn` the copy ends before that message of the user; turns count as in `edit`.

        Raises:
            ValueError: there is no such turn.
        """
        stop = None if turn is None else self._turn(turn)
        history = deepcopy(self.messages[:stop])
        return Conversation(
            self._start, messages=history, options=self.options, drop_oldest=self.drop_oldest
        )

    def save(self, file: str | Path) -> None:
        """Write the history to a JSON file, which `LLM.conversation(file=...)` reads.

        The file appears, or is replaced, as a whole. Only its owner may read it.

        Raises:
            OSError: the file cannot be written.
        """
        content = {"format": "qwen3-mlx conversation", "version": _VERSION}
        content |= {"messages": self.messages}
        with atomic_write(Path(file), private=True) as out:
            out.write(json.dumps(content, ensure_ascii=False, indent=1).encode())

    def _from(self, place: int, words: str | None, options: Options) -> Stream:
        """Reply with the history cut at `place`; restore the history if that raises."""
        if self._replying:
            raise Qwen3Error("the last reply is not finished; read its stream to the end, or close")
        before, self.messages = self.messages, self.messages[:place]
        try:
            return self.stream(words, **options)
        except BaseException:
            self.messages = before
            raise

    def _turn(self, number: int) -> int:
        """Return the index in `messages` of a turn of the user."""
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise ValueError("nothing has been asked yet: the conversation has no user message")
        try:
            return places[number]
        except IndexError:
            raise ValueError(
                f"there is no turn {number}: the conversation has {len(places)}"
            ) from None


def _arguments_of(function: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a call in the history; None if they are no complete JSON object."""
    arguments = function["arguments"]
    try:
        read = json.loads(arguments, strict=False) if isinstance(arguments, str) else arguments
    except ValueError:
        return None
    return read if isinstance(read, dict) else None


def read_messages(file: str | Path) -> list[Message]:
    """Read the messages that `Conversation.save` wrote, or an export without the replaced ones.

    Raises:
        Qwen3Error: the file is missing or is not a saved conversation.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise Qwen3Error(f"{file} was written by another version of qwen3-mlx")
        live = [each for each in content["messages"] if not each.get("replaced")]
        return normalise(live) if live else []
    except FileNotFoundError as error:
        raise Qwen3Error(f"there is no file {file}") from error
    except OSError as error:
        raise Qwen3Error(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Qwen3Error(f"{file} is not a saved conversation: {error}") from error
