"""Parses token ids into events: thinking, answer, tool calls, stop strings.

Thinking is recognised by token id, never by text. A reply thinks once, before its answer: a
tag that the model writes after that is text.
"""

from collections.abc import Callable, Sequence

from qwen3_mlx.text.events import Reasoning, Text, ToolCall, ToolCallDelta
from qwen3_mlx.text.logprobs import TextLogprobs
from qwen3_mlx.text.open_call import BareCallFinder, OpenCall
from qwen3_mlx.text.sections import Section, SectionTracker
from qwen3_mlx.text.stop_strings import StopStrings
from qwen3_mlx.text.thinking import OPEN as THINK
from qwen3_mlx.text.tool_calls import CLOSE, OPEN, ToolCallSyntax

Emit = Callable[[Reasoning | Text | ToolCall | ToolCallDelta], None]
_UNREADABLE_WARNING = "a tool call could not be read and is left in the text"
_CUT_OFF_WARNING = (
    "a tool call was cut off by the end of the reply: it is incomplete and was not made"
)


class TextEmitter:
    """Emits the text of a section, without the line breaks that belong to the format.

    Attributes:
        after_tag: True next to a tag: the line breaks that follow are format.
        breaks: the last line breaks of the text, held back: before a tag they are format.
    """

    def __init__(
        self, emit: Emit, logprobs: TextLogprobs | None, *, after_tag: bool, calls: bool
    ) -> None:
        """Emit events; with `calls` a tag may follow the answer, too."""
        self.after_tag = after_tag
        self.breaks = ""
        self._emit = emit
        self._logprobs = logprobs
        self._calls = calls

    def without_first_breaks(self, text: str) -> str:
        """Return the text without line breaks that follow a tag."""
        if self.after_tag:
            text = text.lstrip("\n")
            self.after_tag = not text
            if self.after_tag:
                self.drop_logprobs()
        return text

    def add(
        self, kind: type[Reasoning] | type[Text], text: str = "", *, last: bool = False
    ) -> None:
        """Emit text; the line breaks at its end only if it is the `last` of its section."""
        text = self.breaks + text
        holds = not last and (kind is Reasoning or self._calls)
        kept = text.rstrip("\n") if holds else text
        self.breaks = text[len(kept) :]
        if kept:
            self._emit(kind(kept, self._logprobs.take() if self._logprobs else ()))

    def drop_logprobs(self) -> None:
        """Drop the log probabilities of what is format or part of a call."""
        if self._logprobs:
            self._logprobs.drop()


class ReplyParser:
    """Parses one generation; the engine passes it the ids, and stops once it is `finished`.

    The line breaks around the thinking and the calls belong to the format and are left out.

    A call within the thinking may be a draft: it is one if the thinking goes on after it or is
    closed. If the reply ends there, the call has ended the thinking. A cut call is text.
    """

    def __init__(
        self,
        sections: SectionTracker,
        emit: Emit,
        *,
        stop: Sequence[str] = (),
        calls: ToolCallSyntax | None = None,
        logprobs: TextLogprobs | None = None,
    ) -> None:
        """Create the parser of the tokens that `sections` decodes.

        Without `calls` the tags of calls are text. With `logprobs` texts have their tokens.
        """
        self.finished = False
        self.stopped_by: str | None = None
        self.reasoning_tokens = 0
        self.called = False
        self.cut_off = False  # True if the reply ended within a call
        self.warning: str | None = None
        self._emit_event = emit
        self._sections = sections
        self._place = 0  # tokens read
        self._inside = sections.inside
        after_tag = sections.inside and not sections.begun
        self._text = TextEmitter(emit, logprobs, after_tag=after_tag, calls=calls is not None)
        self._breaks_before_call = ""  # they are format if the call can be read
        self._stop = StopStrings(stop) if stop else None
        self._logprobs = logprobs
        self._calls = calls
        self._partial_calls = calls is not None and calls.partial
        self._bare_calls = BareCallFinder(bare) if calls and (bare := calls.format.bare) else None
        self._call: OpenCall | None = None
        self._skips_close_tag = False  # True after an untagged call, which its own end has closed
        self._drafts: list[ToolCall] = []  # calls at the end of the thinking so far
        self._draft_text = ""
        self._draft_tokens = 0

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
            now = self._sections.read(self._place, token)
            self._place += 1
            inside = now.section is Section.THINKING
            if inside != self._inside:
                self._switch_section(now.text, inside=inside)
            elif token == self._sections.open_id and self._repeats_tag():
                self._switch_section(now.text.removesuffix(THINK), inside=True)
            elif not (self._calls and self._reads_call_tag(self._calls, token, now.text)):
                if self._logprobs:
                    self._logprobs.add(token)
                self.reasoning_tokens += self._inside
                self._draft_tokens += self._inside
                self._emit_section(now.text)

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens, all of them bytes of an incomplete character."""
        self._place -= count
        self.reasoning_tokens -= count * self._inside
        if self._logprobs:
            self._logprobs.rewind(count)

    def close(self, *, cut: bool = False) -> None:
        """Emit what is still held back; no event follows.

        With `cut` the reply did not end by itself, so the thinking might have gone on.
        """
        if not self.finished:
            self._emit_section(self._sections.flushed())
            if self._call:
                self._close_call(self._call, at_the_end=True)
            if cut:
                self._drop_drafts()
            if self._drafts:  # the reply ends with these calls: they are no drafts
                self.reasoning_tokens -= self._draft_tokens
                for call in self._drafts:
                    self._emit_call(call)
            elif not self._inside:
                self._emit_held(last=True)
            elif not self._text.after_tag:
                self._text.add(Reasoning, last=True)
        if self._logprobs and (tokens := self._logprobs.take_end()):
            self._emit_event(Text("", tokens))
        self.finished = True

    def _repeats_tag(self) -> bool:
        """Return whether a tag repeats the one that has just opened the thinking."""
        return self._inside and self._text.after_tag and not self._draft_text

    def _switch_section(self, rest: str, *, inside: bool) -> None:
        """Enter the thinking or the answer, after the `rest` of the section before."""
        self._emit_section(rest)
        if self._logprobs:
            self._logprobs.skip()  # the tag is not emitted
        if self._drafts:
            self._drop_drafts()
        if self._call:
            self._emit_unreadable(self._call, self._call.written())
        if inside and not self._inside:
            self._emit_held(last=True)
        self._text.drop_logprobs()  # of the line breaks before the tag
        self._inside, self._text.after_tag, self._text.breaks = inside, True, ""

    def _emit_section(self, text: str) -> None:
        """Emit text into the section it belongs to: a call, the thinking or the answer."""
        if not text:  # a part of a character; its log probability waits with it
            return
        if self._call:
            self._append_to_call(self._call, text)
            return
        if self._drafts:
            # White space does not decide whether the thinking goes on after a call.
            if not text.strip():
                self._draft_text += text
                return
            self._drop_drafts()
        text = self._text.without_first_breaks(text)
        if self._inside:
            self._text.add(Reasoning, text)
        elif text:
            self._emit_answer(text)

    def _emit_answer(self, text: str) -> None:
        text, begun = self._bare_calls.split(text) if self._bare_calls else (text, "")
        self._emit_up_to_stop(text)
        if begun and not self.finished:
            self._open_call(untagged=True)
            self._emit_section(begun)

    def _emit_up_to_stop(self, text: str) -> None:
        self._text.add(Text, self._stop.add(text) if self._stop else text)
        if self._stop and self._stop.found is not None:
            self.finished, self.stopped_by = True, self._stop.found

    def _emit_held(self, *, last: bool = False) -> None:
        """Emit the text held back as the possible beginning of a stop string or of a call."""
        held = self._bare_calls.flush() if self._bare_calls else ""
        held = self._stop.add(held) + self._stop.flush() if self._stop else held
        self._text.add(Text, held, last=last)

    # --- calls ----------------------------------------------------------------------------------

    def _reads_call_tag(self, calls: ToolCallSyntax, token: int, text: str) -> bool:
        """Open or close a call at its tag; return whether the token is a tag, or else text."""
        if token == calls.open_id:
            self._emit_section(text.removesuffix(OPEN))
            if self._call:
                self._close_call(self._call)
            self._open_call(untagged=False)
            return True
        if token != calls.close_id or not (self._call or self._skips_close_tag):
            return False
        if self._call:
            self._stream(self._call, text.removesuffix(CLOSE))
            self._close_call(self._call, CLOSE)
        else:  # its call was closed by its own end
            self._skips_close_tag = False
            self._emit_section(text.removesuffix(CLOSE))  # bytes of a character that is incomplete
        return True

    def _open_call(self, *, untagged: bool) -> None:
        assert self._calls
        if not self._inside:
            # A stop string cannot span a call, so text held back as its possible beginning is due.
            self._emit_held()
            self._breaks_before_call, self._text.breaks = self._text.breaks, ""
        elif not self._drafts:
            self._draft_tokens = 0
        self._skips_close_tag = False
        # A call in the thinking may be a draft, so none of its arguments is streamed.
        self._call = OpenCall(self._calls, draft=self._inside, untagged=untagged)

    def _append_to_call(self, call: OpenCall, text: str) -> None:
        rest = call.rest_after_end(text) if call.untagged else None
        self._stream(call, text[: len(text) - len(rest or "")])
        if rest is not None:
            self._close_call(call)
            self._emit_section(rest)
        elif call.untagged and call.broken:
            self._release_bare_call(call)

    def _stream(self, call: OpenCall, text: str) -> None:
        """Append text to the open call, and emit the piece of its arguments that is certain now."""
        if (piece := call.add(text)) and self._partial_calls:
            self._emit_event(ToolCallDelta(call.id, call.name, piece))

    def _release_bare_call(self, call: OpenCall) -> None:
        """Emit as text what began like a call without a tag; a call may begin further on."""
        self._call, self.warning = None, _UNREADABLE_WARNING
        self._text.breaks = self._breaks_before_call
        self._emit_up_to_stop(call.text[0])
        if not self.finished:
            self._emit_section(call.text[1:])

    def _close_call(self, call: OpenCall, end: str = "", *, at_the_end: bool = False) -> None:
        """Parse the open call; `end` is its closing tag, "" if something else has ended it."""
        self._call, self._skips_close_tag = None, call.untagged
        parsed = call.parsed(whole=bool(end))
        if parsed is None:
            self._drop_drafts()
            self._emit_unreadable(call, call.written(end))
            if at_the_end:
                self.cut_off, self.warning = True, _CUT_OFF_WARNING
        elif self._inside:
            self._drafts.append(parsed)
            self._draft_text += call.written(end)
        else:
            self._emit_call(parsed, call.streamed)

    def _emit_unreadable(self, call: OpenCall, text: str) -> None:
        self._call, self._text.after_tag = None, False
        if self._inside:
            self._text.add(Reasoning, text)
            return
        self.warning = _UNREADABLE_WARNING
        if self._partial_calls and call.streamed and not call.untagged:
            self._text.drop_logprobs()  # streamed as a call, it must not be text as well
        else:
            self._text.breaks = self._breaks_before_call
            self._text.add(Text, text)

    def _drop_drafts(self) -> None:
        """Emit as text the calls at the end of the thinking."""
        text, self._draft_text, self._drafts = self._draft_text, "", []
        if text:
            self._text.add(Reasoning, text)

    def _emit_call(self, call: ToolCall, streamed: str = "") -> None:
        self.called, self._text.after_tag, self._text.breaks = True, True, ""
        self._text.drop_logprobs()
        if self._partial_calls:
            # The last piece, with the closing brace, comes only now: no cut call can be parsed.
            self._emit_event(ToolCallDelta(call.id, call.name, call.raw_arguments[len(streamed) :]))
        self._emit_event(call)
