"""`qwen3 convert`: any Qwen3 checkpoint as a folder for MLX, quantized."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import qwen3_mlx  # whose names resolve on first use
from qwen3_mlx import interrupt
from qwen3_mlx.checkpoint.hub import check_name, upload
from qwen3_mlx.cli.console import Bar, note, sized
from qwen3_mlx.cli.evaluate import compare, facts_of, read_text, refuse_unloadable
from qwen3_mlx.cli.load_options import option
from qwen3_mlx.evaluate.plots import Point, check_picture, draw
from qwen3_mlx.model.sizes import folder_name

_FORMAT, _RECIPE, _WRITING = "Format", "Recipe", "Writing"
_DOWNLOADING = "downloading"


def convert(  # noqa: PLR0913 - one parameter an option
    source: Annotated[str, typer.Argument(help="A folder, or a hub name such as Qwen/Qwen3-8B.")],
    output: Annotated[Path, typer.Argument(help="The folder to make.")],
    bits: Annotated[
        int | None,
        option("--bits", "-b", panel=_FORMAT, text="2, 3, 4, 5, 6 or 8 bits a weight; else 4."),
    ] = None,
    group_size: Annotated[
        int | None,
        option(
            "--group-size",
            "-g",
            panel=_FORMAT,
            text="Weights that share a scale: 32, 64 or 128; 64 if not given.",
        ),
    ] = None,
    mode: Annotated[
        str, option("--mode", panel=_FORMAT, text="affine (the usual), mxfp4, mxfp8 or nvfp4.")
    ] = "affine",
    dtype: Annotated[
        str | None,
        option(
            "--dtype",
            panel=_FORMAT,
            text="bfloat16, float16 or float32 for what is not quantized; else the source's.",
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        option("--dequantize", panel=_FORMAT, text="Quantize nothing; undo what is quantized."),
    ] = False,
    recipe: Annotated[
        str,
        option(
            "--recipe",
            "-r",
            panel=_RECIPE,
            text="uniform; mixed: more bits for embedding, head, first and last layer; mixed-rich: "
            "for attention and down_proj, too; auto: measured on text, see --target-bpw.",
        ),
    ] = "uniform",
    target_bpw: Annotated[
        float | None,
        option(
            "--target-bpw",
            panel=_RECIPE,
            text="For auto: bits a weight may take on average, scales and all.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        option(
            "--calibration",
            panel=_RECIPE,
            text="For auto: a text file to measure on; else the topics of Python's own help.",
        ),
    ] = None,
    revision: Annotated[
        str | None, option("--revision", panel=_WRITING, text="The hub's branch, tag or commit.")
    ] = None,
    force: Annotated[
        bool, option("--force", "-f", panel=_WRITING, text="Replace a checkpoint that is there.")
    ] = False,
    allow_nonfinite: Annotated[
        bool,
        option("--allow-nonfinite", panel=_WRITING, text="Take NaN and infinities as they are."),
    ] = False,
    report: Annotated[
        bool,
        option(
            "--report",
            panel=_WRITING,
            text="Afterwards compare the result with the source on text, and add report.json and "
            "report.svg; both are loaded for that.",
        ),
    ] = False,
    upload_to: Annotated[
        str | None,
        option("--upload-to", panel=_WRITING, text="Put the result on the hub under this name."),
    ] = None,
    as_json: Annotated[
        bool, option("--json", panel=_WRITING, text="Print JSON, for programs.")
    ] = False,
) -> None:
    """Write SOURCE as an MLX checkpoint into the folder OUTPUT, some rows at a time.

    [bold]qwen3 convert Qwen/Qwen3-8B qwen3-8b-4bit[/bold]   as mlx-lm does it.
    [bold]qwen3 convert ./qwen3-8b out --recipe auto --target-bpw 4.5[/bold]   as small, closer.
    [bold]qwen3 convert Qwen/Qwen3-8B-FP8 out --dequantize[/bold]   FP8, AWQ, GPTQ are read.

    No model is held in memory: 1 GB is enough for any size (--recipe auto takes more). An
    interrupted conversion goes on where it was when the command is given again.
    """
    picture = output / "report.svg"
    if report:
        check_picture(Path(picture.name))
        refuse_unloadable(source, revision)
    if upload_to:
        check_name(upload_to)
    text = None if calibration is None else read_text(calibration)
    with _Bars() as bars:
        made = qwen3_mlx.convert(
            source,
            output,
            revision=revision,
            bits=bits,
            group_size=group_size,
            mode=mode,
            recipe=recipe,
            target_bpw=target_bpw,
            calibration=text,
            dtype=dtype,
            dequantize=dequantize,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=bars,
        )
    facts = {key: value for key, value in asdict(made).items() if key != "formats"}
    facts["output"] = str(made.output)
    if report:
        found, modules = compare(source, output, read_text(None), revision=revision)
        draw(picture, [Point(output.name, made.bits_per_weight, found.mean_kl)], modules)
        facts["report"] = facts_of(source, str(output), found, modules)
        (output / "report.json").write_text(json.dumps(facts["report"], indent=2), "utf-8")
    if upload_to:
        facts["commit"] = upload(output, upload_to)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _print(made, facts)


class _Bars:
    """A progress bar for each kind of work, one after another."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._what = ""
        self._bar: Bar | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far the work is."""
        if what != self._what or self._bar is None:
            self._stack.close()
            self._what = what
            in_bytes = what in (_DOWNLOADING, "writing")
            self._bar = self._stack.enter_context(Bar(what, in_bytes=in_bytes))
            if what != _DOWNLOADING:
                interrupt.unwind()
        self._bar(done, total)

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is KeyboardInterrupt and self._what == "writing":
            note("Interrupted; the same command goes on behind what is finished.")
            raise typer.Exit(130)


def _print(made: "qwen3_mlx.Conversion", facts: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    shown = {
        "folder": str(made.output),
        "size": f"{sized(made.bytes)} in {made.tensors:,} tensors",
        "bits per weight": f"{made.bits_per_weight:.2f}",
        "time": f"{made.seconds:,.1f} s",
        "peak memory": sized(made.peak_memory),
    }
    if found := facts.get("report"):
        shown["mean KL divergence"] = f"{found['mean_kl']:.5f} nats a token"
        shown["same likeliest token"] = f"{100 * found['agreement']:.2f} %"
    if "commit" in facts:
        shown["uploaded"] = facts["commit"]
    for name, fact in shown.items():
        table.add_row(f"[bold]{name}[/bold]", fact)
    Console().print(table)
    note(f'Try it: qwen3 --model {folder_name(made.output)} "Why is the sky blue?"')
