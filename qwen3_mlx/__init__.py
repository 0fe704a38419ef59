"""Qwen3 on Apple silicon: convert a checkpoint once, then talk to it.

>>> from qwen3_mlx import load
>>> llm = load()  # the embedded demo checkpoint
>>> llm.chat("What is 12 + 34?", thinking=False).text
"""

from importlib import import_module
from typing import TYPE_CHECKING

from qwen3_mlx import interrupt
from qwen3_mlx.version import __version__ as __version__

interrupt.install_handler()
try:
    from qwen3_mlx import backend as backend  # first: loads a fast BLAS before anything imports MLX
except ImportError:  # raised again for each public name; __main__ reports it in one line
    pass

if TYPE_CHECKING:
    from qwen3_mlx import mcp as mcp
    from qwen3_mlx.api.conversation import Conversation
    from qwen3_mlx.api.convert import Conversion, convert
    from qwen3_mlx.api.llm import LLM
    from qwen3_mlx.api.load import load
    from qwen3_mlx.api.options import Options, TextOptions
    from qwen3_mlx.api.stream import AsyncStream, Reply, Stream
    from qwen3_mlx.engine.sampling_params import SamplingParams
    from qwen3_mlx.errors import CheckpointError, ContextError, Qwen3Error
    from qwen3_mlx.text.events import (
        Event,
        Finish,
        Reasoning,
        Text,
        TokenLogprob,
        ToolCall,
        ToolCallDelta,
        Usage,
    )
    from qwen3_mlx.tuning.tune import Tuning, tune

_MODULES = {
    "LLM": "api.llm",
    "AsyncStream": "api.stream",
    "CheckpointError": "errors",
    "ContextError": "errors",
    "Conversation": "api.conversation",
    "Conversion": "api.convert",
    "Event": "text.events",
    "Finish": "text.events",
    "Options": "api.options",
    "Qwen3Error": "errors",
    "Reasoning": "text.events",
    "Reply": "api.stream",
    "SamplingParams": "engine.sampling_params",
    "Stream": "api.stream",
    "Text": "text.events",
    "TextOptions": "api.options",
    "TokenLogprob": "text.events",
    "ToolCall": "text.events",
    "ToolCallDelta": "text.events",
    "Tuning": "tuning.tune",
    "Usage": "text.events",
    "convert": "api.convert",
    "load": "api.load",
    "tune": "tuning.tune",
}

__all__ = [
    "LLM",
    "AsyncStream",
    "CheckpointError",
    "ContextError",
    "Conversation",
    "Conversion",
    "Event",
    "Finish",
    "Options",
    "Qwen3Error",
    "Reasoning",
    "Reply",
    "SamplingParams",
    "Stream",
    "Text",
    "TextOptions",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "Tuning",
    "Usage",
    "__version__",
    "convert",
    "load",
    "mcp",
    "tune",
]


def __getattr__(name: str) -> object:
    if name == "mcp":  # a folder, not a name in a module
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.backend")  # raises a clear ImportError if MLX cannot be loaded
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
