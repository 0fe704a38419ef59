"""Token ids in, events out: thinking and answer told apart, stop strings found.

What is thinking is decided by token id, never by text. A reply thinks once, before its answer: a
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
_UNREADABLE = "a tool call could not be read and is left in the text"
_END = "</function>"
_CUT_OFF = "a tool call was cut off by the end of the reply: it is incomplete and was not made"


class ReplyParser:
    """Follows one generation; the engine tells it the ids, and stops when it is `finished`.

    The line breaks around the thinking and the calls belong to the format and are left out.

    A call within the thinking may be a draft. It is one if the thinking goes on after it, or is
    closed; if the reply ends there, it has ended the thinking. One that is cut off is text.
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
        """Start to parse; the prompt may end `inside` the thinking, or have `begun` what comes.

        Without `thinking` every token is text, as in a raw completion; without `calls` so are the
        tags of calls. With `logprobs` each piece of text has its tokens; see `add_logprob`.
        """
        self.finished = False
        self.stopped_by: str | None = None
        self.reasoning_tokens = 0
        self.called = False
        self.cut_off = False  # whether the reply ended within a call
        self.warning: str | None = None
        self._tell = emit
        self._detokenizer = Detokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._notes: list[TokenLogprob] | None = [] if logprobs else None  # of what is not said yet
        self._note: TokenLogprob | None = None
        self.logprob_of_end = False  # whether the token that ends the reply is said, without text
        self._open_id = thinking.open_id if thinking else None
        self._close_id = thinking.close_id if thinking else None
        self._inside = inside
        self._answering = begun and not inside  # whether the thinking is over
        self._at_seam = inside and not begun  # next to a tag, where line breaks are format
        self._breaks = ""  # line breaks that may yet turn out to be the last
        self._breaks_before_call = ""  # which are format, if it can be read
        self._stop = StopStrings(stop)
        self._calls = calls
        self._call: list[str] | None = None  # the text of the call that is being written
        self._call_id = ""
        self._arguments: PartialArguments | None = None  # follows it, where it is no draft
        self._streamed_arguments = ""  # of the call in work, or the last
        self._partial_calls = calls is not None and calls.partial
        self._drafts: list[ToolCall] = []  # calls that are the last in the thinking, so far
        self._draft_text = ""
        self._draft_tokens = 0
        self._bare = calls.format.bare if calls else ()
        self._bare_held = ""  # may be the beginning of a call without its tag
        self._untagged = False  # whether the call in work, or the last, had none

    @property
    def details(self) -> dict[str, str]:
        """What `Finish` tells of the text: the stop string that ended it, and a warning."""
        told = {"stop": self.stopped_by, "warning": self.warning}
        return {name: words for name, words in told.items() if words is not None}

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next ids of the generation."""
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
                self._untagged = False  # its call is closed already
            else:
                self._take_note(token)
                self.reasoning_tokens += self._inside
                self._draft_tokens += self._inside
                self._emit_section(self._detokenizer.add(token))

    def add_logprob(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> None:
        """Hear how likely the next token was that `advance` will be told of."""
        alternatives = [(self._tokenizer.token_bytes(one), chance) for one, chance in top]
        self._note = TokenLogprob(self._tokenizer.token_bytes(token), logprob, alternatives)

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens, all bytes of a character that is not finished."""
        self._detokenizer.rewind(count)
        self.reasoning_tokens -= count * self._inside
        if self._notes:
            del self._notes[-count:]

    def close(self, *, cut: bool = False) -> None:
        """Say what is still held back; nothing comes after.

        `cut` says that the reply did not end by itself, so the thinking might have gone on.
        """
        if not self.finished:
            self._emit_section(self._detokenizer.flush())
            if self._call is not None:
                self._close_call("", at_the_end=True)
            if cut:
                self._drop_drafts()
            if self._drafts:  # the reply ends with them: they were meant
                self.reasoning_tokens -= self._draft_tokens
                for call in self._drafts:
                    self._emit_call(call)
            elif self._inside:
                self._end_reasoning()
            else:
                self._end_answer()
        if self.logprob_of_end and self._note:
            self._tell(Text("", (self._note,)))
            self._note = None
        self.finished = True

    def _take_note(self, token: int) -> None:
        if self._notes is not None:
            self._notes.append(self._note or TokenLogprob(self._tokenizer.token_bytes(token), 0.0))
            self._note = None

    def _emit(self, kind: type[Reasoning] | type[Text], text: str) -> None:
        self._tell(kind(text, tuple(self._notes or ())))
        self._forget_notes()

    def _forget_notes(self) -> None:
        """Forget the notes of tokens that are format, or part of a call."""
        if self._notes:
            self._notes = []

    def _may_open(self) -> bool:
        """Whether a tag opens the thinking, or repeats what has just opened it."""
        return self._at_seam and not self._draft_text if self._inside else not self._answering

    def _switch_section(self, *, inside: bool) -> None:
        self._emit_section(self._detokenizer.flush())
        self._note = None  # that of the tag
        self._abandon_call()
        if inside and not self._inside:
            self._end_answer()
        self._answering |= self._inside and not inside
        self._inside, self._at_seam, self._breaks = inside, True, ""

    def _emit_section(self, text: str) -> None:
        """Say text, wherever it belongs: to a call, the thinking or the answer."""
        if self._call is not None:
            rest = self._take_rest_of_bare_call(text) if self._untagged else None
            self._stream_arguments(text[: len(text) - len(rest or "")])
            if rest is not None:
                self._close_call("")
                self._emit_section(rest)
            elif self._untagged and self._arguments and self._arguments.broken:
                self._release_bare_call()
            return
        if self._drafts and not text.strip():
            self._draft_text += text
            return
        self._drop_drafts()
        if self._at_seam:
            text = text.lstrip("\n")
            self._at_seam = not text
            if self._at_seam:
                self._forget_notes()
        if self._inside:
            self._emit_reasoning(text)
        elif text:
            self._emit_answer(text)

    def _emit_reasoning(self, text: str) -> None:
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
        """Return what can be said of the text, and from where a call without its tag begins."""
        text, self._bare_held = self._bare_held + text, ""
        place = text.find("<")
        while place >= 0:
            if text.startswith(self._bare, place):
                return text[:place], text[place:]
            rest = text[place:]
            if any(begin.startswith(rest) for begin in self._bare):
                self._bare_held = text[place:]
                return text[:place], ""
            place = text.find("<", place + 1)
        return text, ""

    def _emit_text(self, text: str) -> None:
        if self._calls:  # which may follow: then the line break before it is format
            text = self._breaks + text
            kept = text.rstrip("\n")
            self._breaks, text = text[len(kept) :], kept
        if text:
            self._emit(Text, text)

    def _end_reasoning(self) -> None:
        if self._breaks and not self._at_seam:
            self._emit(Reasoning, self._breaks)

    def _end_answer(self) -> None:
        held, self._bare_held = self._bare_held, ""
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
            held, self._bare_held = self._bare_held, ""
            self._emit_text(self._stop.add(held) + self._stop.flush())
            self._breaks_before_call, self._breaks = self._breaks, ""
        assert self._calls
        self._call, self._untagged, self._streamed_arguments = [], False, ""
        self._call_id = f"call_{secrets.token_hex(12)}"
        self._arguments = None if self._inside else self._calls.format.follow()

    def _take_rest_of_bare_call(self, text: str) -> str | None:
        """Return what of `text` stands behind the end of a call without its tag, if it ends."""
        assert self._calls and self._call is not None
        if _END not in "".join(self._call[-len(_END) :]) + text:  # each piece has a character
            return None
        before = "".join(self._call)
        written, end = before + text, max(0, len(before) + 1 - len(_END))
        while (place := written.find(_END, end)) >= 0:
            end = place + len(_END)
            if self._calls.format.read(written[:end], whole=False):  # it stands in no value
                return written[end:]
        return None

    def _release_bare_call(self) -> None:
        """Make text of a call without its tag that was none; one may begin further on."""
        assert self._call is not None
        text, self._call, self._untagged = "".join(self._call), None, False
        self.warning, self._breaks = _UNREADABLE, self._breaks_before_call
        self._emit_up_to_stop(text[0])
        if not self.finished:
            self._emit_section(text[1:])

    def _stream_arguments(self, text: str) -> None:
        """Take text of the call in work, and stream what it makes certain of the arguments."""
        assert self._call is not None
        if not text:
            return
        self._call.append(text)
        if self._arguments and (piece := self._arguments.add(text)):
            self._streamed_arguments += piece
            if self._partial_calls:
                self._tell(ToolCallDelta(self._call_id, self._arguments.name or "", piece))

    def _close_call(self, end: str, *, at_the_end: bool = False) -> None:
        """Read the call that was written, and closed by `end` or by something else."""
        assert self._calls and self._call is not None
        written, self._call = "".join(self._call) + self._detokenizer.flush(), None
        call = self._calls.read(written, whole=bool(end))
        text = written if self._untagged else f"{OPEN}{written}{end}"
        if call and (streamed := self._streamed_arguments):
            assert self._arguments
            call = replace(call, id=self._call_id)
            if call.name != self._arguments.name or not call.raw_arguments.startswith(streamed):
                call = None  # a key came twice: what can be read in two ways is not acted on
        if call is None:
            self._drop_drafts()
            self._emit_unreadable(text)
            if at_the_end:
                self.cut_off, self.warning = True, _CUT_OFF
        elif self._inside:
            self._drafts.append(call)
            self._draft_text += text
        else:
            self._emit_call(call)

    def _abandon_call(self) -> None:
        """Make text of calls after which the thinking ends, or of one into which it breaks."""
        self._drop_drafts()
        if self._call is not None:
            self._emit_unreadable(OPEN + "".join(self._call))

    def _emit_unreadable(self, text: str) -> None:
        self._call, self._at_seam = None, False
        if self._inside:
            self._emit_reasoning(text)
        else:
            self.warning = _UNREADABLE
            if self._partial_calls and self._streamed_arguments and not self._untagged:
                self._forget_notes()  # it was streamed as a call that never ends
            else:
                self._breaks = self._breaks_before_call
                self._emit_text(text)

    def _drop_drafts(self) -> None:
        text, self._draft_text, self._drafts = self._draft_text, "", []
        if text:
            self._emit_reasoning(text)

    def _emit_call(self, call: ToolCall) -> None:
        self.called, self._at_seam, self._breaks = True, True, ""
        self._forget_notes()
        if self._partial_calls:
            rest = call.raw_arguments[len(self._streamed_arguments) :]
            self._tell(ToolCallDelta(call.id, call.name, rest))
        self._tell(call)
