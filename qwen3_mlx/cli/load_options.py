"""What several verbs have in common: which model, and how it is loaded."""

from pathlib import Path
from typing import Annotated, Any

import typer

import qwen3_mlx  # whose names resolve on first use: `--help` loads no tokenizer and no model
from qwen3_mlx import interrupt
from qwen3_mlx.cli.console import Bar
from qwen3_mlx.model.sizes import SIZES

_MODEL, _REPLY, _CHOICE, _SHOW = "Model", "Reply", "Choice of words", "Display"
_VARIABLE = "QWEN3_MODEL"


def option(*names: str, panel: str, text: str, **more: Any) -> Any:
    """Describe an option that the help shows in `panel`."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


Model = Annotated[
    str | None,
    option(
        "--model",
        "-m",
        panel=_MODEL,
        text=f"A folder, a hub name, or a size: {', '.join(SIZES)}.",
        envvar=_VARIABLE,
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a hub name or a size; else the embedded demo.",
        envvar=_VARIABLE,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, option("--revision", panel=_MODEL, text="The hub's branch, tag or commit.")
]
Bits = Annotated[
    int | None, option("--bits", panel=_MODEL, text="Quantize while loading: 2, 3, 4, 5, 6 or 8.")
]
Dtype = Annotated[
    str | None, option("--dtype", panel=_MODEL, text="Compute in bfloat16, float16 or float32.")
]
Dequantize = Annotated[
    bool | None,
    option(
        "--dequantize/--no-dequantize",
        panel=_MODEL,
        text="Hold quantized weights as --dtype; on a CPU the small are, and run faster.",
    ),
]
Context = Annotated[
    int | None, option("--context", panel=_MODEL, text="At most so many tokens, prompt and reply.")
]
KvBits = Annotated[
    str | None,
    option("--kv-bits", panel=_MODEL, text="Keep what has been read in 8, k8v4 or 4 bits."),
]
Draft = Annotated[
    str | None,
    option(
        "--draft",
        panel=_MODEL,
        text="Fewer passes, same reply: ngram, or a smaller model, as 0.6B beside 8B.",
    ),
]
PromptCache = Annotated[
    Path | None,
    option(
        "--prompt-cache", panel=_MODEL, text="Keep long prompts in this folder, as they were read."
    ),
]
System = Annotated[str | None, option("--system", "-s", panel=_REPLY, text="A system prompt.")]
Thinking = Annotated[
    bool | None,
    option(
        "--thinking/--no-thinking", panel=_REPLY, text="Think before the answer, or answer at once."
    ),
]
ThinkingBudget = Annotated[
    int | None, option("--thinking-budget", panel=_REPLY, text="Think at most so many tokens.")
]
MaxTokens = Annotated[
    int | None,
    option("--max-tokens", "-n", panel=_REPLY, text="At most so many tokens, thinking too."),
]
Stop = Annotated[
    list[str] | None,
    option("--stop", panel=_REPLY, text="End before this text; may be given again."),
]
Seed = Annotated[int | None, option("--seed", panel=_CHOICE, text="The same seed, the same reply.")]
Temperature = Annotated[
    float | None, option("--temperature", "-t", panel=_CHOICE, text="0 takes the likeliest token.")
]
TopP = Annotated[
    float | None,
    option("--top-p", panel=_CHOICE, text="Only the likeliest that make up this share."),
]
TopK = Annotated[
    int | None, option("--top-k", panel=_CHOICE, text="Only the k likeliest; 0 is all.")
]
MinP = Annotated[
    float | None,
    option("--min-p", panel=_CHOICE, text="Only those this likely, beside the likeliest."),
]
PresencePenalty = Annotated[
    float | None, option("--presence-penalty", panel=_CHOICE, text="Against repetition: 0 to 2.")
]
HideThinking = Annotated[
    bool, option("--hide-thinking", panel=_SHOW, text="Do not show the thinking.")
]
Quiet = Annotated[
    bool, option("--quiet", "-q", panel=_SHOW, text="Nothing but the answer, and errors.")
]


def load(
    model: str | Path | None, *, what: str = "loading", quiet: bool = False, **options: Any
) -> "qwen3_mlx.LLM":
    """Load a model, with a bar for what is downloaded and one for the rest, unless `quiet`.

    From then on Ctrl-C raises a KeyboardInterrupt, for the model to be closed.
    """
    with Bar("downloading", in_bytes=True) as downloading, Bar(what) as loading:
        if not quiet:
            options |= {"progress": loading, "download_progress": downloading}
        llm = qwen3_mlx.load(model, **options)
    interrupt.unwind()
    return llm
