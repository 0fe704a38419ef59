"""Parses token ids into events: thinking, answer, tool calls, stop strings.

Thinking is recognised by token id, never by text. A reply thinks once, before its answer: a
tag that the model writes after that is text.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from qwen3_mlx.text.events import Reasoning, Text, TokenLogprob, ToolCall, ToolCallDelta
from qwen3_mlx.text.partial_json import PartialArguments
from qwen3_mlx.text.stop_strings import StopStrings
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Detokenizer, Tokenizer
from qwen3_mlx.text.tool_calls import CLOSE, OPEN, ToolCallSyntax

Emit = Callable[[Reasoning | Text | ToolCall | ToolCallDelta], None]
_UNREADABLE_WARNING = "a tool call could not be read and is left in the text"
_FUNCTION_END = "</function>"
_CUT_OFF_WARNING = (
    "a tool call was cut off by the end of the reply: it is incomplete and was not made"
)


class ReplyParser:
    """Parses one generation; the engine passes it the ids, and stops once it is `finished`.

    The line breaks around the thinking and the calls belong to the format and are left out.

    A call within the thinking may be a draft: it is one if the thinking goes on after it or is
    closed. If the reply ends there, the call has ended the thinking. A cut call is text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        emit: Emit,
        *,
        thinking: Thinking | None = None,
        inside: bool = False,
        begun: bool = False,
        stop: Sequence[str] = (),
        calls: ToolCallSyntax | None = None,
        logprobs: bool = False,
    ) -> None:
        """Create the parser; the prompt may end `inside` the thinking, or have `begun` its text.

        Without `thinking` every token is text, as in a raw completion; without `calls` the tags of
        calls are text, too. With `logprobs` each piece of text has its tokens; see `add_logprob`.
        """
        self.finished = False
        self.stopped_by: str | None = None
        self.reasoning_tokens = 0
        self.called = False
        self.cut_off = False  # True if the reply ended within a call
        self.warning: str | None = None
        self._emit_event = emit
        self._detokenizer = Detokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None  # of pending text
        self._next_logprob: TokenLogprob | None = None
        self.logprob_of_end = False  # True to emit the token that ends the reply, without text
        self._open_id = thinking.open_id if thinking else None
        self._close_id = thinking.close_id if thinking else None
        self._inside = inside
        self._answering = begun and not inside  # True once the thinking is over
        self._after_tag = inside and not begun  # next to a tag, where line breaks are format
        self._breaks = ""  # line breaks held back: at the end of a section they are format
        self._breaks_before_call = ""  # format as well, if the call can be read
        self._stop = StopStrings(stop)
        self._calls = calls
        self._call: list[str] | None = None  # text of the open call
        self._call_id = ""
        self._arguments: PartialArguments | None = None  # of an open call that is no draft
        self._streamed_arguments = ""  # of the open call, or the last one
        self._partial_calls = calls is not None and calls.partial
        self._drafts: list[ToolCall] = []  # calls at the end of the thinking so far
        self._draft_text = ""
        self._draft_tokens = 0
        self._bare = calls.format.bare if calls else ()
        self._held_bare = ""  # may begin a call without its tag
        self._untagged = False  # True if the open call, or the last one, had no tag

    @property
    def details(self) -> dict[str, str]:
        """Entries for `Finish.details`: the stop string that ended the text, and a warning."""
        details = {"stop": self.stopped_by, "warning": self.warning}
        return {name: text for name, text in details.items() if text is not None}

    def advance(self, ids: Sequence[int]) -> None:
        """Parse the next ids of the generation and emit their events."""
        for token in ids:
            if self.finished:
                return
            if token == self._open_id and self._may_open():
                self._switch_section(inside=True)
            elif token == self._close_id and self._inside:
                self._switch_section(inside=False)
            elif self._calls and token == self._calls.open_id:
                self._open_call()
            elif self._calls and token == self._calls.close_id and self._call is not None:
                self._close_call(CLOSE)
            elif self._calls and token == self._calls.close_id and self._untagged:
                self._untagged = False  # its call was closed by its own end
            else:
                self._append_logprob(token)
                self.reasoning_tokens += self._inside
                self._draft_tokens += self._inside
                self._emit_section(self._detokenizer.add(token))

    def add_logprob(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> None:
        """Record the log probability of the token that the next `advance` receives."""
        alternatives = [(self._tokenizer.token_bytes(other), value) for other, value in top]
        self._next_logprob = TokenLogprob(self._tokenizer.token_bytes(token), logprob, alternatives)

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens, all of them bytes of an incomplete character."""
        self._detokenizer.rewind(count)
        self.reasoning_tokens -= count * self._inside
        if self._logprobs:
            del self._logprobs[-count:]

    def close(self, *, cut: bool = False) -> None:
        """Emit what is still held back; no event follows.

        With `cut` the reply did not end by itself, so the thinking might have gone on.
        """
        if not self.finished:
            self._emit_section(self._detokenizer.flush())
            if self._call is not None:
                self._close_call("", at_the_end=True)
            if cut:
                self._drop_drafts()
            if self._drafts:  # the reply ends with these calls: they are no drafts
                self.reasoning_tokens -= self._draft_tokens
                for call in self._drafts:
                    self._emit_call(call)
            elif self._inside:
                self._end_reasoning()
            else:
                self._end_answer()
        if self.logprob_of_end and self._next_logprob:
            self._emit_event(Text("", (self._next_logprob,)))
            self._next_logprob = None
        self.finished = True

    def _append_logprob(self, token: int) -> None:
        if self._logprobs is not None:
            self._logprobs.append(
                self._next_logprob or TokenLogprob(self._tokenizer.token_bytes(token), 0.0)
            )
            self._next_logprob = None

    def _emit(self, kind: type[Reasoning] | type[Text], text: str) -> None:
        self._emit_event(kind(text, tuple(self._logprobs or ())))
        self._drop_logprobs()

    def _drop_logprobs(self) -> None:
        """Drop the log probabilities of tokens that are format or part of a call."""
        if self._logprobs:
            self._logprobs = []

    def _may_open(self) -> bool:
        """Return whether a tag opens the thinking, or repeats the tag that has just opened it."""
        return self._after_tag and not self._draft_text if self._inside else not self._answering

    def _switch_section(self, *, inside: bool) -> None:
        self._emit_section(self._detokenizer.flush())
        self._next_logprob = None  # of the tag, which is not emitted
        self._abandon_call()
        if inside and not self._inside:
            self._end_answer()
        self._answering |= self._inside and not inside
        self._inside, self._after_tag, self._breaks = inside, True, ""

    def _emit_section(self, text: str) -> None:
        """Emit text into the section it belongs to: a call, the thinking or the answer."""
        if self._call is not None:
            rest = self._rest_after_bare_call(text) if self._untagged else None
            self._stream_arguments(text[: len(text) - len(rest or "")])
            if rest is not None:
                self._close_call("")
                self._emit_section(rest)
            elif self._untagged and self._arguments and self._arguments.broken:
                self._release_bare_call()
            return
        # White space does not decide whether the thinking goes on after a call.
        if self._drafts and not text.strip():
            self._draft_text += text
            return
        self._drop_drafts()
        if self._after_tag:
            text = text.lstrip("\n")
            self._after_tag = not text
            if self._after_tag:
                self._drop_logprobs()
        if self._inside:
            self._emit_reasoning(text)
        elif text:
            self._emit_answer(text)

    def _emit_reasoning(self, text: str) -> None:
        # The line breaks before the closing tag are format; only the next text shows which are not.
        text = self._breaks + text
        kept = text.rstrip("\n")
        self._breaks = text[len(kept) :]
        if kept:
            self._emit(Reasoning, kept)

    def _emit_answer(self, text: str) -> None:
        self._answering |= bool(text.strip())
        text, call = self._find_bare_call(text)
        self._emit_up_to_stop(text)
        if call and not self.finished:
            self._open_call()
            self._untagged = True
            self._emit_section(call)

    def _emit_up_to_stop(self, text: str) -> None:
        self._emit_text(self._stop.add(text))
        if self._stop.found is not None:
            self.finished, self.stopped_by = True, self._stop.found

    def _find_bare_call(self, text: str) -> tuple[str, str]:
        """Return the text that can be emitted, and the text that begins a call without a tag."""
        text, self._held_bare = self._held_bare + text, ""
        place = text.find("<")
        while place >= 0:
            if text.startswith(self._bare, place):
                return text[:place], text[place:]
            rest = text[place:]
            if any(begin.startswith(rest) for begin in self._bare):
                self._held_bare = text[place:]
                return text[:place], ""
            place = text.find("<", place + 1)
        return text, ""

    def _emit_text(self, text: str) -> None:
        if self._calls:  # if a call follows, the line breaks before it are format
            text = self._breaks + text
            kept = text.rstrip("\n")
            self._breaks, text = text[len(kept) :], kept
        if text:
            self._emit(Text, text)

    def _end_reasoning(self) -> None:
        if self._breaks and not self._after_tag:
            self._emit(Reasoning, self._breaks)

    def _end_answer(self) -> None:
        held, self._held_bare = self._held_bare, ""
        self._emit_text(self._stop.add(held) + self._stop.flush())
        if self._breaks:
            self._emit(Text, self._breaks)
        self._breaks = ""

    # --- calls ----------------------------------------------------------------------------------

    def _open_call(self) -> None:
        self._emit_section(self._detokenizer.flush())
        if self._call is not None:
            self._close_call("")
        if self._inside:
            if not self._drafts:
                self._draft_tokens = 0
        else:
            self._answering = True
            held, self._held_bare = self._held_bare, ""
            # A stop string cannot span a call, so text held back as its possible beginning is due.
            self._emit_text(self._stop.add(held) + self._stop.flush())
            self._breaks_before_call, self._breaks = self._breaks, ""
        assert self._calls
        self._call, self._untagged, self._streamed_arguments = [], False, ""
        self._call_id = f"call_{secrets.token_hex(12)}"
        # A call in the thinking may be a draft, so none of its arguments is streamed.
        self._arguments = None if self._inside else self._calls.format.follow()

    def _rest_after_bare_call(self, text: str) -> str | None:
        """Return the part of `text` after the end of a call without a tag; None if it goes on."""
        assert self._calls and self._call is not None
        # No piece is empty, so the last len(_FUNCTION_END) pieces contain any end that began before
        # `text`. Joining the whole call for each piece would take quadratic time.
        if _FUNCTION_END not in "".join(self._call[-len(_FUNCTION_END) :]) + text:
            return None
        before = "".join(self._call)
        written, end = before + text, max(0, len(before) + 1 - len(_FUNCTION_END))
        while (place := written.find(_FUNCTION_END, end)) >= 0:
            end = place + len(_FUNCTION_END)
            if self._calls.format.read(written[:end], whole=False):  # not an end within a value
                return written[end:]
        return None

    def _release_bare_call(self) -> None:
        """Emit as text what began like a call without a tag; a call may begin further on."""
        assert self._call is not None
        text, self._call, self._untagged = "".join(self._call), None, False
        self.warning, self._breaks = _UNREADABLE_WARNING, self._breaks_before_call
        self._emit_up_to_stop(text[0])
        if not self.finished:
            self._emit_section(text[1:])

    def _stream_arguments(self, text: str) -> None:
        """Append text to the open call, and stream the part of the arguments that is certain."""
        assert self._call is not None
        if not text:
            return
        self._call.append(text)
        if self._arguments and (piece := self._arguments.add(text)):
            self._streamed_arguments += piece
            if self._partial_calls:
                self._emit_event(ToolCallDelta(self._call_id, self._arguments.name or "", piece))

    def _close_call(self, end: str, *, at_the_end: bool = False) -> None:
        """Parse the open call; `end` is its closing tag, "" if something else has ended it."""
        assert self._calls and self._call is not None
        written, self._call = "".join(self._call) + self._detokenizer.flush(), None
        call = self._calls.read(written, whole=bool(end))
        text = written if self._untagged else f"{OPEN}{written}{end}"
        if call and (streamed := self._streamed_arguments):
            assert self._arguments
            call = replace(call, id=self._call_id)
            if call.name != self._arguments.name or not call.raw_arguments.startswith(streamed):
                call = None  # a key came twice: an ambiguous call is refused
        if call is None:
            self._drop_drafts()
            self._emit_unreadable(text)
            if at_the_end:
                self.cut_off, self.warning = True, _CUT_OFF_WARNING
        elif self._inside:
            self._drafts.append(call)
            self._draft_text += text
        else:
            self._emit_call(call)

    def _abandon_call(self) -> None:
        """Emit as text the calls at the end of the thinking, and an open call that is cut off."""
        self._drop_drafts()
        if self._call is not None:
            self._emit_unreadable(OPEN + "".join(self._call))

    def _emit_unreadable(self, text: str) -> None:
        self._call, self._after_tag = None, False
        if self._inside:
            self._emit_reasoning(text)
        else:
            self.warning = _UNREADABLE_WARNING
            if self._partial_calls and self._streamed_arguments and not self._untagged:
                self._drop_logprobs()  # it was streamed as a call, so it must not be text as well
            else:
                self._breaks = self._breaks_before_call
                self._emit_text(text)

    def _drop_drafts(self) -> None:
        text, self._draft_text, self._drafts = self._draft_text, "", []
        if text:
            self._emit_reasoning(text)

    def _emit_call(self, call: ToolCall) -> None:
        self.called, self._after_tag, self._breaks = True, True, ""
        self._drop_logprobs()
        if self._partial_calls:
            # The last piece, with the closing brace, comes only now: no cut call can be parsed.
            rest = call.raw_arguments[len(self._streamed_arguments) :]
            self._emit_event(ToolCallDelta(call.id, call.name, rest))
        self._emit_event(call)
