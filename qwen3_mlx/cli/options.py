"""What several verbs have in common: which model, and how it is loaded."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_mlx.model.published import SIZES

_MODEL = "Model"
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
