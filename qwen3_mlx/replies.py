"""From what is asked to a request for the engine, and from its tokens to events.

Here text and engine meet: prompts are rendered and encoded, followers of a reply are put together,
and what a next turn will begin with is read ahead.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Event as Flag
from typing import Any

from qwen3_mlx.asking import Asked
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.params import (
    Chance,
    Constraint,
    Outcome,
    Request,
    SamplingParams,
    sampling_defaults,
)
from qwen3_mlx.errors import ContextError, Qwen3Error
from qwen3_mlx.streams import Collected, Started
from qwen3_mlx.text.events import Event, Finish, Usage
from qwen3_mlx.text.forming import Calling, Forming
from qwen3_mlx.text.grammar import Grammar, Grammars
from qwen3_mlx.text.messages import (
    END_THINK,
    THINK,
    Message,
    normalise,
    think_block,
    without_empty_end,
)
from qwen3_mlx.text.parser import Parser
from qwen3_mlx.text.prompt import ControlTokens, Hiding
from qwen3_mlx.text.steering import Limits, Steering
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.thinking import Thinking, soft_switch
from qwen3_mlx.text.tokenizer import Prompt, Tokenizer
from qwen3_mlx.text.tools import Calls, Tool, describe

_PLACEHOLDERS = "?", "\n\n!"  # words of a turn to come, which begin with nothing in common
_MOST_IDLE = 4096  # tokens to be read ahead


@dataclass(frozen=True, slots=True)
class Words:
    """What a checkpoint knows of text: all but its network.

    `end_ids` end any reply, `turn_end_ids` one to a conversation, too. Without a `template`,
    `no_template` says why there is none.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    control: ControlTokens
    thinking: Thinking
    sampling: Mapping[str, Any]  # that generation_config.json states
    end_ids: frozenset[int]
    turn_end_ids: frozenset[int]
    grammars: Grammars
    no_template: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt to reply to: whether that thinks, or None for raw text; and what was asked for.

    The prompt may end `inside` the thinking, or within the answer, which the reply then continues:
    `continued` is the message that has begun it.
    """

    prompt: str | Sequence[int]
    thinks: bool | None
    draws_as_thinking: bool
    asked: Asked
    inside: bool = False
    continued: Message | None = None
    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    calls: Calls | None = None
    may_call: Sequence[Mapping[str, Any]] = ()  # those of the tools that may be called
    details: dict[str, str] = field(default_factory=dict)  # for `Finish` to tell
    least_room: int = 1  # tokens that there must be for a reply


class Replies:
    """Starts replies of one checkpoint on one engine."""

    def __init__(self, words: Words, engine: Engine) -> None:
        self.engine = engine
        self._words = words

    def render(
        self,
        messages: str | Sequence[Message],
        thinking: bool | None = None,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
    ) -> Prompt:
        """Do as `LLM.render` says."""
        self._words.thinking.resolve(thinking)
        described = [describe(tool) for tool in tools or ()]
        history = normalise(messages)
        if continue_last:
            return self._render_begun(_begun(history), thinking, described)
        if add_generation_prompt:
            history = without_empty_end(history)
        return self._rendered(history, thinking, described, add_generation_prompt)

    def _rendered(
        self,
        history: Sequence[Message],
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        end: str = "",
    ) -> Prompt:
        """Render messages, up to `end` where that is given."""
        words = self._words
        if words.template is None:
            raise Qwen3Error(words.no_template)
        hiding = Hiding(words.control)
        try:
            rendered = words.template.render(
                [hiding.hide_in_message(message) for message in words.template.prepared(history)],
                thinking=thinking if words.thinking.hybrid else None,
                tools=hiding.hide(tools),
                add_generation_prompt=add_generation_prompt,
            )
        except Qwen3Error as error:
            raise Qwen3Error(hiding.show(str(error))) from error
        if end:
            rendered, found, _ = rendered.rpartition(end)
            if not found:
                raise Qwen3Error(
                    "the last message cannot be continued: this checkpoint's chat template leaves "
                    "it out"
                )
        return hiding.prompt(rendered)

    def _render_begun(
        self,
        history: Sequence[Message],
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]],
    ) -> Prompt:
        """Render up to the end of what the last message says."""
        *before, last = history
        field = "content" if last["content"] else "reasoning_content"
        end = f"q{secrets.token_hex(8)}e"
        marked = {**last, field: last[field] + end}
        return self._rendered([*before, marked], thinking, tools, False, end)

    def chat(self, messages: str | Sequence[Message], asked: Asked) -> Task:
        """Lay out a reply to a conversation.

        Raises:
            ValueError: the last message is the assistant's, and not to be continued, or cannot be.
            Qwen3Error: the checkpoint cannot do as asked.
        """
        words = self._words
        thinks = words.thinking.resolve(asked.thinking)
        history = without_empty_end(normalise(messages))
        continued, inside = None, thinks and words.thinking.opens_in_prompt
        if asked.continue_last:
            history = _begun(history)
            continued, inside = history[-1], not history[-1]["content"]
            if inside and not thinks:
                raise ValueError("the thinking of the last message needs thinking to be continued")
            thinks = inside
        elif history[-1]["role"] == "assistant":
            raise ValueError(_no_turn(history[-1]))
        if asked.thinking_budget is not None and not thinks and not continued:
            raise Qwen3Error("this checkpoint cannot think; leave thinking_budget out")
        tools = asked.described_tools()
        named = [tool for tool in tools if tool["function"]["name"] == asked.tool_choice]
        stream_calls = asked.partial_calls
        calls = (
            Calls.of(words.template, words.tokenizer, tools, partial=stream_calls)
            if tools
            else None
        )
        if tools and calls is None:
            raise Qwen3Error("this checkpoint has no way to call tools; leave tools out")
        render = self._render_begun if continued else self._rendered
        prompt = render(history, asked.thinking, tools)
        asked.form(words.grammars)  # what is wrong with it is told now
        may_call = named or tools
        warnings = [*calls.grammar(words.grammars, may_call).warnings] if calls else []
        # /think and /no_think are for the model to obey; here they decide how its words are drawn.
        switched = soft_switch(messages) if thinks and words.thinking.hybrid else None
        draws_as_thinking = thinks if switched is None else switched
        if continued:
            draws_as_thinking = bool(_thinking_of(continued))
            if asked.thinking and not inside:
                warnings.append("the answer had begun, so it was continued without thinking")
        return Task(
            prompt,
            thinks,
            draws_as_thinking,
            asked,
            inside,
            continued,
            history,
            tools,
            calls,
            may_call,
            {"warning": "; ".join(warnings)} if warnings else {},
        )

    def start(
        self,
        task: Task,
        deliver: Callable[[Event | BaseException], None],
        cancelled: Flag,
        heard: Callable[[Collected], None] | None = None,
    ) -> Started:
        """Send a task to the engine.

        `deliver` is told the events, or the error that ends the reply; `heard` is told all that was
        said, before `deliver` is told the last.
        """
        words, asked, said = self._words, task.asked, Collected(task.continued)

        def tell(event: Event | BaseException) -> None:
            said.add(event)
            if heard and isinstance(event, Finish | BaseException):
                event = _error_of(partial(heard, said)) or event
            deliver(event)

        ids = self._encode(task.prompt)
        room = self._room(len(ids), asked.max_tokens, task.least_room)
        thinking = None if task.thinks is None else words.thinking
        parser = Parser(
            words.tokenizer,
            tell,
            thinking=thinking,
            inside=task.inside,
            begun=_is_begun(task.continued),
            stop=asked.stop_strings,
            calls=task.calls,
            noting=asked.logprobs is not None,
        )
        form = None if asked.must_call else asked.form(words.grammars)
        steering = self._steering(task, room, form)

        def done(outcome: Outcome | BaseException) -> None:
            if isinstance(outcome, BaseException):
                raise outcome
            parser.close(cut=outcome.reason != "stop")
            usage = Usage(
                len(ids), outcome.cached_tokens, outcome.completion_tokens, parser.reasoning_tokens
            )
            reason = _reason(outcome, parser, looped=steering.finished)
            details = parser.details | steering.details | task.details
            if parser.warning and "warning" in task.details:
                details["warning"] += f"; {parser.warning}"
            if self.engine.speculates:
                details |= {
                    "forward_passes": str(outcome.passes),
                    "drafted_tokens": str(outcome.proposed),
                    "accepted_tokens": str(outcome.accepted),
                }
            tell(Finish(reason, usage, details))
            if asked.idle and reason in ("stop", "length"):
                self._read_ahead(task, said.message(), len(ids))

        def note(chance: Chance) -> None:
            parser.note(chance.token, chance.logprob, chance.top)

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
            watcher=parser,
            done=partial(_end, done, said, tell),
            progress=asked.progress,
            constraint=self._constraint(task, room, steering, form),
            cancelled=cancelled,
            heard=None if asked.logprobs is None else note,
            alternatives=asked.logprobs or 0,
            doubtful=lambda: steering.looped,
        )
        self.engine.submit(request)
        return Started(len(ids), steering.finish_thinking, task.continued)

    def _end_ids(self, task: Task) -> frozenset[int]:
        words = self._words
        return words.end_ids if task.thinks is None else words.end_ids | words.turn_end_ids

    def _steering(self, task: Task, room: int, form: Grammar | None) -> Steering:
        """Make what holds a reply to its limits; where it has a form, that must find room."""
        words, asked = self._words, task.asked
        thinking = None if task.thinks is None else words.thinking
        budget = asked.thinking_budget if task.thinks else None
        # Calls that are left standing in the thinking may be any, and of any number.
        settled = task.calls is not None and (asked.must_call or not asked.parallel_tool_calls)
        bounded = form is not None or settled
        limits = Limits.of(
            words.tokenizer,
            thinking,
            budget=room if bounded and budget is None and task.thinks else budget,
            message=asked.thinking_budget_message,
            max_tokens=room,
            guard=asked.loop_guard,
            least_answer=len(form.closing() or ()) + 1 if form else 1,
        )
        return Steering(
            words.tokenizer,
            thinking,
            limits,
            inside=task.inside,
            answering=_is_begun(task.continued) and not task.inside,
            end_ids=self._end_ids(task),
            calls=None if settled else task.calls,
        )

    def _constraint(
        self, task: Task, room: int, steering: Steering, form: Grammar | None
    ) -> Constraint:
        """Put grammars around the steering, where the answer or a call shall have a form."""
        words = self._words
        if not form and not task.calls:
            return steering
        return Forming(
            steering,
            words.tokenizer,
            words.thinking,
            thinks=bool(task.thinks),
            max_tokens=room,
            answer=form,
            calling=Calling(
                task.calls,
                partial(task.calls.grammar, words.grammars, task.may_call),
                must=task.asked.must_call,
                only_one=not task.asked.parallel_tool_calls,
            )
            if task.calls
            else None,
        )

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        rows = self.engine.model.config.vocab_size
        if not isinstance(prompt, str):
            if outside := [token for token in prompt if not 0 <= token < rows]:
                raise ValueError(f"token ids are 0 to {rows - 1:,}, not {outside[0]}")
            return list(prompt)
        ids = self._words.tokenizer.encode(prompt)
        if (greatest := max(ids, default=0)) >= rows:
            raise Qwen3Error(
                f"the prompt has token {greatest} and the model knows {rows:,}: "
                "tokenizer.json belongs to another checkpoint"
            )
        return ids

    def _read_ahead(self, task: Task, reply: Message, already: int) -> None:
        """Have what a next turn begins with read in idle time; `already` tokens are about known.

        The template is asked what that is: whatever the user says next, what stands before it is
        the same.
        """
        before = [*(task.messages[:-1] if task.continued else task.messages), reply]
        try:
            one, other = (
                self._words.tokenizer.encode(
                    self.render(
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

    def _room(self, prompt_tokens: int, wish: int | None, least: int) -> int:
        """Give the tokens that a reply may have, at least `least`."""
        if prompt_tokens == 0:
            raise ValueError("the prompt is empty; give some text")
        engine = self.engine
        window, why = engine.context, ""
        if window < engine.model.config.context_window and window == engine.budget.context:
            why = f" (all that memory can hold: {engine.budget})"
        if prompt_tokens + (1 if wish else least) > window:
            raise ContextError(
                f"the prompt has {prompt_tokens:,} tokens and the context window is "
                f"{window:,}{why}; shorten the prompt"
            )
        room = window - prompt_tokens
        if wish is not None and wish > room:
            raise ContextError(
                f"max_tokens={wish:,} does not fit: after {prompt_tokens:,} tokens of prompt the "
                f"context window of {window:,}{why} has room for {room:,}"
            )
        return wish or room


def _begun(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the thinking of the last one apart, which a reply is to continue.

    Raises:
        ValueError: it is not the assistant's, says nothing, or calls tools.
    """
    last = dict(history[-1])
    if last["role"] != "assistant":
        raise ValueError(
            f"continue_last continues a last message of the assistant's, and it is the "
            f"{last['role']}'s"
        )
    if last.get("tool_calls"):
        raise ValueError(_no_turn(last))
    opened = last["content"].lstrip()
    if opened.startswith(THINK) and END_THINK not in opened and not _thinking_of(last):
        last |= {"content": "", "reasoning_content": opened.removeprefix(THINK).lstrip("\n")}
    elif not last["content"] and not _thinking_of(last):
        raise ValueError("continue_last: the last message says nothing that could be continued")
    return [*history[:-1], last]


def _is_begun(continued: Message | None) -> bool:
    """Whether a message that is continued says something already."""
    return bool(continued and (continued["content"] or _thinking_of(continued)))


def _no_turn(last: Message) -> str:
    """Say why there is nothing to reply to where the assistant has spoken last."""
    if last.get("tool_calls"):
        return "the last message calls tools: add their answers, as messages with the role tool"
    return (
        "the last message is the assistant's: add a message to reply to, or have it continued "
        "(continue_last=True)"
    )


def _thinking_of(message: Message) -> str:
    block = think_block(message)
    return block[1].strip() if block else message.get("reasoning_content") or ""


def _error_of(call: Callable[[], None]) -> BaseException | None:
    """Call what may raise anything, and return that: the last event of a reply must follow."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - see above
        return error
    return None


def _end(
    done: Callable[[Outcome | BaseException], None],
    said: Collected,
    tell: Callable[[BaseException], None],
    outcome: Outcome | BaseException,
) -> None:
    """Call `done`; what it raises is the last event of the reply, unless there was one."""
    try:
        done(outcome)
    except BaseException as error:
        if said.ended:
            raise
        tell(error)


def _reason(outcome: Outcome, parser: Parser, *, looped: bool) -> str:
    """Return why a reply has ended, by what it said."""
    if outcome.reason != "stop":
        return outcome.reason
    if parser.cut_off:
        return "length" if looped else "stop"  # the loop guard has cut off the call
    return "tool_calls" if parser.called else "stop"
