"""Prepares replies: messages and options are checked, rendered and encoded; then starts them."""

from collections.abc import Mapping, Sequence
from threading import Event as Flag
from typing import Any

from qwen3_mlx.api.context_window import MAX_COUNTED, Window
from qwen3_mlx.api.generation import Deliver, Generation, OnEnd
from qwen3_mlx.api.options import GenerationOptions
from qwen3_mlx.api.prepared_request import PreparedRequest
from qwen3_mlx.api.prompts import (
    begun,
    no_turn_message,
    render,
    render_begun,
    render_whole,
    thinking_of,
)
from qwen3_mlx.api.stream import StartedReply
from qwen3_mlx.api.text_processor import TextProcessor
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.errors import KindError, Qwen3Error
from qwen3_mlx.text.fair_queue import LOCAL_CALLER, Caller
from qwen3_mlx.text.grammar import GrammarState
from qwen3_mlx.text.kind import CHAT
from qwen3_mlx.text.messages import Message, normalise, without_empty_end
from qwen3_mlx.text.thinking import soft_switch
from qwen3_mlx.text.thinking_budget import ThinkingLimits
from qwen3_mlx.text.tool_calls import ToolCallSyntax


class ReplyGenerator:
    """Prepares and starts the replies of one checkpoint on one engine, perhaps with an adapter."""

    def __init__(
        self, processor: TextProcessor, engine: Engine, adapter: int | None = None
    ) -> None:
        self.engine = engine
        self.adapter = adapter
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
        `GenerationOptions.answer_grammar` raise, and a Qwen3Error if the checkpoint generates no
        text.
        """
        processor = self.processor
        if processor.no_text:
            raise KindError(processor.no_text, CHAT)
        ids = self.window.encode(prompt)
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
            adapter=self.adapter,
        )

    def refuse_no_chat(self) -> None:
        """Check that the checkpoint is for chat.

        Raises:
            Qwen3Error: it is for something else.
        """
        if self.processor.no_chat:
            raise KindError(self.processor.no_chat, CHAT)

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
        self.refuse_no_chat()
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
            adapter=self.adapter,
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
