"""What can be asked of a reply: the keywords of `stream`, `chat` and the like, checked."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from textwrap import shorten
from typing import Any, TypedDict, TypeVar, cast

from qwen3_mlx.arguments import plain, refuse_unknown
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.text.grammar import GrammarState
from qwen3_mlx.text.grammar_compiler import Form, GrammarCompiler
from qwen3_mlx.text.grammar_limits import MOST_TOOLS, check_tools
from qwen3_mlx.text.tool_calls import Tool, as_tool_list, tool_schema

Progress = Callable[[int, int], None]


class TextOptions(TypedDict, total=False):
    """The keywords that go with raw text, too; see `Options`."""

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
    """The keywords of every way to ask for a reply; all may be left out.

    With `continue_last` the reply continues the last message, which is the assistant's: its answer,
    or its thinking, where that is all it has.
    `thinking` switches the thinking on or off; None is the checkpoint's default. It never takes
    more than `thinking_budget` tokens: then it is closed with Qwen's own hand-off, or with
    `thinking_budget_message`, and the answer follows. A budget for which `max_tokens` leave no room
    is refused, or with `thinking_budget_bends` gives way; so it does at the end of the context.
    `loop_guard=False` permits circles.
    `tools` are functions, or descriptions of them, that the model may call: see `ToolCall`.
    `tool_choice` is "auto", "none", "required" or the name of the tool to be called; without
    `parallel_tool_calls` a reply ends with its first call. With `partial_calls` a stream also has
    the arguments of calls as they are written: see `ToolCallDelta`.
    The answer is held to a JSON `schema` (or a pydantic model), a `regex`, one of the texts of
    `choice`, or a `grammar` in Lark's syntax. `max_tokens` bounds thinking and answer together;
    None is what the context has room for.
    `temperature`, `top_p`, `top_k`, `min_p`, `presence_penalty`, `frequency_penalty`,
    `repetition_penalty` and `logit_bias` are the fields of `SamplingParams`, which explains them;
    `sampling` states several at once. What is stated beats the defaults of the mode, and stating
    one twice, differently, is refused. The same `seed` gives the same reply. `stop` ends the
    answer (not the thinking) before the first of these strings. `progress(done, total)` is told the
    prompt tokens read, or for a batch the replies that have ended, from another thread. With
    `prefetch_next_turn` the time after the reply is used to read what a next turn will begin with:
    templates leave out the thinking of earlier turns, so the answer must be read again without it.
    With `logprobs` each piece of text has its `tokens`, with their log probabilities and so many of
    the likeliest.
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
    schema: Form | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    progress: Progress | None
    prefetch_next_turn: bool


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The same with defaults, and nothing in it that cannot be.

    Raises:
        TypeError, ValueError: something is.
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
    schema: Form | None = None
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
        """Check options as they are given; the method that takes them has the keywords `others`.

        Raises:
            TypeError, ValueError: one does not exist, is not what it must be, or is stated twice.
        """
        refuse_unknown(options, [*Options.__annotations__, *others])
        asked: dict[str, Any] = {name: plain(value) for name, value in spread(options).items()}
        sampling = SamplingParams(**{name: asked.pop(name, None) for name in _SAMPLING})
        return cls(**asked, sampling=sampling)

    def __post_init__(self) -> None:
        self._check_types()
        for name, least in (("max_tokens", 1), ("thinking_budget", 0), ("logprobs", 0)):
            if (number := getattr(self, name)) is not None and number < least:
                raise ValueError(f"{name} must be at least {least}, not {number}")
        if (self.logprobs or 0) > _MOST_LOGPROBS:
            raise ValueError(f"logprobs must be at most {_MOST_LOGPROBS}, not {self.logprobs}")
        if self.must_call and not as_tool_list(self.tools):
            raise ValueError(f"tool_choice={self.tool_choice!r} needs tools, and there are none")
        if self.thinking_budget is not None and self.thinking is False:
            raise ValueError("thinking_budget is for thinking, which thinking=False switches off")
        forms = [name for name in _FORMS if getattr(self, name) is not None]
        if len(forms) > 1:
            raise ValueError(f"an answer can have one form, not {' and '.join(forms)}")
        if forms and self.continue_last:
            raise ValueError(f"{forms[0]} is the form of a whole answer, not of a continued one")

    def _check_types(self) -> None:
        for name, (kind, words) in _KINDS.items():
            value = getattr(self, name)
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise TypeError(f"{name} must be {words}, not {value!r}")
        several = isinstance(self.stop, Iterable | None) and not isinstance(self.stop, Mapping)
        if not several or not all(isinstance(s, str) and s for s in self.stop_strings):
            raise ValueError(f"stop must be one or more non-empty strings, not {self.stop!r}")

    @property
    def must_call(self) -> bool:
        """Whether the reply is to call a tool, whatever the model would rather do."""
        return self.tool_choice not in ("auto", "none")

    def described_tools(self) -> list[dict[str, Any]]:
        """Give the tools as the template has them: none, if none is to be called.

        Raises:
            TypeError, ValueError: one cannot be described, two have one name, or none has that
                which is to be called.
        """
        if len(given := as_tool_list(self.tools)) > MOST_TOOLS:
            raise ValueError(f"at most {MOST_TOOLS:,} tools can be given, not {len(given):,}")
        described = [tool_schema(tool) for tool in given]
        check_tools(described)
        names = [tool["function"]["name"] for tool in described]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"two tools are called {min(twice)}")
        if self.tool_choice not in ("auto", "none", "required", *names):
            raise ValueError(
                f"tool_choice must be auto, none, required or a tool's name "
                f"({shorten(', '.join(names), _MOST_NAMES)}), not {self.tool_choice!r}"
            )
        return described if self.tool_choice != "none" else []

    def form(self, grammars: GrammarCompiler) -> GrammarState | None:
        """Make the grammar of the answer, if it shall have a form.

        Raises:
            TypeError, ValueError: it cannot be had; what is not supported is named.
        """
        for name in _FORMS:
            if (wish := getattr(self, name)) is not None:
                made: GrammarState = getattr(grammars, "lark" if name == "grammar" else name)(wish)
                return made
        return None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none or more."""
        stop = self.stop
        return (stop,) if isinstance(stop, str) else () if stop is None else tuple(stop)


def spread(options: Options) -> Options:
    """Return the options with each field that `sampling` states as an option of its own.

    `sampling=None` says that all of them are the defaults.

    Raises:
        TypeError: `sampling` is no SamplingParams.
        ValueError: it states a field differently from the option of that name.
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
    """Create a decorator that lists the keywords of `options` in the signature of a method.

    help(), Jupyter and completion read it; type checkers know `Unpack` without it. `defaults` are
    those that differ from `GenerationOptions`'s.
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

    def listed_in(method: _Method) -> _Method:
        signature = inspect.signature(method)
        others = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        vars(method)["__signature__"] = signature.replace(parameters=[*others, *keywords])
        return method

    return listed_in


_MOST_LOGPROBS = 20
_MOST_NAMES = 500  # characters
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
