"""Options of a reply: the keywords of `LLM.stream`, `chat` and the like, and their checks."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from textwrap import shorten
from typing import Any, TypedDict, TypeVar, cast

from qwen3_mlx.arguments import Progress, plain, refuse_unknown
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.text.fair_queue import Caller
from qwen3_mlx.text.grammar import GrammarState
from qwen3_mlx.text.grammar_compiler import GrammarCompiler, SchemaLike
from qwen3_mlx.text.grammar_limits import MAX_TOOLS, check_tools
from qwen3_mlx.text.tool_calls import Tool, as_tool_list, tool_schema


class TextOptions(TypedDict, total=False):
    """The options that also apply to raw text (`LLM.complete`); `Options` explains each of them."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    sampling: SamplingParams | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    loop_guard: bool


class Options(TextOptions, total=False):
    """The keyword options of `LLM.stream`, `chat`, `batch`, `run`, `conversation` and the like.

    All are optional. `LLM.complete` takes those of `TextOptions` only: max_tokens, the sampling
    parameters, seed, stop, logprobs and loop_guard.

    Length and ends:
        max_tokens: int, at least 1; default None. The most tokens of the reply, thinking and answer
            together. None is all that the context window has room for.
        stop: str or sequence of str; default None. The answer ends before the first occurrence of
            any of these strings. They do not apply to the thinking.
        loop_guard: bool; default True, in `LLM.complete` False. Ends endless repetition: once the
            last 256 tokens, and four whole cycles, repeat what stood before them, the thinking is
            closed or the answer ended.

    Sampling (see `SamplingParams` for the order of the steps). Each defaults to None, which is the
    value of the checkpoint, or else Qwen's for the mode: temperature 0.6, top_p 0.95, top_k 20 with
    thinking and 0.7, 0.8, 20 without; the others change nothing:
        temperature: float, 0 to 100. Divides the logits; 0 always takes the likeliest token.
        top_p: float, above 0 to 1. Keeps the fewest tokens whose probabilities add up to top_p.
        top_k: int, from 0. Keeps the k likeliest tokens; 0 keeps all.
        min_p: float, 0 to 1. Keeps tokens at least min_p times as likely as the likeliest.
        presence_penalty: float, -2 to 2. Subtracted from the logit of each token in the reply.
        frequency_penalty: float, -2 to 2. The same, once for each occurrence.
        repetition_penalty: float, 0.01 to 100. Divides the logits of tokens in the prompt or the
            reply (multiplies negative ones); 1 changes nothing.
        logit_bias: dict of token id to float. Added to the logits of these tokens.
        sampling: SamplingParams. Several of the parameters above in one object. A parameter stated
            both here and by its own keyword, with different values, is a ValueError.
        seed: int; default None. The same seed gives the same reply. None draws one.

    Thinking:
        thinking: bool; default None. Switches the thinking on or off; None is the checkpoint's own
            default.
        thinking_budget: int, at least 0, in tokens; default None. The most tokens of thinking. At
            the limit the thinking is closed and the answer follows. None sets no limit.
        thinking_budget_message: str; default None. Text that closes the thinking at the limit. None
            is the hand-off that Qwen's documentation recommends; "" is the closing tag alone.
        thinking_budget_bends: bool; default False. If `max_tokens` leaves no room for the budget,
            False raises a ValueError; True shortens the budget, closes the thinking with the tag
            alone, or drops the limit. Near the end of the context window that happens in any case.

    Tools:
        tools: sequence of functions or tool descriptions (OpenAI's format); default None. The model
            may call them; a call arrives as a `ToolCall`.
        tool_choice: str; default "auto". "auto" leaves the choice to the model, "none" forbids
            calls, "required" demands one, and a tool's name demands a call of that tool.
        parallel_tool_calls: bool; default True. False ends the reply after its first call.
        partial_calls: bool; default False. True also streams the arguments of a call while the
            model writes them, as `ToolCallDelta` events.

    Structured output, at most one of these; default None. The constraint applies to the answer, not
    to the thinking:
        schema: JSON schema as a dict, or a pydantic model. The answer is JSON that fits
            it; `Reply.parsed` holds the data.
        regex: str. The whole answer matches this regular expression.
        choice: sequence of str. The answer is one of these texts.
        grammar: str. The answer follows this grammar, in Lark's syntax.

    Other:
        continue_last: bool; default False. The reply continues the last message, which must be the
            assistant's: its answer, or its thinking if the message has nothing else.
        logprobs: int, 0 to 20; default None. Each piece of text carries its `tokens` with their log
            probabilities (nats, before sampling parameters and grammars), and this number of the
            likeliest alternatives.
        progress: callable (done, total); default None. Called from another thread with the prompt
            tokens processed so far, in `LLM.batch` with the replies that have ended.
        prefetch_next_turn: bool; default False, in a `Conversation` True. After the reply, idle
            time is used to prefill what the next turn begins with. Chat templates drop the thinking
            of earlier turns, so the answer must be read again without it.
    """

    continue_last: bool
    thinking: bool | None
    thinking_budget: int | None
    thinking_budget_message: str | None
    thinking_budget_bends: bool
    tools: Sequence[Tool] | None
    tool_choice: str
    parallel_tool_calls: bool
    partial_calls: bool
    schema: SchemaLike | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    progress: Progress | None
    prefetch_next_turn: bool


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Validated `Options`, with the defaults filled in.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of its range, or two values exclude each other.
    """

    continue_last: bool = False
    thinking: bool | None = None
    thinking_budget: int | None = None
    thinking_budget_message: str | None = None
    thinking_budget_bends: bool = False
    loop_guard: bool = True
    tools: Sequence[Tool] | None = None
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    partial_calls: bool = False
    schema: SchemaLike | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    max_tokens: int | None = None
    sampling: SamplingParams | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    logprobs: int | None = None
    progress: Progress | None = None
    prefetch_next_turn: bool = False

    @classmethod
    def of(cls, options: Options, *others: str) -> "GenerationOptions":
        """Validate the options of a call; `others` are further keywords that its method takes.

        Raises:
            TypeError: an option does not exist or has the wrong type.
            ValueError: an option is out of its range, or is stated twice with different values.
        """
        refuse_unknown(options, [*Options.__annotations__, *others])
        if "sampling" in options:
            options = spread(options)
        values: dict[str, Any] = {name: plain(value) for name, value in options.items()}
        sampling = {name: values.pop(name) for name in _SAMPLING if name in values}
        return cls(**values, sampling=SamplingParams(**sampling) if sampling else None)

    def __post_init__(self) -> None:
        self._check_types()
        for name, minimum in (("max_tokens", 1), ("thinking_budget", 0), ("logprobs", 0)):
            if (number := getattr(self, name)) is not None and number < minimum:
                raise ValueError(f"{name} must be at least {minimum}, not {number}")
        if (self.logprobs or 0) > _MAX_LOGPROBS:
            raise ValueError(f"logprobs must be at most {_MAX_LOGPROBS}, not {self.logprobs}")
        if self.tool_choice != "auto" and self.must_call and not as_tool_list(self.tools):
            raise ValueError(f"tool_choice={self.tool_choice!r} needs tools, and there are none")
        if self.thinking_budget is not None and self.thinking is False:
            raise ValueError("thinking_budget is for thinking, which thinking=False switches off")
        forms = [name for name in _FORMS if getattr(self, name) is not None]
        if len(forms) > 1:
            raise ValueError(f"an answer can have one form, not {' and '.join(forms)}")
        if forms and self.continue_last:
            raise ValueError(
                f"{forms[0]} constrains a whole answer, not one that continue_last continues"
            )

    def _check_types(self) -> None:
        for name, (kind, expected) in _KINDS.items():
            value = getattr(self, name)
            # None is allowed exactly where it is the default.
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            # bool is an int in Python, but True is no number of tokens.
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise TypeError(f"{name} must be {expected}, not {value!r}")
        if self.stop is None:
            return
        is_stop = isinstance(self.stop, Iterable) and not isinstance(self.stop, Mapping)
        if not is_stop or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise ValueError(f"stop must be one or more non-empty strings, not {self.stop!r}")

    @property
    def must_call(self) -> bool:
        """True if the reply must call a tool: `tool_choice` is "required" or a tool's name."""
        return self.tool_choice not in ("auto", "none")

    def described_tools(self) -> list[dict[str, Any]]:
        """Return the tools as chat templates take them; empty if `tool_choice` is "none".

        Raises:
            TypeError: a tool is neither a function nor a description.
            ValueError: there are too many tools, two have the same name, or none has the name that
                `tool_choice` states.
        """
        if len(tools := as_tool_list(self.tools)) > MAX_TOOLS:
            raise ValueError(f"at most {MAX_TOOLS:,} tools can be given, not {len(tools):,}")
        described = [tool_schema(tool) for tool in tools]
        check_tools(described)
        names = [tool["function"]["name"] for tool in described]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"two tools are called {min(repeated)}")
        if self.tool_choice not in ("auto", "none", "required", *names):
            raise ValueError(
                f"tool_choice must be auto, none, required or a tool's name "
                f"({shorten(', '.join(names), _MAX_NAMES_SHOWN)}), not {self.tool_choice!r}"
            )
        return described if self.tool_choice != "none" else []

    @property
    def constrains_calls(self) -> bool:
        """True if the reply must call a tool, or may call only once."""
        return self.must_call or not self.parallel_tool_calls

    def answer_grammar(self, grammars: GrammarCompiler, caller: Caller) -> GrammarState | None:
        """Compile the grammar of the answer from its schema, regex, choice or grammar.

        Returns None if the answer is not constrained. `caller` may cancel it.

        Raises:
            TypeError, ValueError: it cannot be compiled; the message names what is not supported.
        """
        for name in _FORMS:
            if (value := getattr(self, name)) is not None:
                compiler = grammars.for_caller(caller)
                compile_form = getattr(compiler, "lark" if name == "grammar" else name)
                state: GrammarState = compile_form(value)
                return state
        return None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, which may be empty."""
        stop = self.stop
        return (stop,) if isinstance(stop, str) else () if stop is None else tuple(stop)


def spread(options: Options) -> Options:
    """Return the options with the fields of `sampling` as options of their own.

    `sampling=None`, stated, resets all sampling parameters to their defaults.

    Raises:
        TypeError: `sampling` is not a SamplingParams.
        ValueError: `sampling` and the keyword of the same name state different values.
    """
    stated: dict[str, Any] = dict(options)
    if "sampling" not in stated:
        return options
    sampling = stated.pop("sampling")
    if sampling is None:
        return cast(Options, {**dict.fromkeys(_SAMPLING), **stated})
    if not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling must be SamplingParams, not {sampling!r}")
    for name in _SAMPLING:
        if (value := getattr(sampling, name)) is not None:
            if stated.get(name) not in (None, value):
                raise ValueError(
                    f"{name} is {stated[name]!r} and, in sampling, {value!r}; state it once"
                )
            stated[name] = value
    return cast(Options, stated)


_SAMPLING = [entry.name for entry in fields(SamplingParams)]
_DEFAULTS = {entry.name: entry.default for entry in fields(GenerationOptions)}
_Method = TypeVar("_Method", bound=Callable[..., Any])


def with_keywords(options: type, **defaults: Any) -> Callable[[_Method], _Method]:
    """Create a decorator that adds the keywords of `options` to the signature of a method.

    help(), Jupyter and completion read the signature; type checkers understand `Unpack` without it.
    `defaults` override those of `GenerationOptions`.
    """
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default={**_DEFAULTS, **defaults}.get(name),
            annotation=annotation,
        )
        for name, annotation in inspect.get_annotations(options).items()
    ]

    def add_keywords(method: _Method) -> _Method:
        signature = inspect.signature(method)
        own = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        vars(method)["__signature__"] = signature.replace(parameters=[*own, *keywords])
        return method

    return add_keywords


_MAX_LOGPROBS = 20  # alternatives per token, as in OpenAI's API
_MAX_NAMES_SHOWN = 500  # characters of tool names in an error message
_FORMS = ("schema", "regex", "choice", "grammar")
_KINDS: dict[str, tuple[type, str]] = {
    "thinking_budget": (Integral, "a whole number"),
    "thinking_budget_message": (str, "a string"),
    "thinking_budget_bends": (bool, "True or False"),
    "regex": (str, "a string"),
    "grammar": (str, "a string"),
    "loop_guard": (bool, "True or False"),
    "tool_choice": (str, "a string"),
    "parallel_tool_calls": (bool, "True or False"),
    "partial_calls": (bool, "True or False"),
    "logprobs": (Integral, "a whole number"),
    "max_tokens": (Integral, "a whole number"),
    "seed": (Integral, "a whole number"),
    "prefetch_next_turn": (bool, "True or False"),
    "continue_last": (bool, "True or False"),
}
