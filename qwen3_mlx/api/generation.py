"""One reply in the engine: its parser and constraints, and its tokens as events.

Text and engine meet here. After the reply, the prompt of the next turn is prefilled in idle time.
"""

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from threading import Event as Flag
from threading import Thread

from qwen3_mlx.api.prepared_request import PreparedRequest
from qwen3_mlx.api.prompts import (
    has_content,
    render_whole,
)
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.api.text_processor import TextProcessor
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.hooks import Constraint
from qwen3_mlx.engine.request import Request, RequestResult, SampledLogprob
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.events import Event, Finish, Usage
from qwen3_mlx.text.logprobs import ScoredPrompt, TextLogprobs
from qwen3_mlx.text.messages import normalise
from qwen3_mlx.text.parser import ReplyParser
from qwen3_mlx.text.sections import SectionTracker
from qwen3_mlx.text.structured import GrammarConstraint, ToolCallRule
from qwen3_mlx.text.thinking_budget import ThinkingBudget

Deliver = Callable[[Event | BaseException], None]
"""Receives each event of a reply, or the error that ends it; runs on the worker thread."""

OnEnd = Callable[[ReplyBuilder], None]
"""Receives the collected reply before its last event is delivered; runs on the worker thread."""

_PLACEHOLDERS = "?", "\n\n!"  # texts of a next turn that have no beginning in common
_LONG = 100_000  # characters of a prompt; encoding more on the worker thread would stall the batch
_MAX_READ_AHEAD = 4096  # tokens prefilled in idle time


class ReplyEvents:
    """Delivers the events of one reply, and collects them for what follows its end."""

    def __init__(self, prepared: PreparedRequest, deliver: Deliver, on_end: OnEnd | None) -> None:
        self.ended = False
        # Collected only for what reads it: most replies are collected by their readers.
        collects = on_end or prepared.options.prefetch_next_turn
        self.collected = ReplyBuilder(prepared.continued) if collects else None
        self._deliver = deliver
        self._on_end = on_end

    def emit(self, event: Event | BaseException) -> None:
        """Deliver an event, or the error that ends the reply."""
        if self.collected:
            self.collected.add(event)
        if isinstance(event, Finish | BaseException):
            self.ended = True
            if self.collected and self._on_end:
                try:
                    self._on_end(self.collected)
                except BaseException as error:  # noqa: BLE001 - it replaces the last event
                    event = error
        self._deliver(event)


class Generation:
    """One reply in the engine, from its request to its last event."""

    def __init__(
        self,
        processor: TextProcessor,
        engine: Engine,
        prepared: PreparedRequest,
        deliver: Deliver,
        on_end: OnEnd | None,
    ) -> None:
        """Create what follows the reply: parser, thinking budget and grammars."""
        options, tokenizer = prepared.options, processor.tokenizer
        self._processor = processor
        self._engine = engine
        self._prepared = prepared
        self._events = ReplyEvents(prepared, deliver, on_end)
        self._failures: list[str] = []  # of the grammars of calls; filled while the reply runs
        self._sections = SectionTracker(
            tokenizer,
            prepared.thinking,
            inside=prepared.inside,
            begun=prepared.continued is not None and has_content(prepared.continued),
            end_ids=prepared.end_ids,
        )
        self._logprobs = None
        if options.logprobs is not None:
            # Scoring a prompt reports every token, the end token too.
            self._logprobs = TextLogprobs(tokenizer, with_end=prepared.score_prompt)
        self._parser = ReplyParser(
            self._sections,
            self._events.emit,
            stop=options.stop_strings,
            calls=prepared.calls,
            logprobs=self._logprobs,
        )
        self._budget = ThinkingBudget(
            tokenizer,
            prepared.thinking,
            self._sections,
            prepared.limits,
            end_ids=prepared.end_ids,
            # A call that stands in the thinking is not constrained: it may be any call, in any
            # number. Where a call is demanded, or only one allowed, it cannot end the thinking.
            calls=prepared.calls if prepared.calls and not options.constrains_calls else None,
        )
        self.finish_thinking = self._budget.finish_thinking

    def request(self, cancelled: Flag) -> Request:
        """Return the request to the engine, whose callbacks are this generation's."""
        prepared, options = self._prepared, self._prepared.options
        constrained = prepared.answer_grammar is not None or prepared.calls is not None
        return Request(
            ids=prepared.ids,
            sampling=prepared.sampling,
            max_tokens=prepared.room,
            seed=secrets.randbits(32) if options.seed is None else options.seed,
            end_ids=prepared.end_ids,
            sink=self._parser,
            on_finish=self.on_finish,
            progress=options.progress,
            constraint=self._with_grammars() if constrained else self._budget,
            cancelled=cancelled,
            on_logprobs=self.on_logprobs if self._logprobs else None,
            on_prompt_logprobs=self._prompt_scorer() if prepared.score_prompt else None,
            top_logprobs=options.logprobs or 0,
            recheck_logits=self._budget.looped,
            client=prepared.client,
            adapter=prepared.adapter,
        )

    def on_logprobs(self, sampled: SampledLogprob) -> None:
        """Record the log probability of the token that the parser receives next."""
        if self._logprobs:
            self._logprobs.record((sampled.token, sampled.logprob, sampled.top))

    def on_finish(self, result: RequestResult | BaseException) -> None:
        """Emit the last event: `Finish`, or the error that has ended the reply."""
        try:
            if isinstance(result, BaseException):
                raise result
            self._finish(result)
        except BaseException as error:
            if self._events.ended:
                raise
            self._events.emit(error)

    def _finish(self, result: RequestResult) -> None:
        prepared, parser = self._prepared, self._parser
        parser.close(cut=result.reason != "stop")
        usage = Usage(
            len(prepared.ids),
            result.cached_tokens,
            result.completion_tokens,
            parser.reasoning_tokens,
        )
        reason = self._finish_reason(result)
        details = parser.details | self._budget.details | prepared.details
        warnings = [prepared.details.get("warning"), *dict.fromkeys(self._failures), parser.warning]
        if warning := "; ".join(filter(None, warnings)):
            details["warning"] = warning
        if self._engine.speculates:
            details |= {
                "forward_passes": str(result.passes),
                "drafted_tokens": str(result.proposed),
                "accepted_tokens": str(result.accepted),
            }
        self._events.emit(Finish(reason, usage, details))
        if prepared.options.prefetch_next_turn and reason in ("stop", "length"):
            if len(prepared.prompt) < _LONG:
                self._prefetch_next_turn()
            else:  # this is the worker thread, which must not encode a long prompt
                Thread(target=self._prefetch_next_turn, name="qwen3-ahead", daemon=True).start()

    def _finish_reason(self, result: RequestResult) -> str:
        """Return the finish reason: the engine's, refined by what the parser found."""
        if result.reason != "stop":
            return result.reason
        if self._parser.cut_off:
            return "length" if self._budget.finished else "stop"  # cut off by the loop guard
        return "tool_calls" if self._parser.called else "stop"

    def _with_grammars(self) -> Constraint:
        """Return the thinking budget within a constraint that the answer or a call follows."""
        prepared, answer, rule = self._prepared, self._prepared.answer_grammar, None
        if prepared.calls and prepared.call_grammar:
            rule = ToolCallRule(
                prepared.calls,
                partial(prepared.call_grammar.copy, self._failures),
                must=prepared.options.must_call,
                only_one=not prepared.options.parallel_tool_calls,
            )
        return GrammarConstraint(
            self._budget,
            self._sections,
            self._processor.tokenizer,
            thinks=prepared.thinks,
            max_tokens=prepared.room,
            answer=answer and answer.copy([]),  # each reply has a state of its own
            calling=rule,
        )

    def _prompt_scorer(self) -> Callable[[Sequence[SampledLogprob]], None]:
        ids, events = self._prepared.ids, self._events
        scored = ScoredPrompt(self._processor.tokenizer, ids, events.emit)

        def add(logprobs: Sequence[SampledLogprob]) -> None:
            scored.add((token.token, token.logprob, token.top) for token in logprobs)

        return add

    def _prefetch_next_turn(self) -> None:
        """Submit the beginning of the next turn's prompt for prefill in idle time.

        The template decides what that beginning is. Two prompts with different texts of the user
        are rendered; their common prefix is what any next turn begins with.
        """
        prepared, reply = self._prepared, self._events.collected
        assert reply
        before = prepared.messages[:-1] if prepared.continued else prepared.messages
        try:
            history = normalise([*before, reply.message()])
            first, second = (
                self._processor.tokenizer.encode(
                    render_whole(
                        self._processor,
                        [*history, {"role": "user", "content": text}],
                        prepared.options.thinking,
                        prepared.tools,
                        add_generation_prompt=False,
                    )
                )
                for text in _PLACEHOLDERS
            )
            ids = first[: common_prefix(first, second)]
            new = len(ids) - len(prepared.ids)  # about as many are not in the KV cache yet
            if len(ids) < self._engine.context and new <= _MAX_READ_AHEAD:
                self._engine.prefetch(ids, prepared.adapter)
        except Qwen3Error:  # the template refuses such a turn, or the engine is closed by now
            return
