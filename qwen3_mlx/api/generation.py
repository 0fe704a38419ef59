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

from qwen3_mlx.api.context_window import MOST_COUNTED, Window
from qwen3_mlx.api.options import GenerationOptions
from qwen3_mlx.api.prompts import (
    TextProcessor,
    begun,
    has_content,
    no_turn_message,
    render,
    render_begun,
    render_whole,
    thinking_of,
)
from qwen3_mlx.api.stream import ReplyBuilder, StartedReply
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.hooks import Constraint
from qwen3_mlx.engine.request import Request, RequestResult, SampledLogprob
from qwen3_mlx.engine.sampling_params import SamplingParams, sampling_defaults
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.events import Event, Finish, Usage
from qwen3_mlx.text.fair_queue import PATIENT, Caller
from qwen3_mlx.text.grammar import GrammarState
from qwen3_mlx.text.messages import Message, normalise, without_empty_end
from qwen3_mlx.text.parser import ReplyParser
from qwen3_mlx.text.prompt_logprobs import ScoredPrompt
from qwen3_mlx.text.structured import GrammarConstraint, ToolCallRule
from qwen3_mlx.text.thinking import soft_switch
from qwen3_mlx.text.thinking_budget import ThinkingBudget, ThinkingLimits
from qwen3_mlx.text.tool_calls import ToolCallSyntax

_PLACEHOLDERS = "?", "\n\n!"  # texts of a next turn that have no beginning in common
_LONG = 100_000  # characters of a prompt; encoding more on the worker thread would stall the batch
_MAX_READ_AHEAD = 4096  # tokens prefilled in idle time


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A validated request: prompt, token ids, options and compiled grammars.

    Attributes:
        prompt: the rendered text, or the ids of a raw prompt.
        ids: the token ids of the prompt.
        thinks: whether the reply begins with thinking; None for raw text.
        draws_as_thinking: whether the sampling defaults of the thinking mode apply.
        asked: the options of the request.
        inside: True if the prompt ends inside the thinking.
        continued: the assistant's message that the reply continues, if any.
        messages: the normalised messages that the prompt was rendered from.
        tools: the descriptions of the tools.
        calls: how this checkpoint writes tool calls, if it is offered tools.
        form: grammar of the answer; each reply gets a copy.
        call_grammar: grammar of a tool call; each call gets a copy.
        details: details that `Finish` passes on.
        least_room: tokens that the context window must have left for the reply.
        clamp_max_tokens: True if `max_tokens` is reduced to the room that is left, instead of
        refused. client: key of the client, for fair scheduling.
        score_prompt: True if the first event is the prompt's own log probabilities.
        only_read: True if the prompt is prefilled and nothing generated.
    """

    prompt: str | Sequence[int]
    ids: Sequence[int]
    thinks: bool | None
    samples_as_thinking: bool
    options: GenerationOptions
    inside: bool = False
    continued: Message | None = None
    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    calls: ToolCallSyntax | None = None
    form: GrammarState | None = None
    call_grammar: GrammarState | None = None
    details: dict[str, str] = field(default_factory=dict)
    min_room: int = 1
    clamp_max_tokens: bool = False
    client: str = ""
    score_prompt: bool = False
    prefill_only: bool = False

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of the reply; None is all that the context window has room for."""
        return 0 if self.prefill_only else self.options.max_tokens


class ReplyGenerator:
    """Prepares and starts the replies of one checkpoint on one engine."""

    def __init__(self, words: TextProcessor, engine: Engine) -> None:
        self.engine = engine
        self.words = words
        self.window = Window(words, engine)

    def text(
        self, prompt: str | Sequence[int], options: GenerationOptions, caller: Caller = PATIENT
    ) -> PreparedRequest:
        """Prepare the continuation of raw text or of token ids.

        Raises what `Window.fitting` and `GenerationOptions.form` raise.
        """
        ids = self.window.fitting(prompt)
        form = options.form(self.words.grammars.for_caller(caller))
        return PreparedRequest(prompt, ids, None, False, options, form=form)

    def chat(
        self,
        messages: str | Sequence[Message],
        options: GenerationOptions,
        caller: Caller = PATIENT,
    ) -> PreparedRequest:
        """Prepare a reply to a conversation; `caller` may cancel it meanwhile.

        Raises:
            ValueError: the last message is the assistant's and is not, or cannot be, continued.
            ContextError: the prompt does not fit the context window.
            Qwen3Error: the checkpoint cannot honour an option.
        """
        words = self.words
        thinks = words.thinking.resolve(options.thinking)
        history = without_empty_end(normalise(messages))
        self.window.check(history)  # cheap: refuses far too long prompts before rendering them
        continued, inside = None, thinks and words.thinking.opens_in_prompt
        if options.continue_last:
            history = begun(history)
            continued, inside = history[-1], not history[-1]["content"]
            if inside and not thinks:
                raise ValueError("the thinking of the last message needs thinking to be continued")
            thinks = inside
        elif history[-1]["role"] == "assistant":
            raise ValueError(no_turn_message(history[-1]))
        if options.thinking_budget is not None and not thinks and not continued:
            raise Qwen3Error("this checkpoint cannot think; leave thinking_budget out")
        tools = options.described_tools()
        named = [tool for tool in tools if tool["function"]["name"] == options.tool_choice]
        calls = (
            ToolCallSyntax.of(words.template, words.tokenizer, tools, partial=options.partial_calls)
            if tools
            else None
        )
        if tools and calls is None:
            raise Qwen3Error("this checkpoint cannot call tools; leave tools out")
        render_prompt = render_begun if continued else render_whole
        prompt = render_prompt(words, history, options.thinking, tools)
        ids = self.window.fitting(prompt)
        grammars = words.grammars.for_caller(caller)
        form = options.form(grammars)
        call_grammar = calls.grammar(grammars, named or tools) if calls else None
        warnings = [*call_grammar.warnings] if call_grammar else []
        # The model itself obeys /think and /no_think; here they choose the sampling defaults only.
        switched = soft_switch(messages) if thinks and words.thinking.hybrid else None
        samples_as_thinking = thinks if switched is None else switched
        if options.must_call and form:
            warnings.append("a tool call is required, so the form of the answer was ignored")
        if continued:
            samples_as_thinking = bool(thinking_of(continued))
            if options.thinking and not inside:
                warnings.append("the answer had begun, so it was continued without thinking")
        return PreparedRequest(
            prompt,
            ids,
            thinks,
            samples_as_thinking,
            options,
            inside=inside,
            continued=continued,
            messages=history,
            tools=tools,
            calls=calls,
            form=None if options.must_call else form,
            call_grammar=call_grammar,
            details={"warning": "; ".join(warnings)} if warnings else {},
        )

    def count_tokens(self, messages: str | Sequence[Message], options: GenerationOptions) -> int:
        """Return the number of tokens of a prompt; see `LLM.count_tokens`."""
        history = normalise(messages)
        self.window.check(history, MOST_COUNTED)
        prompt = render(
            self.words,
            history,
            options.thinking,
            options.described_tools(),
            continue_last=options.continue_last,
        )
        return len(self.window.encode(prompt))

    def start(
        self,
        prepared: PreparedRequest,
        deliver: Callable[[Event | BaseException], None],
        cancelled: Flag,
        on_end: Callable[[ReplyBuilder], None] | None = None,
    ) -> StartedReply:
        """Submit a prepared request to the engine.

        `deliver` gets each event, or the error that ends the reply. `on_end` gets the collected
        reply before `deliver` gets the last event. Both run on the worker thread.

        Raises what `Window.room` and `ThinkingLimits.of` raise.
        """
        words, options, reply = self.words, prepared.options, ReplyBuilder(prepared.continued)

        def emit(event: Event | BaseException) -> None:
            reply.add(event)
            if on_end and isinstance(event, Finish | BaseException):
                # An error of the callback replaces the last event: a reply ends exactly once.
                event = _error_of(partial(on_end, reply)) or event
            deliver(event)

        ids = prepared.ids
        room = self.window.room(
            len(ids),
            prepared.max_tokens,
            prepared.min_room,
            clamp_max_tokens=prepared.clamp_max_tokens,
        )
        thinking = None if prepared.thinks is None else words.thinking
        parser = ReplyParser(
            words.tokenizer,
            emit,
            thinking=thinking,
            inside=prepared.inside,
            begun=has_content(prepared.continued),
            stop=options.stop_strings,
            calls=prepared.calls,
            logprobs=options.logprobs is not None,
        )
        parser.logprob_of_end = (
            prepared.score_prompt
        )  # scoring reports every token, the end token too
        form = prepared.form and prepared.form.copy(
            []
        )  # a grammar has state, so each reply has its own
        budget = self._thinking_budget(prepared, room, form)
        failures: list[str] = []  # of the grammars of calls; filled while the reply runs

        def finish(result: RequestResult | BaseException) -> None:
            if isinstance(result, BaseException):
                raise result
            parser.close(cut=result.reason != "stop")
            usage = Usage(
                len(ids), result.cached_tokens, result.completion_tokens, parser.reasoning_tokens
            )
            reason = _finish_reason(result, parser, looped=budget.finished)
            details = parser.details | budget.details | prepared.details
            warnings = [prepared.details.get("warning"), *dict.fromkeys(failures), parser.warning]
            if warning := "; ".join(filter(None, warnings)):
                details["warning"] = warning
            if self.engine.speculates:
                details |= {
                    "forward_passes": str(result.passes),
                    "drafted_tokens": str(result.proposed),
                    "accepted_tokens": str(result.accepted),
                }
            emit(Finish(reason, usage, details))
            if options.prefetch_next_turn and reason in ("stop", "length"):
                job = partial(self._read_ahead, prepared, reply.message(), len(ids))
                if len(prepared.prompt) < _LONG:
                    job()
                else:  # this is the worker thread, which must not encode a long prompt
                    Thread(target=job, name="qwen3-ahead", daemon=True).start()

        def add_logprob(sampled: SampledLogprob) -> None:
            parser.add_logprob(sampled.token, sampled.logprob, sampled.top)

        defaults = sampling_defaults(
            words.sampling,
            thinking=prepared.samples_as_thinking,
            hybrid=thinking is not None and thinking.hybrid,
        )
        request = Request(
            ids=ids,
            sampling=(options.sampling or SamplingParams()).over(defaults),
            max_tokens=room,
            seed=secrets.randbits(32) if options.seed is None else options.seed,
            end_ids=self._end_ids(prepared),
            sink=parser,
            on_finish=partial(_finish_once, finish, reply, emit),
            progress=options.progress,
            constraint=self._constraint(prepared, room, budget, form, failures),
            cancelled=cancelled,
            on_logprobs=None if options.logprobs is None else add_logprob,
            on_prompt_logprobs=self._prompt_scorer(ids, emit) if prepared.score_prompt else None,
            top_logprobs=options.logprobs or 0,
            recheck_logits=lambda: budget.looped,
            client=prepared.client,
        )
        self.engine.submit(request)
        return StartedReply(len(ids), room, budget.finish_thinking, prepared.continued)

    def _prompt_scorer(
        self, ids: Sequence[int], emit: Callable[[Event], None]
    ) -> Callable[[Sequence[SampledLogprob]], None]:
        scored = ScoredPrompt(self.words.tokenizer, ids, emit)

        def add(logprobs: Sequence[SampledLogprob]) -> None:
            scored.add((token.token, token.logprob, token.top) for token in logprobs)

        return add

    def _end_ids(self, prepared: PreparedRequest) -> frozenset[int]:
        words = self.words
        return words.end_ids if prepared.thinks is None else words.end_ids | words.turn_end_ids

    def _thinking_budget(
        self, prepared: PreparedRequest, room: int, form: GrammarState | None
    ) -> ThinkingBudget:
        """Create the thinking budget and repetition guard; a constrained answer keeps its room."""
        words, options = self.words, prepared.options
        thinking = None if prepared.thinks is None else words.thinking
        budget = options.thinking_budget if prepared.thinks else None
        # A call that stands in the thinking is not constrained: it may be any call, in any number.
        # Where a call is demanded, or only one allowed, it cannot end the thinking.
        settled = prepared.calls is not None and (
            options.must_call or not options.parallel_tool_calls
        )
        # Where something must follow the thinking, a budget keeps room for it, stated or not.
        bounded = form is not None or settled
        # A budget is refused only if the request's own max_tokens leaves no room for it. If the
        # context window is what ends, the budget gives way.
        short = room != options.max_tokens
        limits = ThinkingLimits.of(
            words.tokenizer,
            thinking,
            budget=room if bounded and budget is None and prepared.thinks else budget,
            message=options.thinking_budget_message,
            max_tokens=room,
            guard=options.loop_guard,
            least_answer=len(form.closing() or ()) + 1 if form else 1,
            bends=budget is None or options.thinking_budget_bends or short,
        )
        return ThinkingBudget(
            words.tokenizer,
            thinking,
            limits,
            inside=prepared.inside,
            answering=has_content(prepared.continued) and not prepared.inside,
            end_ids=self._end_ids(prepared),
            calls=None if settled else prepared.calls,
        )

    def _constraint(
        self,
        prepared: PreparedRequest,
        room: int,
        budget: ThinkingBudget,
        form: GrammarState | None,
        failures: list[str],
    ) -> Constraint:
        """Wrap the thinking budget in a grammar constraint if the answer or a call has a grammar.

        Failures of a call's grammar are appended to `failures`.
        """
        words = self.words
        if not form and not prepared.calls:
            return budget
        return GrammarConstraint(
            budget,
            words.tokenizer,
            words.thinking,
            thinks=bool(prepared.thinks),
            max_tokens=room,
            answer=form,
            calling=ToolCallRule(
                prepared.calls,
                partial(prepared.call_grammar.copy, failures),
                must=prepared.options.must_call,
                only_one=not prepared.options.parallel_tool_calls,
            )
            if prepared.calls and prepared.call_grammar
            else None,
        )

    def _read_ahead(self, prepared: PreparedRequest, reply: Message, already: int) -> None:
        """Submit the beginning of the next turn's prompt for prefill in idle time.

        The template decides what that beginning is. Two prompts with different texts of the user
        are rendered; their common prefix is what any next turn begins with. `already` is about the
        number of tokens that are in the KV cache now.
        """
        before = [*(prepared.messages[:-1] if prepared.continued else prepared.messages), reply]
        try:
            first, second = (
                self.words.tokenizer.encode(
                    render(
                        self.words,
                        [*before, {"role": "user", "content": text}],
                        prepared.options.thinking,
                        prepared.tools,
                        add_generation_prompt=False,
                    )
                )
                for text in _PLACEHOLDERS
            )
            ids = first[: common_prefix(first, second)]
            if len(ids) < self.engine.context and len(ids) - already <= _MAX_READ_AHEAD:
                self.engine.prefetch(ids)
        except Qwen3Error:  # the template refuses such a turn, or the engine is closed by now
            return


def _error_of(call: Callable[[], None]) -> BaseException | None:
    """Call a function and return what it raises, or None: a reply's last event must follow."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - see above
        return error
    return None


def _finish_once(
    finish: Callable[[RequestResult | BaseException], None],
    reply: ReplyBuilder,
    emit: Callable[[BaseException], None],
    result: RequestResult | BaseException,
) -> None:
    """Call `finish`; emit what it raises as the last event, unless the reply has ended already."""
    try:
        finish(result)
    except BaseException as error:
        if reply.ended:
            raise
        emit(error)


def _finish_reason(result: RequestResult, parser: ReplyParser, *, looped: bool) -> str:
    """Return the finish reason of a reply: the engine's, refined by what the parser found."""
    if result.reason != "stop":
        return result.reason
    if parser.cut_off:
        return "length" if looped else "stop"  # "length": cut off by the loop guard
    return "tool_calls" if parser.called else "stop"
