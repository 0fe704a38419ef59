"""A conversation: its history, and the ways to go on with it, again or differently."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Unpack

from qwen3_mlx.api.options import Options, spread, with_keywords
from qwen3_mlx.api.stream import Reply, ReplyBuilder, Stream, collect
from qwen3_mlx.errors import ContextError, Qwen3Error
from qwen3_mlx.text.events import ToolCall
from qwen3_mlx.text.messages import normalise
from qwen3_mlx.text.tool_calls import run_tool, tool_functions

Message = dict[str, Any]
Start = Callable[
    [Sequence[Message], Options, Callable[[ReplyBuilder], None], dict[str, str]], Stream
]
"""Starts a reply to messages; the callback is told all that was said, before `Finish`, which tells
the details that are given."""

_VERSION = 1
_NOT_WHOLE = "Error: the arguments are not a whole JSON object, so the tool was not called"
# What is not stated is as the conversation has it.
_shows_keywords = with_keywords(Options, **dict.fromkeys(Options.__annotations__, ...))


class Conversation:
    """Messages back and forth, made by `LLM.conversation`.

    `messages` are plain data and may be changed between replies. Options given here hold for every
    reply, unless a reply is asked for with others; the fields of `sampling` count one by one. A
    reply that is cancelled stays as far as it came; one that fails leaves nothing.
    """

    def __init__(
        self,
        start: Start,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        options: Options,
        drop_oldest: bool = False,
    ) -> None:
        """Begin with a history; `start` starts the replies.

        With `drop_oldest` the oldest turns are dropped, whole, when the context window is full;
        `Finish` tells how many. Otherwise that is a `ContextError`.
        """
        self.messages: list[Message] = [dict(message) for message in messages]
        self.options = options
        self.drop_oldest = drop_oldest
        self._start = start
        self._replying = False

    @_shows_keywords
    def stream(self, words: str | None = None, **options: Unpack[Options]) -> Stream:
        """Say something and stream the reply; without words, reply to the history as it stands.

        With `continue_last` and no words the last reply is continued, and its message grows.

        Raises:
            ValueError: there is nothing to reply to.
            Qwen3Error: the last reply is not finished, or the checkpoint cannot do as asked.
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

        def heard(said: ReplyBuilder) -> None:
            self._replying = False
            if said.failed:
                self.messages = before
            elif said.text or said.reasoning or said.tool_calls:
                self.messages = self.messages[: -1 if continued else None]
                self.messages.append(said.message())

        try:
            return self._start_within(heard, {**spread(self.options), **spread(options)})
        except BaseException:
            self.messages, self._replying = before, False
            raise

    def _start_within(self, heard: Callable[[ReplyBuilder], None], options: Options) -> Stream:
        """Start a reply, without the oldest turns if need be and if they may be dropped."""
        dropped = 0
        while True:
            details = {"dropped_turns": str(dropped)} if dropped else {}
            try:
                return self._start(self.messages, options, heard, details)
            except ContextError:
                turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
                if not self.drop_oldest or len(turns) < 2:
                    raise
                self.messages = self.messages[: turns[0]] + self.messages[turns[1] :]
                dropped += 1

    @_shows_keywords
    def chat(self, words: str | None = None, **options: Unpack[Options]) -> Reply:
        """Do as `stream` does, and give the whole reply at once."""
        return collect(self.stream(words, **options))

    def answer_calls(self, functions: Sequence[Callable[..., Any]]) -> None:
        """Call the tools that the last reply asks for, and add what comes of them to the history.

        A call whose arguments are not a whole JSON object is not made; the model is shown why.

        Raises:
            ValueError: it asks for none.
        """
        asked = self.messages[-1].get("tool_calls") if self.messages else None
        if not asked:
            raise ValueError("the last message calls no tool")
        by_name = tool_functions(functions)
        for call in asked:
            function = call["function"]
            arguments = _arguments_of(function)
            made = ToolCall(call["id"], function["name"], arguments or {})
            if arguments is None:
                about = {"tool_call_id": made.id, "name": made.name, "content": _NOT_WHOLE}
                self.messages.append({"role": "tool", **about})
            else:
                self.messages.append(run_tool(made, by_name))

    @_shows_keywords
    def retry(self, **options: Unpack[Options]) -> Stream:
        """Have the last words replied to anew.

        Raises:
            ValueError: nothing has been said yet.
        """
        return self._from(self._turn(-1) + 1, None, options)

    @_shows_keywords
    def edit(self, words: str, turn: int = -1, **options: Unpack[Options]) -> Stream:
        """Say other words in place of a user's turn, and forget what came after it.

        Turns count from 0, or from the end as -1, -2, ...

        Raises:
            ValueError: there is no such turn.
        """
        return self._from(self._turn(turn), words, options)

    def branch(self, turn: int | None = None) -> "Conversation":
        """Give another conversation with this history, or with what was before a user's turn."""
        stop = None if turn is None else self._turn(turn)
        history = deepcopy(self.messages[:stop])
        return Conversation(
            self._start, messages=history, options=self.options, drop_oldest=self.drop_oldest
        )

    def save(self, file: str | Path) -> None:
        """Write the history as JSON, for `LLM.conversation(file=...)`."""
        file = Path(file)
        content = {"format": "qwen3-mlx conversation", "version": _VERSION}
        beside = file.with_name(f".{file.name}.part")
        try:
            with os.fdopen(
                os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w"
            ) as out:
                json.dump(content | {"messages": self.messages}, out, ensure_ascii=False, indent=1)
            beside.replace(file)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def _from(self, place: int, words: str | None, options: Options) -> Stream:
        """Say something behind the first messages; if that cannot be, all stay as they are."""
        if self._replying:
            raise Qwen3Error("the last reply is not finished; read its stream to the end, or close")
        before, self.messages = self.messages, self.messages[:place]
        try:
            return self.stream(words, **options)
        except BaseException:
            self.messages = before
            raise

    def _turn(self, number: int) -> int:
        """Give the place of a user's turn among the messages."""
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        try:
            return places[number]
        except IndexError:
            raise ValueError(f"there is no turn {number}: {len(places)} have been said") from None


def _arguments_of(function: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a call in the history, or None where they are not whole."""
    arguments = function["arguments"]
    try:
        read = json.loads(arguments, strict=False) if isinstance(arguments, str) else arguments
    except ValueError:
        return None
    return read if isinstance(read, dict) else None


def read_messages(file: str | Path) -> list[Message]:
    """Read what `Conversation.save` wrote.

    Raises:
        Qwen3Error: the file is missing or is something else.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise Qwen3Error(f"{file} was written by a version of qwen3-mlx that is not this one")
        return normalise(content["messages"]) if content["messages"] else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Qwen3Error(f"{file} is not a saved conversation: {error}") from error
