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
from qwen3_mlx.text.messages import Message, normalise
from qwen3_mlx.text.parser import Parser
from qwen3_mlx.text.steering import Limits, Steering
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.thinking import Thinking, soft_switch
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tools import Calls, Tool, describe

_PLACEHOLDERS = "?", "\n\n!"  # words of a turn to come, which begin with nothing in common
_MOST_IDLE = 4096  # tokens to be read ahead


@dataclass(frozen=True, slots=True)
class Words:
    """What a checkpoint knows of text: all but its network."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    thinking: Thinking
    generation_config: Mapping[str, Any]
    end_ids: frozenset[int]
    grammars: Grammars


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt to reply to: whether that thinks, or None for raw text; and what was asked for."""

    prompt: str | Sequence[int]
    thinks: bool | None
    draws_as_thinking: bool
    asked: Asked
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
    ) -> str:
        """Do as `LLM.render` says."""
        words = self._words
        if words.template is None:
            raise Qwen3Error("this checkpoint has no chat template; use complete() with raw text")
        words.thinking.resolve(thinking)
        return words.template.render(
            normalise(messages),
            thinking=thinking if words.thinking.hybrid else None,
            tools=[describe(tool) for tool in tools or ()],
            add_generation_prompt=add_generation_prompt,
        )

    def chat(self, messages: str | Sequence[Message], asked: Asked) -> Task:
        """Lay out a reply to a conversation.

        Raises:
            Qwen3Error: the checkpoint cannot do as asked.
        """
        words = self._words
        thinks = words.thinking.resolve(asked.thinking)
        if asked.thinking_budget is not None and not thinks:
            raise Qwen3Error("this checkpoint cannot think; leave thinking_budget out")
        tools = asked.described_tools()
        named = [tool for tool in tools if tool["function"]["name"] == asked.tool_choice]
        calls = Calls.of(words.template, words.tokenizer, tools) if tools else None
        if tools and calls is None:
            raise Qwen3Error("this checkpoint has no way to call tools; leave tools out")
        prompt = self.render(messages, asked.thinking, tools)
        asked.form(words.grammars)  # what is wrong with it is told now
        details = {}
        if calls and (warnings := calls.grammar(words.grammars, named or tools).warnings):
            details["warning"] = "; ".join(warnings)
        # /think and /no_think are for the model to obey; here they decide how its words are drawn.
        switched = soft_switch(messages) if thinks and words.thinking.hybrid else None
        draws_as_thinking = thinks if switched is None else switched
        history = normalise(messages)
        return Task(
            prompt, thinks, draws_as_thinking, asked, history, tools, calls, named or tools, details
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
        words, asked, said = self._words, task.asked, Collected()

        def tell(event: Event | BaseException) -> None:
            said.add(event)
            if heard and isinstance(event, Finish | BaseException):
                heard(said)
            deliver(event)

        ids = self._encode(task.prompt)
        room = self._room(len(ids), asked.max_tokens, task.least_room)
        thinking = None if task.thinks is None else words.thinking
        parser = Parser(
            words.tokenizer,
            tell,
            thinking=thinking,
            inside=self._begins_inside(task),
            stop=asked.stop_strings,
            calls=task.calls,
            noting=asked.logprobs is not None,
        )
        form = None if asked.must_call else asked.form(words.grammars)
        steering = self._steering(task, room, form)

        def done(outcome: Outcome | BaseException) -> None:
            if isinstance(outcome, BaseException):
                tell(outcome)
                return
            parser.close()
            usage = Usage(
                len(ids), outcome.cached_tokens, outcome.completion_tokens, parser.reasoning_tokens
            )
            calls = parser.called and outcome.reason == "stop"
            reason = "tool_calls" if calls else outcome.reason
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
            words.generation_config,
            thinking=task.draws_as_thinking,
            hybrid=thinking is not None and thinking.hybrid,
        )
        request = Request(
            ids=ids,
            sampling=(asked.sampling or SamplingParams()).over(defaults),
            max_tokens=room,
            seed=secrets.randbits(32) if asked.seed is None else asked.seed,
            end_ids=words.end_ids,
            watcher=parser,
            done=done,
            progress=asked.progress,
            constraint=self._constraint(task, room, steering, form),
            cancelled=cancelled,
            heard=None if asked.logprobs is None else note,
            alternatives=asked.logprobs or 0,
        )
        self.engine.submit(request)
        return Started(len(ids), steering.finish_thinking)

    def _begins_inside(self, task: Task) -> bool:
        return bool(task.thinks) and self._words.thinking.opens_in_prompt

    def _steering(self, task: Task, room: int, form: Grammar | None) -> Steering:
        """Make what holds a reply to its limits; where it has a form, that must find room."""
        words, asked = self._words, task.asked
        thinking = None if task.thinks is None else words.thinking
        unbounded = asked.thinking_budget is None
        # Calls that are left standing in the thinking may be any, and of any number.
        settled = task.calls is not None and (asked.must_call or not asked.parallel_tool_calls)
        bounded = form is not None or settled
        limits = Limits.of(
            words.tokenizer,
            thinking,
            budget=room if bounded and unbounded and task.thinks else asked.thinking_budget,
            message=asked.thinking_budget_message,
            max_tokens=room,
            guard=asked.loop_guard,
            least_answer=len(form.closing() or ()) + 1 if form else 1,
        )
        return Steering(
            words.tokenizer,
            thinking,
            limits,
            inside=self._begins_inside(task),
            end_ids=words.end_ids,
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
        before = [*task.messages, reply]
        try:
            one, other = (
                self._words.tokenizer.encode(
                    self.render(
                        [*before, {"role": "user", "content": words}],
                        tools=task.tools,
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
