"""Generation: turns messages and options into an engine request, and its tokens into events.

Text and engine meet here. Prompts are rendered and encoded, the parser and the constraints of a
reply are assembled, and the prompt of the next turn is prefilled in idle time.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Event as Flag
from threading import Thread
from typing import Any

from qwen3_mlx.api.context_window import MAX_COUNTED, Window
from qwen3_mlx.api.options import GenerationOptions
from qwen3_mlx.api.prompts import (
    begun,
    has_content,
    no_turn_message,
    render,
    render_begun,
    render_whole,
    thinking_of,
)
from qwen3_mlx.api.stream import ReplyBuilder, StartedReply
from qwen3_mlx.api.text_processor import TextProcessor
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.hooks import Constraint
from qwen3_mlx.engine.request import Request, RequestResult, SampledLogprob
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.events import Event, Finish, Usage
from qwen3_mlx.text.fair_queue import LOCAL_CALLER, Caller
from qwen3_mlx.text.grammar import GrammarState
from qwen3_mlx.text.logprobs import ScoredPrompt, TextLogprobs
from qwen3_mlx.text.messages import Message, normalise, without_empty_end
from qwen3_mlx.text.parser import ReplyParser
from qwen3_mlx.text.sections import SectionTracker
from qwen3_mlx.text.structured import GrammarConstraint, ToolCallRule
from qwen3_mlx.text.thinking import Thinking, soft_switch
from qwen3_mlx.text.thinking_budget import ThinkingBudget, ThinkingLimits
from qwen3_mlx.text.tool_calls import ToolCallSyntax

Deliver = Callable[[Event | BaseException], None]
"""Receives each event of a reply, or the error that ends it; runs on the worker thread."""

OnEnd = Callable[[ReplyBuilder], None]
"""Receives the collected reply before its last event is delivered; runs on the worker thread."""

_PLACEHOLDERS = "?", "\n\n!"  # texts of a next turn that have no beginning in common
_LONG = 100_000  # characters of a prompt; encoding more on the worker thread would stall the batch
_MAX_READ_AHEAD = 4096  # tokens prefilled in idle time


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is validated and complete: `ReplyGenerator.start` only submits it.

    Several replies can be started from one; each has copies of what has state.

    Attributes:
        prompt: the rendered text, or the ids of a raw prompt.
        ids: the token ids of the prompt.
        options: the options of the request; a copy may have another `seed` and `progress`.
        room: the most tokens of the reply; 0 only prefills the prompt.
        sampling: the sampling parameters, none of them None; those of `options` are among them.
        end_ids: the tokens that end the reply.
        limits: limits of the thinking, and whether loops are detected.
        thinking: the thinking modes of the checkpoint; None for raw text, whose tags are text.
        thinks: True if the reply begins with thinking.
        inside: True if the prompt ends inside the thinking.
        continued: the assistant's message that the reply continues, if any.
        messages: the normalised messages that the prompt was rendered from.
        tools: the descriptions of the tools.
        calls: how this checkpoint writes tool calls, if it is offered tools.
        answer_grammar: grammar of the answer; each reply gets a copy.
        call_grammar: grammar of a tool call; each call gets a copy.
        details: details that `Finish` passes on.
        client: key of the client, for fair scheduling.
        score_prompt: True if the first event is the prompt's own log probabilities.
    """

    prompt: str | Sequence[int]
    ids: Sequence[int]
    options: GenerationOptions
    room: int
    sampling: SamplingParams
    end_ids: frozenset[int]
    limits: ThinkingLimits
    thinking: Thinking | None = None
    thinks: bool = False
    inside: bool = False
    continued: Message | None = None
    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    calls: ToolCallSyntax | None = None
    answer_grammar: GrammarState | None = None
    call_grammar: GrammarState | None = None
    details: dict[str, str] = field(default_factory=dict)
    client: str = ""
    score_prompt: bool = False


class ReplyGenerator:
    """Prepares and starts the replies of one checkpoint on one engine."""

    def __init__(self, processor: TextProcessor, engine: Engine) -> None:
        self.engine = engine
        self.processor = processor
        self.window = Window(processor, engine)

    def text(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions,
        caller: Caller = LOCAL_CALLER,
        *,
        clamp_max_tokens: bool = False,
        prefill_only: bool = False,
        score_prompt: bool = False,
    ) -> PreparedRequest:
        """Prepare the continuation of raw text or of token ids.

        With `prefill_only` nothing is generated. Raises what `Window.encode`, `Window.room` and
        `GenerationOptions.answer_grammar` raise.
        """
        processor, ids = self.processor, self.window.encode(prompt)
        max_tokens, min_room = (0, 0) if prefill_only else (options.max_tokens, 1)
        room = self.window.room(len(ids), max_tokens, min_room, clamp_max_tokens=clamp_max_tokens)
        defaults = processor.sampling.text
        return PreparedRequest(
            prompt,
            ids,
            options,
            room,
            sampling=options.sampling.over(defaults) if options.sampling else defaults,
            end_ids=processor.end_ids,
            limits=ThinkingLimits(None, None, options.loop_guard),
            answer_grammar=options.answer_grammar(processor.grammars, caller),
            client=caller.client,
            score_prompt=score_prompt,
        )

    def chat(
        self,
        messages: str | Sequence[Message],
        options: GenerationOptions,
        caller: Caller = LOCAL_CALLER,
        *,
        min_room: int = 1,
        clamp_max_tokens: bool = False,
    ) -> PreparedRequest:
        """Prepare a reply to a conversation; `caller` may cancel it meanwhile.

        The context window must have `min_room` tokens left for the reply. With `clamp_max_tokens`,
        `max_tokens` is reduced to the tokens that are left, instead of refused.

        Raises:
            ValueError: the last message is the assistant's and is not, or cannot be, continued, or
                the options leave no room for an answer.
            ContextError: prompt and reply do not fit the context window.
            Qwen3Error: the checkpoint cannot honour an option.
        """
        processor = self.processor
        history, thinks, inside = self._turn(messages, options)
        continued = history[-1] if options.continue_last else None
        tools, calls = self._calls(options) if options.tools is not None else ([], None)
        render_prompt = render_begun if continued else render_whole
        prompt = render_prompt(processor, history, options.thinking, tools)
        ids = self.window.encode(prompt)
        room = self.window.room(
            len(ids), options.max_tokens, min_room, clamp_max_tokens=clamp_max_tokens
        )
        answer = options.answer_grammar(processor.grammars, caller)
        call_grammar = self._call_grammar(calls, tools, options, caller) if calls else None
        warnings = [*call_grammar.warnings] if call_grammar else []
        if answer and options.must_call:
            answer = None
            warnings.append("a tool call is required, so the form of the answer was ignored")
        if continued and options.thinking and not inside:
            warnings.append("the answer had begun, so it was continued without thinking")
        return PreparedRequest(
            prompt,
            ids,
            options,
            room,
            sampling=self._sampling(options, history, thinks, continued),
            end_ids=processor.end_ids | processor.turn_end_ids,
            limits=self._limits(options, room, thinks, answer, calls),
            thinking=processor.thinking,
            thinks=thinks,
            inside=inside,
            continued=continued,
            messages=history,
            tools=tools,
            calls=calls,
            answer_grammar=answer,
            call_grammar=call_grammar,
            details={"warning": "; ".join(warnings)} if warnings else {},
            client=caller.client,
        )

    def count_tokens(self, messages: str | Sequence[Message], options: GenerationOptions) -> int:
        """Return the number of tokens of a prompt; see `LLM.count_tokens`."""
        history = normalise(messages)
        self.window.check(history, MAX_COUNTED)
        prompt = render(
            self.processor,
            history,
            options.thinking,
            options.described_tools(),
            continue_last=options.continue_last,
        )
        return len(self.window.encode(prompt))

    def start(
        self,
        prepared: PreparedRequest,
        deliver: Deliver,
        cancelled: Flag,
        on_end: OnEnd | None = None,
    ) -> StartedReply:
        """Submit a prepared request to the engine; setting `cancelled` ends the reply."""
        generation = Generation(self.processor, self.engine, prepared, deliver, on_end)
        self.engine.submit(generation.request(cancelled))
        return StartedReply(
            len(prepared.ids), prepared.room, generation.finish_thinking, prepared.continued
        )

    def _turn(
        self, messages: str | Sequence[Message], options: GenerationOptions
    ) -> tuple[list[dict[str, Any]], bool, bool]:
        """Return the normalised messages, and whether the reply thinks and begins inside that."""
        thinking = self.processor.thinking
        thinks = thinking.resolve(options.thinking)
        history = without_empty_end(normalise(messages))
        self.window.check(history)  # cheap: refuses far too long prompts before rendering them
        if options.continue_last:
            history = begun(history)
            inside = not history[-1]["content"]
            if inside and not thinks:
                raise ValueError("the thinking of the last message needs thinking to be continued")
            return history, inside, inside
        if history[-1]["role"] == "assistant":
            raise ValueError(no_turn_message(history[-1]))
        if options.thinking_budget is not None and not thinks:
            raise Qwen3Error("this checkpoint cannot think; leave thinking_budget out")
        return history, thinks, thinks and thinking.opens_in_prompt

    def _calls(
        self, options: GenerationOptions
    ) -> tuple[Sequence[Mapping[str, Any]], ToolCallSyntax | None]:
        """Return the descriptions of the tools that may be called, and the syntax of calls."""
        processor = self.processor
        if not (tools := options.described_tools()):
            return tools, None
        calls = ToolCallSyntax.of(
            processor.template, processor.tokenizer, tools, partial=options.partial_calls
        )
        if calls is None:
            raise Qwen3Error("this checkpoint cannot call tools; leave tools out")
        return tools, calls

    def _call_grammar(
        self,
        calls: ToolCallSyntax,
        tools: Sequence[Mapping[str, Any]],
        options: GenerationOptions,
        caller: Caller,
    ) -> GrammarState:
        named = [tool for tool in tools if tool["function"]["name"] == options.tool_choice]
        return calls.grammar(self.processor.grammars.for_caller(caller), named or tools)

    def _sampling(
        self,
        options: GenerationOptions,
        history: Sequence[Message],
        thinks: bool,
        continued: Message | None,
    ) -> SamplingParams:
        """Return the sampling parameters, with the defaults of the mode."""
        if continued:
            thinks = bool(thinking_of(continued))
        elif thinks and self.processor.thinking.hybrid:
            # The model itself obeys /think and /no_think; here they choose the defaults only.
            switched = soft_switch(history)
            thinks = thinks if switched is None else switched
        defaults = self.processor.sampling.thinking if thinks else self.processor.sampling.direct
        return options.sampling.over(defaults) if options.sampling else defaults

    def _limits(
        self,
        options: GenerationOptions,
        room: int,
        thinks: bool,
        answer: GrammarState | None,
        calls: ToolCallSyntax | None,
    ) -> ThinkingLimits:
        """Return the limits of the thinking; what must follow it keeps its room."""
        budget = options.thinking_budget if thinks else None
        # A budget is refused only if the request's own max_tokens leaves no room for it. If the
        # context window is what ends, the budget gives way.
        bends = budget is None or options.thinking_budget_bends or room != options.max_tokens
        if thinks and budget is None and (answer or (calls and options.constrains_calls)):
            budget = room
        if budget is None and options.thinking_budget_message is None:
            return ThinkingLimits(None, None, options.loop_guard)
        return ThinkingLimits.of(
            self.processor.tokenizer,
            self.processor.thinking,
            budget=budget,
            message=options.thinking_budget_message,
            max_tokens=room,
            guard=options.loop_guard,
            min_answer=len(answer.closing() or ()) + 1 if answer and budget is not None else 1,
            bends=bends,
        )


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
                self._engine.prefetch(ids)
        except Qwen3Error:  # the template refuses such a turn, or the engine is closed by now
            return
