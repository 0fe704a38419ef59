"""`qwen3 eval`: perplexity of a checkpoint, and divergence from the one it was made from.

The tasks of lm-eval are in `cli/tasks.py`.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx.checkpoint.calibration_text import default_text
from qwen3_mlx.checkpoint.description import checkpoint_folder
from qwen3_mlx.checkpoint.hub import DESCRIPTION_FILES, Source
from qwen3_mlx.checkpoint.stored_formats import formats_held
from qwen3_mlx.checkpoint.weights import with_described_head
from qwen3_mlx.cli.console import Bar, note, print_facts, read_stdin
from qwen3_mlx.cli.model_facts import refuse_other_kinds
from qwen3_mlx.cli.option_groups import option, with_options
from qwen3_mlx.cli.options import (
    CheckpointOptions,
    GgufFile,
    Json,
    ModelArgument,
    alias_meant,
    load_model,
    with_file,
)
from qwen3_mlx.cli.tasks import tasks
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.evaluate.divergence import Divergence, divergence
from qwen3_mlx.evaluate.perplexity import Perplexity, perplexity
from qwen3_mlx.evaluate.plots import Point, check_picture, draw
from qwen3_mlx.evaluate.weight_errors import ModuleRow, bits_per_weight, module_errors
from qwen3_mlx.evaluate.windows import WINDOW
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import LOGITS, ModelConfig
from qwen3_mlx.model.sizes import hub_name

_FEW_TOKENS = 16  # below this a perplexity is mostly chance
_SHOWN_MODULES = 10

app = typer.Typer(rich_markup_mode="rich")
app.command("tasks")(tasks)


@app.callback(invoke_without_command=True)
def evaluate(context: typer.Context) -> None:
    """Evaluate a checkpoint: its perplexity, its divergence from another, or tasks.

    [bold]qwen3 eval perplexity ./0.6b-4bit --text book.txt[/bold]   measure one model.
    [bold]qwen3 eval divergence Qwen/Qwen3-0.6B ./0.6b-4bit[/bold]   compare two.
    [bold]qwen3 eval tasks 8B --tasks gsm8k,mmlu_pro[/bold]   ask what others are asked.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@dataclass(frozen=True, slots=True)
class ReadingOptions:
    """The text to evaluate on, and how it is cut into windows."""

    text: Annotated[
        Path | None, option(text="UTF-8 text file, or - for stdin (default: Python's help topics).")
    ] = None
    tokens: Annotated[
        int, option(min=0, text="Maximum tokens to evaluate; 0 is all.", show_default=True)
    ] = 8192
    window: Annotated[int, option(text="Tokens per window.", show_default=True)] = WINDOW
    overlap: Annotated[
        int | None, option(text="Tokens shared with the window before (default: an eighth).")
    ] = None


_DEFAULT_TEXT, _AS_PUBLISHED = ReadingOptions(), CheckpointOptions()


@app.command("perplexity")
@with_options
def perplexity_command(
    *,
    model: ModelArgument = None,
    file: GgufFile = None,
    loading: CheckpointOptions,
    reading: ReadingOptions,
    as_json: Json = False,
) -> None:
    """Measure how well MODEL predicts a text; lower is better.

    A perplexity of 8: as uncertain as between 8 equally likely tokens. Compare
    only models with the same tokenizer, on the same text and window. Nothing is
    generated, so there are no options for thinking and sampling.
    """
    text, window, overlap = read_text(reading.text), reading.window, reading.overlap
    with _load(with_file(model, file), loading) as llm, Bar("reading") as bar:
        refuse_other_kinds(llm.kind, "a perplexity measures")
        ids = _ids(llm, text, reading.tokens)
        found = perplexity(llm, ids, window=window, overlap=overlap, progress=bar)
    if found.tokens < _FEW_TOKENS:
        tokens = "1 token was" if found.tokens == 1 else f"{found.tokens} tokens were"
        note(f"Only {tokens} measured: unreliable; give a longer text.")
    if as_json:
        _print_json({"model": model, **_perplexity_facts(found)})
    else:
        print_facts(
            {
                "tokens": f"{found.tokens:,}",
                "mean loss": f"{found.mean_nll:.4f} nats a token",
                "perplexity": f"{found.perplexity:,.3f}",
            }
        )


@app.command("divergence")
@with_options
def divergence_command(
    *,
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REFERENCE", help="Original: folder, hub name or size.", callback=alias_meant
        ),
    ],
    candidate: Annotated[
        str,
        typer.Argument(
            metavar="CANDIDATE",
            help="Checkpoint made from it: folder, hub name or size.",
            callback=alias_meant,
        ),
    ],
    loading: CheckpointOptions,
    reading: ReadingOptions,
    plot: Annotated[
        Path | None,
        option(
            dir_okay=False,
            text="Also draw bits against divergence, and the modules: a .png or .svg file.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how far CANDIDATE's predictions are from REFERENCE's, as after quantization.

    KL divergence compares the probabilities of all tokens at every position of
    the text; 0 nats is no difference. It shows a loss that two perplexities can
    hide. The error of a module is that of its weights alone: the root mean
    square of their changes, relative to that of the weights.

    The model options are those of CANDIDATE; REFERENCE is loaded without. With
    the same checkpoint as both, they show what an option such as --kv-bits costs.
    """
    if plot:
        check_picture(plot)
        if _changes_weights(loading):
            what = "--adapter" if loading.bits is None else "--bits"
            raise ValueError(f"--plot shows the stored weights, which {what} changes: convert them")
    found, modules = compare(
        reference, candidate, reading, candidate_options=loading, modules_needed=plot is not None
    )
    if as_json:
        _print_json(comparison_dict(reference, candidate, found, modules))
    else:
        _print_divergence(found, modules)
    if plot:
        label = Path(candidate).name
        draw(plot, [Point(label, bits_per_weight(modules), found.mean_kl)], modules)


def compare(
    reference: str,
    candidate: str | Path,
    reading: ReadingOptions = _DEFAULT_TEXT,
    *,
    reference_options: CheckpointOptions = _AS_PUBLISHED,
    candidate_options: CheckpointOptions = _AS_PUBLISHED,
    modules_needed: bool = True,
) -> tuple[Divergence, list[ModuleRow]]:
    """Compare the predictions of two checkpoints on a text, and their stored weights by module."""
    text, window, overlap = read_text(reading.text), reading.window, reading.overlap
    refuse_unloadable(candidate, candidate_options.revision)
    with (
        _load(reference, reference_options) as first,
        _load(candidate, candidate_options) as second,
        Bar("comparing") as bar,
    ):
        if first.kind != "chat":
            note(f"{reference} is no chat model: compared are its predictions of text, which it")
            note("is not used for; they show how much a conversion changed, not what it cost.")
        ids = _ids(first, text, reading.tokens)
        found = divergence(first, second, ids, window=window, overlap=overlap, progress=bar)
    if _changes_weights(candidate_options) or _changes_weights(reference_options):
        return found, []
    folders = [  # on disk, because they were loaded
        checkpoint_folder(Source(hub_name(model), options.revision))
        for model, options in ((reference, reference_options), (candidate, candidate_options))
    ]
    return found, _modules(*folders, needed=modules_needed)


def _changes_weights(options: CheckpointOptions) -> bool:
    """Return whether the weights of a loaded model are not those that are stored."""
    return options.bits is not None or options.adapter is not None


def comparison_dict(
    reference: str, candidate: str, found: Divergence, modules: Sequence[ModuleRow]
) -> dict[str, Any]:
    """Return a comparison as a dict for JSON."""
    return {
        "tokens": found.tokens,
        "mean_kl": found.mean_kl,
        "p99_kl": found.p99_kl,
        "agreement": found.agreement,
        "reference": {"model": reference, **_perplexity_facts(found.reference)},
        "candidate": {"model": candidate, **_perplexity_facts(found.candidate)},
        "bits_per_weight": bits_per_weight(modules) if modules else None,
        "modules": [asdict(row) for row in modules],
    }


def _load(
    model: str | Path | None, options: CheckpointOptions
) -> AbstractContextManager["qwen3_mlx.LLM"]:
    return load_model(model, options, what=f"loading {model or 'the demo'}")


def refuse_unloadable(model: str | Path, revision: str | None = None) -> None:
    """Refuse a model whose predictions cannot be computed, before anything is loaded.

    Raises:
        CheckpointError: the weights must be converted first, or cannot be read, or predict nothing.
    """
    source = Source(hub_name(model), revision)
    if source.is_missing("config.json"):
        return  # loading gives the better error message
    folder = source.fetch(DESCRIPTION_FILES)
    if (folder / "config.json").is_file():
        config = with_described_head(read_json(folder / "config.json"), folder)
        formats_held(config, folder)
        if ModelConfig.from_dict(config).output != LOGITS:
            raise CheckpointError(
                f"{model} predicts no text that could be compared: it has no head"
            )


def read_text(file: Path | None) -> str:
    """Return the text of a file, of stdin for `-`, or of Python's help topics for None.

    Raises:
        typer.BadParameter: the file cannot be read, or is not UTF-8.
    """
    if file is None:
        return default_text()
    try:
        return read_stdin() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text") from error


def _ids(llm: "qwen3_mlx.LLM", text: str, limit: int) -> list[int]:
    """Return the token ids of a text, at most `limit` of them (0 is all), with a note if cut."""
    ids = llm.tokenizer.encode(text)
    if 0 < limit < len(ids):
        note(f"Reading the first {limit:,} of {len(ids):,} tokens (--tokens 0 reads all).")
        return ids[:limit]
    return ids


def _modules(reference: Path, candidate: Path, *, needed: bool) -> list[ModuleRow]:
    """Compare the weights by module; networks that differ have no such table."""
    with Bar("comparing weights") as bar:
        try:
            return module_errors(reference, candidate, progress=bar)
        except Qwen3Error as error:
            if needed:
                raise
            note(f"No table of modules: {error}.")
            return []


def _perplexity_facts(found: Perplexity) -> dict[str, float]:
    return {**asdict(found), "perplexity": found.perplexity}


def _print_divergence(found: Divergence, modules: Sequence[ModuleRow]) -> None:
    before, after = found.reference.perplexity, found.candidate.perplexity
    facts = {
        "tokens": f"{found.tokens:,}",
        "mean KL divergence": f"{found.mean_kl:.5f} nats a token",
        "99th percentile": f"{found.p99_kl:.5f} nats",
        "same likeliest token": f"{100 * found.agreement:.2f} %",
        "perplexity": f"{before:,.3f} -> {after:,.3f} ({100 * (after / before - 1):+.2f} %)",
    }
    if modules:
        facts["bits per weight"] = f"{bits_per_weight(modules):.2f}"
    print_facts(facts)
    if not modules:
        return
    worst = sorted(modules, key=lambda row: -row.error)[:_SHOWN_MODULES]
    table = Table(box=None, title_justify="left", title_style="bold")
    table.title = f"The {len(worst)} modules with the largest error, of {len(modules)}"
    table.add_column("module")
    for heading in ("format", "bits per weight", "error"):
        table.add_column(heading, justify="right")
    for row in worst:
        error = f"{100 * row.error:.3f} %"
        table.add_row(escape(row.path), row.format, f"{row.bits_per_weight:.2f}", error)
    console = Console()
    console.print()
    console.print(table)


def _print_json(facts: dict[str, Any]) -> None:
    typer.echo(json.dumps(facts, indent=2))
