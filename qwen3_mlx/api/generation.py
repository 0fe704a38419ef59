"""From what is asked to a request for the engine, and from its tokens to events.

Here text and engine meet: prompts are encoded, followers of a reply are put together, and what a
next turn will begin with is read ahead.
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
    is_begun,
    render,
    render_begun,
    render_whole,
    thinking_of,
    why_no_turn,
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

_PLACEHOLDERS = "?", "\n\n!"  # words of a turn to come, which begin with nothing in common
_LONG = 100_000  # characters of a prompt, from which on encoding it would hold up other replies
_MOST_IDLE = 4096  # tokens to be read ahead


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A prompt to reply to: whether that thinks, or None for raw text; and what was asked for.

    The prompt may end `inside` the thinking, or within the answer, which the reply then continues:
    `continued` is the message that has begun it.
    """

    prompt: str | Sequence[int]
    ids: Sequence[int]
    thinks: bool | None
    draws_as_thinking: bool
    asked: GenerationOptions
    inside: bool = False
    continued: Message | None = None
    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    calls: ToolCallSyntax | None = None
    form: GrammarState | None = None  # of the answer, from which that of each reply is copied
    call_grammar: GrammarState | None = None  # of a call, likewise
    details: dict[str, str] = field(default_factory=dict)  # for `Finish` to tell
    least_room: int = 1  # tokens that there must be for a reply
    shortens: bool = False  # whether `max_tokens` may be more than there is room for
    client: str = ""  # whose it is
    score_prompt: bool = False  # whether the tokens of the prompt are given, too: `PromptTokens`
    only_read: bool = False  # whether there is to be no reply

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of the reply, or None for what there is room for."""
        return 0 if self.only_read else self.asked.max_tokens


class ReplyGenerator:
    """Starts replies of one checkpoint on one engine."""

    def __init__(self, words: TextProcessor, engine: Engine) -> None:
        self.engine = engine
        self.words = words
        self.window = Window(words, engine)

    def text(
        self, prompt: str | Sequence[int], asked: GenerationOptions, caller: Caller = PATIENT
    ) -> PreparedRequest:
        """Lay out the continuation of raw text, or of token ids."""
        ids = self.window.fitting(prompt)
        form = asked.form(self.words.grammars.on_behalf_of(caller))
        return PreparedRequest(prompt, ids, None, False, asked, form=form)

    def chat(
        self, messages: str | Sequence[Message], asked: GenerationOptions, caller: Caller = PATIENT
    ) -> PreparedRequest:
        """Lay out a reply to a conversation; the caller may go away meanwhile.

        Raises:
            ValueError: the last message is the assistant's, and not to be continued, or cannot be.
            Qwen3Error: the checkpoint cannot do as asked.
        """
        words = self.words
        thinks = words.thinking.resolve(asked.thinking)
        history = without_empty_end(normalise(messages))
        self.window.check(history)
        continued, inside = None, thinks and words.thinking.opens_in_prompt
        if asked.continue_last:
            history = begun(history)
            continued, inside = history[-1], not history[-1]["content"]
            if inside and not thinks:
                raise ValueError("the thinking of the last message needs thinking to be continued")
            thinks = inside
        elif history[-1]["role"] == "assistant":
            raise ValueError(why_no_turn(history[-1]))
        if asked.thinking_budget is not None and not thinks and not continued:
            raise Qwen3Error("this checkpoint cannot think; leave thinking_budget out")
        tools = asked.described_tools()
        named = [tool for tool in tools if tool["function"]["name"] == asked.tool_choice]
        stream_calls = asked.partial_calls
        calls = (
            ToolCallSyntax.of(words.template, words.tokenizer, tools, partial=stream_calls)
            if tools
            else None
        )
        if tools and calls is None:
            raise Qwen3Error("this checkpoint has no way to call tools; leave tools out")
        show = render_begun if continued else render_whole
        prompt = show(words, history, asked.thinking, tools)
        ids = self.window.fitting(prompt)
        grammars = words.grammars.on_behalf_of(caller)
        form = asked.form(grammars)
        call_grammar = calls.grammar(grammars, named or tools) if calls else None
        warnings = [*call_grammar.warnings] if call_grammar else []
        # /think and /no_think are for the model to obey; here they decide how its words are drawn.
        switched = soft_switch(messages) if thinks and words.thinking.hybrid else None
        draws_as_thinking = thinks if switched is None else switched
        if asked.must_call and form:
            warnings.append("a call of a tool is demanded, so the form of the answer was ignored")
        if continued:
            draws_as_thinking = bool(thinking_of(continued))
            if asked.thinking and not inside:
                warnings.append("the answer had begun, so it was continued without thinking")
        return PreparedRequest(
            prompt,
            ids,
            thinks,
            draws_as_thinking,
            asked,
            inside,
            continued,
            history,
            tools,
            calls,
            None if asked.must_call else form,
            call_grammar,
            {"warning": "; ".join(warnings)} if warnings else {},
        )

    def count_tokens(self, messages: str | Sequence[Message], asked: GenerationOptions) -> int:
        """Do as `LLM.count_tokens` says."""
        history = normalise(messages)
        self.window.check(history, MOST_COUNTED)
        tools, goes_on = asked.described_tools(), asked.continue_last
        prompt = render(self.words, history, asked.thinking, tools, continue_last=goes_on)
        return len(self.window.encode(prompt))

    def start(
        self,
        task: PreparedRequest,
        deliver: Callable[[Event | BaseException], None],
        cancelled: Flag,
        heard: Callable[[ReplyBuilder], None] | None = None,
    ) -> StartedReply:
        """Send a task to the engine.

        `deliver` is told the events, or the error that ends the reply; `on_logprobs` is told all
        that was said, before `deliver` is told the last.
        """
        words, asked, said = self.words, task.asked, ReplyBuilder(task.continued)

        def tell(event: Event | BaseException) -> None:
            said.add(event)
            if heard and isinstance(event, Finish | BaseException):
                event = _error_of(partial(heard, said)) or event
            deliver(event)

        ids = task.ids
        room = self.window.room(len(ids), task.max_tokens, task.least_room, shortens=task.shortens)
        thinking = None if task.thinks is None else words.thinking
        parser = ReplyParser(
            words.tokenizer,
            tell,
            thinking=thinking,
            inside=task.inside,
            begun=is_begun(task.continued),
            stop=asked.stop_strings,
            calls=task.calls,
            logprobs=asked.logprobs is not None,
        )
        parser.logprob_of_end = task.score_prompt  # then every token is wanted
        form = task.form and task.form.copy([])
        steering = self._steering(task, room, form)
        failures: list[str] = []  # of the grammars of calls

        def done(outcome: RequestResult | BaseException) -> None:
            if isinstance(outcome, BaseException):
                raise outcome
            parser.close(cut=outcome.reason != "stop")
            usage = Usage(
                len(ids), outcome.cached_tokens, outcome.completion_tokens, parser.reasoning_tokens
            )
            reason = _reason(outcome, parser, looped=steering.finished)
            details = parser.details | steering.details | task.details
            warnings = [task.details.get("warning"), *dict.fromkeys(failures), parser.warning]
            if warning := "; ".join(filter(None, warnings)):
                details["warning"] = warning
            if self.engine.speculates:
                details |= {
                    "forward_passes": str(outcome.passes),
                    "drafted_tokens": str(outcome.proposed),
                    "accepted_tokens": str(outcome.accepted),
                }
            tell(Finish(reason, usage, details))
            if asked.prefetch_next_turn and reason in ("stop", "length"):
                job = partial(self._read_ahead, task, said.message(), len(ids))
                if len(task.prompt) < _LONG:
                    job()
                else:
                    Thread(target=job, name="qwen3-ahead", daemon=True).start()

        def note(chance: SampledLogprob) -> None:
            parser.add_logprob(chance.token, chance.logprob, chance.top)

        defaults = sampling_defaults(
            words.sampling,
            thinking=task.draws_as_thinking,
            hybrid=thinking is not None and thinking.hybrid,
        )
        request = Request(
            ids=ids,
            sampling=(asked.sampling or SamplingParams()).over(defaults),
            max_tokens=room,
            seed=secrets.randbits(32) if asked.seed is None else asked.seed,
            end_ids=self._end_ids(task),
            sink=parser,
            on_finish=partial(_end, done, said, tell),
            progress=asked.progress,
            constraint=self._constraint(task, room, steering, form, failures),
            cancelled=cancelled,
            on_logprobs=None if asked.logprobs is None else note,
            on_prompt_logprobs=self._scoring(ids, tell) if task.score_prompt else None,
            top_logprobs=asked.logprobs or 0,
            recheck_logits=lambda: steering.looped,
            client=task.client,
        )
        self.engine.submit(request)
        return StartedReply(len(ids), room, steering.finish_thinking, task.continued)

    def _scoring(
        self, ids: Sequence[int], tell: Callable[[Event], None]
    ) -> Callable[[Sequence[SampledLogprob]], None]:
        scored = ScoredPrompt(self.words.tokenizer, ids, tell)

        def note(chances: Sequence[SampledLogprob]) -> None:
            scored.add((chance.token, chance.logprob, chance.top) for chance in chances)

        return note

    def _end_ids(self, task: PreparedRequest) -> frozenset[int]:
        words = self.words
        return words.end_ids if task.thinks is None else words.end_ids | words.turn_end_ids

    def _steering(
        self, task: PreparedRequest, room: int, form: GrammarState | None
    ) -> ThinkingBudget:
        """Make what holds a reply to its limits; where it has a form, that must find room."""
        words, asked = self.words, task.asked
        thinking = None if task.thinks is None else words.thinking
        budget = asked.thinking_budget if task.thinks else None
        # Calls that are left standing in the thinking may be any, and of any number.
        settled = task.calls is not None and (asked.must_call or not asked.parallel_tool_calls)
        bounded = form is not None or settled
        # Only what the request itself leaves no room for is refused.
        short = room != asked.max_tokens
        limits = ThinkingLimits.of(
            words.tokenizer,
            thinking,
            budget=room if bounded and budget is None and task.thinks else budget,
            message=asked.thinking_budget_message,
            max_tokens=room,
            guard=asked.loop_guard,
            least_answer=len(form.closing() or ()) + 1 if form else 1,
            bends=budget is None or asked.thinking_budget_bends or short,
        )
        return ThinkingBudget(
            words.tokenizer,
            thinking,
            limits,
            inside=task.inside,
            answering=is_begun(task.continued) and not task.inside,
            end_ids=self._end_ids(task),
            calls=None if settled else task.calls,
        )

    def _constraint(
        self,
        task: PreparedRequest,
        room: int,
        steering: ThinkingBudget,
        form: GrammarState | None,
        failures: list[str],
    ) -> Constraint:
        """Put grammars around the steering, where the answer or a call shall have a form.

        What fails in the grammar of a call is added to `failures`.
        """
        words = self.words
        if not form and not task.calls:
            return steering
        return GrammarConstraint(
            steering,
            words.tokenizer,
            words.thinking,
            thinks=bool(task.thinks),
            max_tokens=room,
            answer=form,
            calling=ToolCallRule(
                task.calls,
                partial(task.call_grammar.copy, failures),
                must=task.asked.must_call,
                only_one=not task.asked.parallel_tool_calls,
            )
            if task.calls and task.call_grammar
            else None,
        )

    def _read_ahead(self, task: PreparedRequest, reply: Message, already: int) -> None:
        """Have what a next turn begins with read in idle time; `already` tokens are about known.

        The template is asked what that is: whatever the user says next, what stands before it is
        the same.
        """
        before = [*(task.messages[:-1] if task.continued else task.messages), reply]
        try:
            one, other = (
                self.words.tokenizer.encode(
                    render(
                        self.words,
                        [*before, {"role": "user", "content": words}],
                        task.asked.thinking,
                        task.tools,
                        add_generation_prompt=False,
                    )
                )
                for words in _PLACEHOLDERS
            )
            ids = one[: common_prefix(one, other)]
            if len(ids) < self.engine.context and len(ids) - already <= _MOST_IDLE:
                self.engine.read_ahead(ids)
        except Qwen3Error:  # the template wants no such turn, or the engine was closed meanwhile
            return


def _error_of(call: Callable[[], None]) -> BaseException | None:
    """Call what may raise anything, and return that: the last event of a reply must follow."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - see above
        return error
    return None


def _end(
    done: Callable[[RequestResult | BaseException], None],
    said: ReplyBuilder,
    tell: Callable[[BaseException], None],
    outcome: RequestResult | BaseException,
) -> None:
    """Call `done`; what it raises is the last event of the reply, unless there was one."""
    try:
        done(outcome)
    except BaseException as error:
        if said.ended:
            raise
        tell(error)


def _reason(outcome: RequestResult, parser: ReplyParser, *, looped: bool) -> str:
    """Return why a reply has ended, by what it said."""
    if outcome.reason != "stop":
        return outcome.reason
    if parser.cut_off:
        return "length" if looped else "stop"  # the loop guard has cut off the call
    return "tool_calls" if parser.called else "stop"
