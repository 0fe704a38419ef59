"""`qwen3 eval`: perplexity of a checkpoint, and divergence from the one it was made from."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
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
from qwen3_mlx.checkpoint.stored import formats_stored
from qwen3_mlx.cli.console import Bar, note
from qwen3_mlx.cli.load_options import ModelArgument, load
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.evaluate.divergence import Divergence, divergence
from qwen3_mlx.evaluate.modules import ModuleRow, bits_per_weight, module_errors
from qwen3_mlx.evaluate.perplexity import Perplexity, perplexity
from qwen3_mlx.evaluate.plots import Point, check_picture, draw
from qwen3_mlx.evaluate.windows import WINDOW
from qwen3_mlx.files import read_json
from qwen3_mlx.model.sizes import hub_name

_DEFAULT_TOKENS = 8192
_FEW_TOKENS = 16  # below this a perplexity is mostly chance
_SHOWN_MODULES = 10

app = typer.Typer(rich_markup_mode="rich")


@app.callback(invoke_without_command=True)
def evaluate(context: typer.Context) -> None:
    """Evaluate a checkpoint: its perplexity, or its divergence from another.

    [bold]qwen3 eval perplexity ./0.6b-4bit --text book.txt[/bold]   measure one model.
    [bold]qwen3 eval divergence Qwen/Qwen3-0.6B ./0.6b-4bit[/bold]   compare two.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="UTF-8 text file, or - for stdin (default: Python's help topics).",
        show_default=False,
    ),
]
_Tokens = Annotated[
    int, typer.Option("--tokens", min=0, help="Maximum tokens to evaluate; 0 is all.")
]
_Window = Annotated[int, typer.Option("--window", help="Tokens per window.")]
_Overlap = Annotated[
    int | None,
    typer.Option(
        "--overlap",
        help="Tokens shared with the window before (default: an eighth).",
        show_default=False,
    ),
]
_KvBits = Annotated[
    str | None,
    typer.Option(
        "--kv-bits",
        help="KV cache precision: 8, k8v4 or 4 bits.",
        show_default=False,
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("perplexity")
def perplexity_command(
    model: ModelArgument = None,
    text: _Text = None,
    tokens: _Tokens = _DEFAULT_TOKENS,
    window: _Window = WINDOW,
    overlap: _Overlap = None,
    kv_bits: _KvBits = None,
    as_json: _Json = False,
) -> None:
    """Measure how well MODEL predicts a text; lower is better.

    A perplexity of 8: as uncertain as between 8 equally likely tokens. Compare
    only models with the same tokenizer, on the same text and window.
    """
    words = read_text(text)
    with _load(model, kv_bits) as llm, Bar("reading") as bar:
        ids = _ids(llm, words, tokens)
        found = perplexity(llm, ids, window=window, overlap=overlap, progress=bar)
    if found.tokens < _FEW_TOKENS:
        note(f"Only {found.tokens} tokens were measured: unreliable; give a longer text.")
    if as_json:
        _print_json({"model": model, **_perplexity_facts(found)})
    else:
        _print_facts(
            {
                "tokens": f"{found.tokens:,}",
                "mean loss": f"{found.mean_nll:.4f} nats a token",
                "perplexity": f"{found.perplexity:,.3f}",
            }
        )


@app.command("divergence")
def divergence_command(
    reference: Annotated[
        str,
        typer.Argument(metavar="REFERENCE", help="Original: folder, hub name or size."),
    ],
    candidate: Annotated[
        str,
        typer.Argument(
            metavar="CANDIDATE", help="Checkpoint made from it: folder, hub name or size."
        ),
    ],
    text: _Text = None,
    tokens: _Tokens = _DEFAULT_TOKENS,
    window: _Window = WINDOW,
    overlap: _Overlap = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            dir_okay=False,
            help="Also draw bits against divergence, and the modules: a .png or .svg file.",
            show_default=False,
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Measure how far CANDIDATE's predictions are from REFERENCE's, as after quantization.

    KL divergence compares the probabilities of all tokens at every position of
    the text; 0 nats is no difference. It shows a loss that two perplexities can
    hide. The error of a module is that of its weights alone: the root mean
    square of their changes, relative to that of the weights.
    """
    if plot:
        check_picture(plot)
    found, modules = compare(
        reference,
        candidate,
        read_text(text),
        tokens=tokens,
        window=window,
        overlap=overlap,
        modules_needed=plot is not None,
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
    words: str,
    *,
    tokens: int = _DEFAULT_TOKENS,
    window: int = WINDOW,
    overlap: int | None = None,
    modules_needed: bool = True,
    revision: str | None = None,
) -> tuple[Divergence, list[ModuleRow]]:
    """Compare the predictions of two checkpoints on a text, and their weights by module.

    `revision` is that of the reference.
    """
    refuse_unloadable(candidate)
    with (
        _load(reference, revision=revision) as first,
        _load(candidate) as second,
        Bar("comparing") as bar,
    ):
        ids = _ids(first, words, tokens)
        found = divergence(first, second, ids, window=window, overlap=overlap, progress=bar)
    folders = [  # on disk, because they were loaded
        checkpoint_folder(Source(hub_name(model), its_revision))
        for model, its_revision in ((reference, revision), (candidate, None))
    ]
    return found, _modules(*folders, needed=modules_needed)


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
    model: str | Path | None, kv_bits: str | None = None, revision: str | None = None
) -> "qwen3_mlx.LLM":
    return load(model, what=f"loading {model or 'the demo'}", revision=revision, kv_bits=kv_bits)


def refuse_unloadable(model: str | Path, revision: str | None = None) -> None:
    """Refuse a model whose weights cannot be computed with, before anything is loaded.

    Raises:
        CheckpointError: the weights must be converted first, or cannot be read.
    """
    source = Source(hub_name(model), revision)
    if source.is_missing("config.json"):
        return  # loading gives the better error message
    folder = source.fetch(DESCRIPTION_FILES)
    if (folder / "config.json").is_file():
        formats_stored(read_json(folder / "config.json"), folder)


def read_text(file: Path | None) -> str:
    """Return the text of a file, of stdin for `-`, or of Python's help topics for None.

    Raises:
        typer.BadParameter: the file cannot be read, or is not UTF-8.
    """
    if file is None:
        return default_text()
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
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
    _print_facts(facts)
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


def _print_facts(facts: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(f"[bold]{name}[/bold]", fact)
    Console().print(table)


def _print_json(facts: dict[str, Any]) -> None:
    typer.echo(json.dumps(facts, indent=2))
