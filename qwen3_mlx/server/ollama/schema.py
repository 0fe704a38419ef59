"""Request and response models of Ollama's API, with the fields that are supported."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from qwen3_mlx.api.options import Options
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.server.duration import read_duration
from qwen3_mlx.server.openai.schema import ToolIn
from qwen3_mlx.server.wire import FailFast, Messages, Parts, RequestModel, Tools, WireModel

LINES = "application/x-ndjson"
API_VERSION = "0.12.11"
"""Version of Ollama whose API this is: the first with logprobs."""

# Unsupported fields, each with the values that have no effect and are accepted.
NOT_FOR_CHAT: dict[str, tuple[Any, ...]] = {
    "_debug_render_only": (),
}
NOT_FOR_GENERATE = NOT_FOR_CHAT | {
    "context": (),
    "images": (),
    "suffix": ("",),
    "template": ("",),
}
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_INTEGERS = frozenset(("num_predict", "top_k", "seed", "num_ctx", "repeat_last_n"))
_NUMBERS = _INTEGERS | _SAMPLING.keys()
# Options that no reply depends on: Ollama's use of its machine, and what it keeps of a prompt that
# it shortens, which is not done here.
_HARMLESS = frozenset(
    ("num_gpu", "num_thread", "num_batch", "use_mmap", "use_mlock", "low_vram", "numa", "main_gpu")
    + ("f16_kv", "num_keep")
)
# Sampling methods that are not supported, and the values that switch them off.
_SWITCHED_OFF: dict[str, float] = {"mirostat": 0, "tfs_z": 1, "typical_p": 1}
_RANDOM = -1  # this seed means a random one
# The library's names of fields, as its errors and warnings begin, and Ollama's names.
_OLLAMA_NAMES = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "schema": "format",
}
_LIBRARY_NAME = re.compile(rf"({'|'.join(_OLLAMA_NAMES)})(?==|: | must be )")
_MAX_NAMED = 10  # options without effect that warnings name


class FunctionCall(WireModel):
    """Name and arguments of a tool call; `arguments` are an object, or its JSON text."""

    name: str
    arguments: Any = {}
    index: int | None = None


class ToolCallIn(WireModel):
    """A tool call of an earlier turn."""

    id: str | None = None
    type: str | None = None
    function: FunctionCall


class OllamaMessage(WireModel):
    """A message of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Parts[Any] | None = None
    tool_calls: Parts[ToolCallIn] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ModelRequest(RequestModel):
    """Fields of all requests that load a model."""

    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None

    @property
    def model_seconds(self) -> float | None:
        """Seconds that the model stays loaded after the request; None if it does not say.

        Raises:
            ValueError: `keep_alive` is not a duration.
        """
        return None if self.keep_alive is None else read_duration(self.keep_alive)

    @property
    def is_empty(self) -> bool:
        """True if the model is only loaded or unloaded."""
        return False


class OllamaRequest(ModelRequest):
    """Fields of `/api/chat` and `/api/generate`."""

    stream: bool | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncate: bool | None = None
    shift: bool | None = None

    @property
    def streamed(self) -> bool:
        """True if the request wants the reply as a stream of lines."""
        return self.stream is not False and not self.is_empty

    def not_honoured(self) -> list[str]:
        """Return warnings of fields that are not honoured."""
        warnings = {
            "truncate was ignored: a prompt that does not fit is refused": self.truncate,
            "shift was ignored: a reply ends where the context does": self.shift,
        }
        return [warning for warning, applies in warnings.items() if applies]


class OllamaChatRequest(OllamaRequest):
    """`POST /api/chat`; without messages the model is only loaded or unloaded."""

    messages: Messages[OllamaMessage] | None = None
    tools: Tools[ToolIn] | None = None

    @property
    def is_empty(self) -> bool:
        """True if the model is only loaded or unloaded."""
        return not self.messages


class OllamaGenerateRequest(OllamaRequest):
    """`POST /api/generate`; without a prompt the model is only loaded or unloaded."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None

    @property
    def is_empty(self) -> bool:
        """True if the model is only loaded or unloaded."""
        return not self.prompt


class VectorFields(ModelRequest):
    """Fields of `/api/embed` and `/api/embeddings`; without a text they only load or unload."""

    def not_honoured(self, context: int) -> list[str]:
        """Return warnings of fields that are not honoured.

        Raises:
            ValueError: `num_ctx` is no whole number.
        """
        options = self.options or {}
        _, warnings = read_options({"num_ctx": options.get("num_ctx")}, context)
        set_here = {name for name, value in options.items() if value is not None}
        ignored = sorted(set_here - _HARMLESS - {"num_ctx"})[:_MAX_NAMED]
        return warnings + [f"options.{name} has no effect on vectors" for name in ignored]


class OllamaEmbedRequest(VectorFields):
    """`POST /api/embed`; without a text the model is only loaded or unloaded."""

    input: str | FailFast[str] | None = None
    truncate: bool | None = None
    dimensions: int | None = None

    @property
    def is_empty(self) -> bool:
        """True if the model is only loaded or unloaded."""
        return not self.input


class OllamaEmbeddingsRequest(VectorFields):
    """`POST /api/embeddings`, the older form for one text."""

    prompt: str | None = None

    @property
    def is_empty(self) -> bool:
        """True if the model is only loaded or unloaded."""
        return not self.prompt


class OllamaShowRequest(RequestModel):
    """`POST /api/show`; `name` is the older name of `model`."""

    name: str | None = None


class OllamaPullRequest(RequestModel):
    """`POST /api/pull`; `name` is the older name of `model`."""

    name: str | None = None
    stream: bool | None = None


# --- responses ----------------------------------------------------------------------------------


class OllamaMessageOut(WireModel):
    """A message of the assistant."""

    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[ToolCallIn] | None = None


class _Out(WireModel):
    model: str
    created_at: str
    done: bool
    done_reason: str
    total_duration: int
    load_duration: int
    prompt_eval_count: int
    prompt_eval_duration: int
    eval_count: int
    eval_duration: int
    logprobs: list[dict[str, Any]] | None = None


class OllamaChatOut(_Out):
    """The response without a stream, and the last line of a stream; durations in nanoseconds."""

    message: OllamaMessageOut


class OllamaGenerateOut(_Out):
    """The response of `/api/generate`, as `OllamaChatOut`."""

    response: str
    thinking: str | None = None


class OllamaPullOut(WireModel):
    """The response of `/api/pull`, and a line of its stream; sizes in bytes."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


class OllamaEmbedOut(WireModel):
    """The response of `/api/embed`; durations in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingsOut(WireModel):
    """The response of `/api/embeddings`; empty without a text."""

    embedding: list[float]


# --- options ------------------------------------------------------------------------------------


def read_options(options: Mapping[str, Any], context: int) -> tuple[Options, list[str]]:
    """Return the options for the library, and warnings of those that are not honoured.

    Raises:
        ValueError: an option has an invalid value.
    """
    known = _NUMBERS | _HARMLESS | _SWITCHED_OFF.keys() | {"stop"}
    warnings = [f"unknown option {name!r} was ignored" for name in options if name not in known]
    warnings += [
        f"options.{name} is not supported and was ignored"
        for name, off in _SWITCHED_OFF.items()
        if options.get(name) not in (None, off)
    ]
    numbers = {
        name: _number(name, options[name]) for name in _NUMBERS if options.get(name) is not None
    }
    sampling = {field: numbers.get(option) for option, field in _SAMPLING.items()}
    if sampling["top_k"] is not None:
        sampling["top_k"] = max(0, sampling["top_k"])
    if (window := numbers.get("repeat_last_n")) == 0:
        sampling |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    elif window is not None and window > 0:
        warnings.append(
            f"options.repeat_last_n={window} was ignored: repeat_penalty looks at all tokens of "
            "prompt and reply, the other penalties at those of the reply"
        )
    num_ctx = numbers.get("num_ctx")
    if num_ctx is not None and num_ctx != context:
        warnings.append(
            f"options.num_ctx={num_ctx} was ignored: this server's context has {context:,} tokens"
        )
    limit = numbers.get("num_predict")
    if limit == 0:
        warnings.append("options.num_predict=0 is no limit, as -1 is")
    seed = numbers.get("seed")
    converted: Options = {
        "sampling": SamplingParams(**sampling),  # type: ignore[arg-type]
        "max_tokens": int(limit) if limit is not None and limit > 0 else None,
        "seed": None if seed in (None, _RANDOM) else int(seed or 0),
        "stop": _stops(options.get("stop")),
    }
    return converted, warnings


def with_ollama_names(message: str) -> str:
    """Return an error or a warning with Ollama's name of the field that it begins with."""
    match = _LIBRARY_NAME.match(message)
    return _OLLAMA_NAMES[match[1]] + message[match.end() :] if match else message


def _number(name: str, value: Any) -> int | float:
    """Return the number of an option; 4096.0 is accepted as whole, since many clients send it."""
    whole = name in _INTEGERS
    if isinstance(value, float) and whole and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"options.{name} must be a {'whole ' * whole}number, not {value!r}")
    return value


def _stops(stop: Any) -> Any:
    """Return the stop strings, without empty ones."""
    strings = [stop] if isinstance(stop, str) else stop
    if isinstance(strings, list):
        return [string for string in strings if string != ""] or None
    return strings
