"""The requests and responses of Ollama's API, as far as they are honoured here."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from qwen3_mlx.api.options import Options
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.server.openai.schema import ToolIn
from qwen3_mlx.server.wire import Messages, Parts, RequestModel, Tools, WireModel

API_VERSION = "0.12.11"
"""The version of Ollama whose API this is: the first with log probabilities."""

# What asks for something that cannot be had, and the values of it that ask for nothing.
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
_WHOLE = frozenset(("num_predict", "top_k", "seed", "num_ctx", "repeat_last_n"))
_NUMBERS = _WHOLE | _SAMPLING.keys()
# How Ollama uses its machine, and what it keeps where it shortens a prompt, which is not done here:
# no reply depends on them.
_HARMLESS = frozenset(
    ("num_gpu", "num_thread", "num_batch", "use_mmap", "use_mlock", "low_vram", "numa", "main_gpu")
    + ("f16_kv", "num_keep")
)
# Ways to choose tokens that are not known here, and the values that switch them off.
_IDLE: dict[str, float] = {"mirostat": 0, "tfs_z": 1, "typical_p": 1}
_RANDOM = -1  # as a seed
# What the library calls otherwise, where its errors and warnings begin with it.
_THEIRS = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "schema": "format",
}
_OURS = re.compile(rf"({'|'.join(_THEIRS)})(?==|: | must be )")
_DURATION = re.compile(r"[-+]?(\d+\.?\d*(h|m|s|ms|us|µs|ns))+")


class FunctionCall(WireModel):
    """A call as an assistant made it; `arguments` are an object, or the JSON text of one."""

    name: str
    arguments: Any = {}
    index: int | None = None


class ToolCallIn(WireModel):
    """A call in the history."""

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


class OllamaRequest(RequestModel):
    """What `/api/chat` and `/api/generate` have in common."""

    model: str | None = None
    stream: bool | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncate: bool | None = None
    shift: bool | None = None

    def not_honoured(self) -> list[str]:
        """Return warnings of what is asked for and does not happen.

        Raises:
            ValueError: `keep_alive` is no length of time.
        """
        stays = seconds_of(self.keep_alive)
        warnings = {
            "keep_alive was ignored: the model stays loaded": stays is not None and stays >= 0,
            "truncate was ignored: a prompt that does not fit is refused": self.truncate,
            "shift was ignored: a reply ends where the context does": self.shift,
        }
        return [words for words, so in warnings.items() if so]


class OllamaChatRequest(OllamaRequest):
    """`POST /api/chat`; without messages it loads the model, or unloads it."""

    messages: Messages[OllamaMessage] | None = None
    tools: Tools[ToolIn] | None = None


class OllamaGenerateRequest(OllamaRequest):
    """`POST /api/generate`; without a prompt it loads the model, or unloads it."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class OllamaShowRequest(RequestModel):
    """`POST /api/show`; `name` is what the model was called once."""

    model: str | None = None
    name: str | None = None


# --- what is answered ---------------------------------------------------------------------------


class OllamaMessageOut(WireModel):
    """What the model said."""

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
    """The response without a stream, and the last line of one; times are in nanoseconds."""

    message: OllamaMessageOut


class OllamaGenerateOut(_Out):
    """The same for `/api/generate`."""

    response: str
    thinking: str | None = None


class ErrorOut(WireModel):
    """Any response that is not the one asked for."""

    error: str


# --- options ------------------------------------------------------------------------------------


def read_options(options: Mapping[str, Any], context: int) -> tuple[Options, list[str]]:
    """Return the options as the library has them, and warnings of what is not honoured.

    Raises:
        ValueError: one has a value that it cannot have.
    """
    known = _NUMBERS | _HARMLESS | _IDLE.keys() | {"stop"}
    warnings = [f"unknown option {name!r} was ignored" for name in options if name not in known]
    warnings += [
        f"options.{name} is not supported and was ignored"
        for name, idle in _IDLE.items()
        if options.get(name) not in (None, idle)
    ]
    numbers = {
        name: _number(name, options[name]) for name in _NUMBERS if options.get(name) is not None
    }
    sampling = {ours: numbers.get(theirs) for theirs, ours in _SAMPLING.items()}
    if sampling["top_k"] is not None:
        sampling["top_k"] = max(0, sampling["top_k"])
    if (window := numbers.get("repeat_last_n")) == 0:
        sampling |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    elif window is not None and window > 0:
        warnings.append(
            f"options.repeat_last_n={window} was ignored: repeat_penalty looks at all tokens of "
            "prompt and reply, the other penalties at those of the reply"
        )
    room = numbers.get("num_ctx")
    if room is not None and room != context:
        warnings.append(
            f"options.num_ctx={room} was ignored: the context of this server has {context:,} tokens"
        )
    most = numbers.get("num_predict")
    if most == 0:
        warnings.append("options.num_predict=0 is no limit, as -1 is")
    seed = numbers.get("seed")
    made: Options = {
        "sampling": SamplingParams(**sampling),  # type: ignore[arg-type]
        "max_tokens": int(most) if most is not None and most > 0 else None,
        "seed": None if seed in (None, _RANDOM) else int(seed or 0),
        "stop": _stops(options.get("stop")),
    }
    return made, warnings


def in_their_words(message: str) -> str:
    """Return an error or a warning with the name by which clients of this API know the field."""
    found = _OURS.match(message)
    return _THEIRS[found[1]] + message[found.end() :] if found else message


def _number(name: str, value: Any) -> int | float:
    """Return a number as an option needs it; many clients have no whole numbers but 4096.0."""
    whole = name in _WHOLE
    if isinstance(value, float) and whole and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"options.{name} must be a {'whole ' * whole}number, not {value!r}")
    return value


def _stops(stop: Any) -> Any:
    """Return the strings that end a reply; an empty one ends none."""
    strings = [stop] if isinstance(stop, str) else stop
    if isinstance(strings, list):
        return [one for one in strings if one != ""] or None
    return strings


def seconds_of(keep_alive: float | str | None) -> float | None:
    """Return how long the model is to stay, as far as it matters here: its sign.

    Raises:
        ValueError: it is no length of time.
    """
    if not isinstance(keep_alive, str):
        return keep_alive
    try:
        return float(keep_alive)
    except ValueError:
        if not _DURATION.fullmatch(keep_alive):
            raise ValueError(
                f"keep_alive must be seconds, or a length of time such as 5m, not {keep_alive!r}"
            ) from None
    length = 1.0 if re.search("[1-9]", keep_alive) else 0.0
    return -length if keep_alive.startswith("-") else length
