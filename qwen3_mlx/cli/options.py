"""Options that several subcommands share, each declared once, and the model that they describe.

A subcommand takes a group of options as one parameter, a dataclass (see `cli/option_groups.py`).
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

import qwen3_mlx  # resolves its names on first use: `--help` loads no tokenizer and no model
from qwen3_mlx import interrupt
from qwen3_mlx.checkpoint.local import local_models
from qwen3_mlx.cli.config import Config, read_config
from qwen3_mlx.cli.console import Bar, note
from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.cli.user_files import config_file
from qwen3_mlx.cluster.hosts import LAUNCHED, PIPELINE
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.sizes import DEMO, SIZES, hub_name, is_demo

_MODEL, GENERATION, _THINKING = "Model", "Generation", "Thinking"
_SAMPLING, _DISPLAY = "Sampling", "Display"
_HOSTS = "Several machines"
MODEL_VARIABLE = "QWEN3_MODEL"
NGRAM = "ngram"  # a value of --draft
_YARN_NOTE = "YaRN is on for this context window; quality on short texts may be slightly lower."


def _model_meant(context: typer.Context, name: str | None) -> str | None:
    """Return the model that is stated, or that of the settings, as `load` takes it; None: the demo.

    Aliases are replaced.
    """
    if name is None and not context.resilient_parsing:
        name = user_config().model
    name = alias_meant(context, name)
    return None if name and is_demo(name) else name


def _models_meant(context: typer.Context, names: list[str] | None) -> list[str | None]:
    """Return the models that are stated as `load` takes them, or the default one if there is one.

    The variable is read here: as a list, it would be split at the spaces of a path.
    """
    if names:
        return [_model_meant(context, name) for name in names]
    default = _model_meant(context, os.environ.get(MODEL_VARIABLE) or None)
    return [] if default is None else [default]


def alias_meant(context: typer.Context, name: str | None) -> str | None:
    """Return a model's name, with an alias of the settings replaced by what it stands for."""
    return name if name is None or context.resilient_parsing else without_alias(name)


def without_alias(name: str) -> str:
    """Return what an alias of the settings stands for, which may be another alias.

    Raises:
        Qwen3Error: aliases stand for each other, or a name that cannot be a model is close to one.
    """
    aliases, names = user_config().aliases, [name]
    while (name := names[-1]) in aliases:
        names.append(aliases[name])
        if names[-1] in names[:-1]:
            circle = " -> ".join(names)
            raise Qwen3Error(f"{config_file()}: the aliases {circle} stand for each other")
    cannot_be_model = hub_name(name) == name and "/" not in name and not Path(name).exists()
    if cannot_be_model and name != NGRAM and (close := get_close_matches(name, aliases, 1)):
        raise Qwen3Error(f"there is no model {name!r}; did you mean the alias {close[0]}?")
    return name


def complete_model(incomplete: str) -> list[str]:
    """Return the aliases, sizes, demo and models on this machine that begin with a text."""
    here: list[str] = []
    with suppress(Qwen3Error):  # completion has no place for messages
        here = [model.name for model in local_models()[0]]
    return _beginning_with(incomplete, [*_settings_that_are_right().aliases, *SIZES, DEMO, *here])


def _complete_preset(incomplete: str) -> list[str]:
    return _beginning_with(incomplete, _settings_that_are_right().presets)


def _beginning_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.lower().startswith(incomplete.lower())]


def _settings_that_are_right() -> Config:
    try:
        return user_config()
    except Qwen3Error:
        return Config()


def _apply_preset(context: typer.Context, name: str | None) -> str | None:
    """Set the defaults of the other options to those of a preset; the command line wins."""
    if name and not context.resilient_parsing:
        context.default_map = {**(context.default_map or {}), **user_config().preset(name)}
    return name


Model = Annotated[
    str | None,
    option(
        "--model",
        "-m",
        panel=_MODEL,
        text=f"Folder, hub name, size ({', '.join(SIZES)}) or {DEMO}, the embedded model.",
        envvar=MODEL_VARIABLE,
        callback=_model_meant,
        autocompletion=complete_model,
    ),
]
Models = Annotated[
    list[str] | None,
    option(
        "--model",
        "-m",
        panel=_MODEL,
        text=f"Folder, hub name, size ({', '.join(SIZES)}) or {DEMO}, the embedded model; may be "
        f"repeated, the first is the default (or {MODEL_VARIABLE}).",
        callback=_models_meant,
        autocompletion=complete_model,
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"Folder, hub name, size or {DEMO}, the embedded model (the default).",
        envvar=MODEL_VARIABLE,
        show_default=False,
        callback=_model_meant,
        autocompletion=complete_model,
    ),
]
Adapter = Annotated[
    str | None,
    option(
        "--adapter",
        panel=_MODEL,
        text="Add this fine-tuned adapter (LoRA): a folder of mlx-lm's or PEFT's, or a hub name.",
    ),
]
HideThinking = Annotated[bool, option("--hide-thinking", panel=_DISPLAY, text="Hide the thinking.")]
Quiet = Annotated[
    bool, option("--quiet", "-q", panel=_DISPLAY, text="Show only the answer and errors.")
]
Yes = Annotated[
    bool,
    option("--yes", panel=GENERATION, text="Call the tools of MCP servers without asking."),
]
Json = Annotated[bool, option("--json", text="Print the result as JSON.")]
GgufFile = Annotated[
    str | None,
    option(
        "--file",
        text="GGUF file of several, by its name or the end of that, such as Q4_K_M; also written "
        "behind a colon: MODEL:Q4_K_M.",
    ),
]
Plot = Annotated[Path | None, option(text="Also draw a plot: a .png or .svg file.")]


def with_file(model: str | None, file: str | None) -> str | None:
    """Return the name of a model of which one GGUF file is meant."""
    return f"{model}:{file}" if model and file else model


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """The options of `load` for the weights."""

    revision: Annotated[
        str | None, option(panel=_MODEL, text="Branch, tag or commit on the hub.")
    ] = None
    bits: Annotated[
        int | None, option(panel=_MODEL, text="Quantize while loading: 2, 3, 4, 5, 6 or 8 bits.")
    ] = None
    dtype: Annotated[
        str | None, option(panel=_MODEL, text="Compute dtype: bfloat16, float16, float32 or auto.")
    ] = None
    dequantize: Annotated[
        bool | None,
        option(
            panel=_MODEL,
            text="Hold quantized weights as --dtype; default for small models on a CPU (faster).",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class WeightOptions(FormatOptions):
    """The options of `load` for a model that reads texts once, without a KV cache to keep."""

    context: Annotated[
        int | None,
        option(
            panel=_MODEL,
            text="Context window: maximum tokens of prompt and reply; beyond the model's own, with "
            "YaRN.",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class TextOptions(WeightOptions):
    """Those options, and an adapter: for vectors and scores of texts."""

    adapter: Adapter = None


@dataclass(frozen=True, slots=True)
class CacheOptions(WeightOptions):
    """Those options, and the precision of the KV cache."""

    kv_bits: Annotated[
        str | None, option(panel=_MODEL, text="KV cache precision: 8, k8v4 or 4 bits.")
    ] = None


@dataclass(frozen=True, slots=True)
class CheckpointOptions(CacheOptions):
    """Those options of `load` that change what a model predicts, or how exactly."""

    adapter: Adapter = None


@dataclass(frozen=True, slots=True)
class ServedOptions(CacheOptions):
    """The options of `load` for a model that generates, adapters apart."""

    draft: Annotated[
        str | None,
        option(
            panel=_MODEL,
            text="Speculative decoding, same reply: ngram, or a smaller model, such as 0.6B "
            "for 8B.",
            callback=alias_meant,
        ),
    ] = None
    prompt_cache: Annotated[
        Path | None,
        option(panel=_MODEL, text="Folder that keeps KV caches of long prompts across restarts."),
    ] = None
    hosts: Annotated[
        str | None,
        option(
            panel=_HOSTS,
            text="Run on several machines: names for ssh, comma-separated, this one first; local:2 "
            "is two ranks here.",
        ),
    ] = None
    split: Annotated[
        str,
        option(
            panel=_HOSTS,
            text="Divide the model by layers (pipeline, the default) or each layer (tensor).",
        ),
    ] = PIPELINE
    layers: Annotated[
        str | None,
        option(panel=_HOSTS, text="Layers of each host, such as 18,18 (default: by free memory)."),
    ] = None
    hostfile: Annotated[
        Path | None,
        option(panel=_HOSTS, text="Take the hosts from a file in the format of mlx.launch."),
    ] = None


@dataclass(frozen=True, slots=True)
class ModelOptions(ServedOptions):
    """The options of `load` for a model that generates."""

    adapter: Adapter = None


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """System prompt, length and end of a reply, tools, and the preset that all may come from."""

    preset: Annotated[
        str | None,
        option(
            panel=GENERATION,
            text="Preset of options, from the settings (see qwen3 config).",
            is_eager=True,
            callback=_apply_preset,
            autocompletion=_complete_preset,
        ),
    ] = None
    system: Annotated[
        str | None, option("--system", "-s", panel=GENERATION, text="System prompt.")
    ] = None
    max_tokens: Annotated[
        int | None,
        option(
            "--max-tokens",
            "-n",
            panel=GENERATION,
            text="Maximum tokens to generate, thinking included.",
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        option(panel=GENERATION, text="Stop string: end the answer before it; may be repeated."),
    ] = None
    tools: Annotated[
        Path | None,
        option(
            panel=GENERATION,
            metavar="FILE.py",
            text="Let the model call the functions in this file.",
        ),
    ] = None
    mcp: Annotated[
        list[Path] | None,
        option(
            panel=GENERATION,
            metavar="mcp.json",
            text="Let the model call the tools of the MCP servers in this file; may be repeated.",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class QuestionOptions:
    """Files that go with a single question, and the form of its answer."""

    file: Annotated[
        list[Path] | None,
        option(
            "--file",
            "-f",
            panel=GENERATION,
            text="Put this file before the prompt: text, code or PDF; may be repeated.",
        ),
    ] = None
    schema: Annotated[
        str | None,
        option(
            panel=GENERATION,
            metavar="FILE|FIELDS",
            text="Answer in JSON that fits this schema: a JSON file, or fields: 'name, age int'.",
        ),
    ] = None
    json: Annotated[
        bool,
        option(
            "--json",
            panel=_DISPLAY,
            text="Print each event as a line of JSON; --hide-thinking and -q leave the thinking "
            "out.",
        ),
    ] = False


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Thinking and sampling of a reply, or of all replies of a server that set none."""

    thinking: Annotated[
        bool | None, option(panel=_THINKING, text="Think before the answer, or answer at once.")
    ] = None
    thinking_budget: Annotated[
        int | None,
        option(
            panel=_THINKING,
            text="Maximum tokens of thinking; the sentence that then closes it comes on top.",
        ),
    ] = None
    seed: Annotated[
        int | None, option(panel=_SAMPLING, text="Random seed: the same seed gives the same reply.")
    ] = None
    temperature: Annotated[
        float | None,
        option("--temperature", "-t", panel=_SAMPLING, text="Sampling temperature; 0 is greedy."),
    ] = None
    top_p: Annotated[
        float | None,
        option(panel=_SAMPLING, text="Keep the most likely tokens up to this total probability."),
    ] = None
    top_k: Annotated[
        int | None, option(panel=_SAMPLING, text="Keep the k most likely tokens; 0 keeps all.")
    ] = None
    min_p: Annotated[
        float | None,
        option(panel=_SAMPLING, text="Minimum probability, relative to the most likely token."),
    ] = None
    presence_penalty: Annotated[
        float | None,
        option(panel=_SAMPLING, text="Penalty on tokens already in the reply: -2 to 2."),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        option(
            panel=_SAMPLING, text="Penalty on tokens for each time they are in the reply: -2 to 2."
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        option(
            panel=_SAMPLING,
            text="Divide the logits of tokens in prompt and reply by this; 1 is off.",
        ),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        option(
            panel=_SAMPLING,
            metavar="ID=BIAS",
            text="Add BIAS to the logit of the token with this id; may be repeated.",
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """Return the options as keywords of the library and of the server's settings.

        Raises:
            ValueError: a sampling parameter is out of its range.
        """
        names = [parameter.name for parameter in fields(SamplingParams)]
        stated = {name: getattr(self, name) for name in names} | {"logit_bias": self._biases()}
        return {
            "thinking": self.thinking,
            "thinking_budget": self.thinking_budget,
            "seed": self.seed,
            "sampling": SamplingParams(**stated),
        }

    def _biases(self) -> dict[int, float] | None:
        pairs = [pair.partition("=") for pair in self.logit_bias or ()]
        try:
            return {int(token): float(bias) for token, _, bias in pairs} or None
        except ValueError:
            stated = " ".join(self.logit_bias or ())
            raise ValueError(f"--logit-bias takes ID=BIAS, such as 42=-5, not {stated}") from None


def user_config() -> Config:
    """Return the user's settings.

    Raises:
        Qwen3Error: they are wrong.
    """
    hints = get_type_hints(ReplyOptions) | get_type_hints(SamplingOptions)
    kinds = {name: get_args(hint)[0] for name, hint in hints.items() if name != "preset"}
    config = read_config(kinds)
    for name, preset in config.presets.items():
        sampling = {key: preset[key] for key in preset if key in get_type_hints(SamplingOptions)}
        try:
            SamplingOptions(**sampling).keywords()
        except ValueError as error:
            raise Qwen3Error(f"{config_file()}: presets.{name}: {error}") from error
    return config


def follow_if_launched(options: WeightOptions) -> None:
    """Follow another rank to its end, and exit, if mlx.launch has started this process for that."""
    if getattr(options, "hosts", None) == LAUNCHED:
        following = import_module("qwen3_mlx.api.follow")  # MLX, which --help does not need
        if following.follow_launched():
            raise typer.Exit


@contextmanager
def load_model(
    model: str | Path | None,
    options: WeightOptions,
    *,
    adapters: str | Mapping[str, str] | None = None,
    what: str = "loading",
    quiet: bool = False,
) -> Iterator["qwen3_mlx.LLM"]:
    """Load a model for the block, with a bar for the download and one for loading, unless `quiet`.

    `adapters` are those of a server, as `load` takes them.

    While it loads, Ctrl-C ends the process at once; in the block it raises KeyboardInterrupt, so
    that the model is closed.
    """
    follow_if_launched(options)
    with Bar("downloading", in_bytes=True) as downloading, Bar(what) as loading:
        llm = qwen3_mlx.load(
            model,
            **{"adapter": adapters, **asdict(options)},
            progress=None if quiet else loading,
            download_progress=None if quiet else downloading,
        )
    with interrupt.interruptible(), llm:
        if options.context is not None and llm.config.yarn and not quiet:
            note(_YARN_NOTE)
        yield llm
