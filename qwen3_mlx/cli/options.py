"""Options that several subcommands share, and the loading of the model they name."""

from pathlib import Path
from typing import Annotated, Any

import typer

import qwen3_mlx  # resolves its names on first use: `--help` loads no tokenizer and no model
from qwen3_mlx import interrupt
from qwen3_mlx.cli.console import Bar
from qwen3_mlx.model.sizes import SIZES

_MODEL, _REPLY, _SAMPLING, _DISPLAY = "Model", "Generation", "Sampling", "Display"
_VARIABLE = "QWEN3_MODEL"


def option(*names: str, panel: str, text: str, **more: Any) -> Any:
    """Create an option that the help shows in `panel`."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


Model = Annotated[
    str | None,
    option(
        "--model",
        "-m",
        panel=_MODEL,
        text=f"Folder, hub name or size: {', '.join(SIZES)}.",
        envvar=_VARIABLE,
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Folder, hub name or size; the embedded demo if omitted.",
        envvar=_VARIABLE,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, option("--revision", panel=_MODEL, text="Branch, tag or commit on the hub.")
]
Bits = Annotated[
    int | None,
    option("--bits", panel=_MODEL, text="Quantize while loading: 2, 3, 4, 5, 6 or 8 bits."),
]
Dtype = Annotated[
    str | None, option("--dtype", panel=_MODEL, text="Compute dtype: bfloat16, float16 or float32.")
]
Dequantize = Annotated[
    bool | None,
    option(
        "--dequantize/--no-dequantize",
        panel=_MODEL,
        text="Hold quantized weights as --dtype; default for small models on a CPU (faster).",
    ),
]
Context = Annotated[
    int | None,
    option("--context", panel=_MODEL, text="Context window: maximum tokens of prompt and reply."),
]
KvBits = Annotated[
    str | None,
    option("--kv-bits", panel=_MODEL, text="KV cache precision: 8, k8v4 or 4 bits."),
]
Draft = Annotated[
    str | None,
    option(
        "--draft",
        panel=_MODEL,
        text="Speculative decoding, same reply: ngram, or a smaller model, such as 0.6B for 8B.",
    ),
]
PromptCache = Annotated[
    Path | None,
    option(
        "--prompt-cache",
        panel=_MODEL,
        text="Folder that keeps KV caches of long prompts across restarts.",
    ),
]
System = Annotated[str | None, option("--system", "-s", panel=_REPLY, text="System prompt.")]
Thinking = Annotated[
    bool | None,
    option(
        "--thinking/--no-thinking", panel=_REPLY, text="Think before the answer, or answer at once."
    ),
]
ThinkingBudget = Annotated[
    int | None, option("--thinking-budget", panel=_REPLY, text="Maximum tokens of thinking.")
]
MaxTokens = Annotated[
    int | None,
    option(
        "--max-tokens", "-n", panel=_REPLY, text="Maximum tokens to generate, thinking included."
    ),
]
Stop = Annotated[
    list[str] | None,
    option("--stop", panel=_REPLY, text="Stop string: end the answer before it; may be repeated."),
]
Seed = Annotated[
    int | None,
    option("--seed", panel=_SAMPLING, text="Random seed: the same seed gives the same reply."),
]
Temperature = Annotated[
    float | None,
    option("--temperature", "-t", panel=_SAMPLING, text="Sampling temperature; 0 is greedy."),
]
TopP = Annotated[
    float | None,
    option(
        "--top-p", panel=_SAMPLING, text="Keep the most likely tokens up to this total probability."
    ),
]
TopK = Annotated[
    int | None,
    option("--top-k", panel=_SAMPLING, text="Keep the k most likely tokens; 0 keeps all."),
]
MinP = Annotated[
    float | None,
    option(
        "--min-p", panel=_SAMPLING, text="Minimum probability, relative to the most likely token."
    ),
]
PresencePenalty = Annotated[
    float | None,
    option(
        "--presence-penalty",
        panel=_SAMPLING,
        text="Penalty on tokens already in the reply: 0 to 2.",
    ),
]
HideThinking = Annotated[bool, option("--hide-thinking", panel=_DISPLAY, text="Hide the thinking.")]
Quiet = Annotated[
    bool, option("--quiet", "-q", panel=_DISPLAY, text="Show only the answer and errors.")
]


def load(
    model: str | Path | None, *, what: str = "loading", quiet: bool = False, **options: Any
) -> "qwen3_mlx.LLM":
    """Load a model, with a progress bar for the download and one for loading, unless `quiet`.

    From then on Ctrl-C raises KeyboardInterrupt, so that the model is closed.
    """
    with Bar("downloading", in_bytes=True) as downloading, Bar(what) as loading:
        if not quiet:
            options |= {"progress": loading, "download_progress": downloading}
        llm = qwen3_mlx.load(model, **options)
    # Until here Ctrl-C ends the process at once: nothing needs closing.
    interrupt.restore_keyboard_interrupt()
    return llm
