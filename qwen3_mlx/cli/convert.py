"""`qwen3 convert`: converts a Qwen3 checkpoint to an MLX checkpoint, quantized or not."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx.checkpoint.hub import check_name, upload
from qwen3_mlx.cli.console import Bar, format_bytes, note, print_facts
from qwen3_mlx.cli.evaluate import compare, comparison_dict, read_text, refuse_unloadable
from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.cli.options import CheckpointOptions, GgufFile, with_file
from qwen3_mlx.evaluate.plots import Point, check_picture, draw
from qwen3_mlx.interrupt import interruptible
from qwen3_mlx.model.quantization import AFFINE

_FORMAT, _RECIPE, _SOURCE, _OUTPUT = "Format", "Recipe", "Source", "Output"
_DOWNLOADING, _DISTILLING = "downloading", "distilling"


def convert(  # noqa: PLR0913 - one parameter an option
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder, or hub name such as Qwen/Qwen3-8B."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to create.")],
    bits: Annotated[
        int | None,
        option(
            "--bits", "-b", panel=_FORMAT, text="Bits per weight: 2, 3, 4, 5, 6 or 8 (default: 4)."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        option(
            "--group-size",
            "-g",
            panel=_FORMAT,
            text="Weights that share a scale: 32, 64 or 128 (default: 64).",
        ),
    ] = None,
    mode: Annotated[
        str, option("--mode", panel=_FORMAT, text="affine (the default), mxfp4, mxfp8 or nvfp4.")
    ] = AFFINE,
    dtype: Annotated[
        str | None,
        option(
            "--dtype",
            panel=_FORMAT,
            text="Dtype of tensors that are not quantized: bfloat16, float16 or float32 "
            "(default: that of the source).",
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        option("--dequantize", panel=_FORMAT, text="Write floats; dequantize a quantized source."),
    ] = False,
    recipe: Annotated[
        str,
        option(
            "--recipe",
            "-r",
            panel=_RECIPE,
            text="uniform (the default); mixed: more bits for embedding, head, first and last "
            "layer; mixed-rich: for attention and down_proj, too; auto: measured on text, with "
            "--target-bpw.",
        ),
    ] = "uniform",
    target_bpw: Annotated[
        float | None,
        option(
            "--target-bpw",
            panel=_RECIPE,
            text="For auto: average bits per weight, scales included.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        option(
            "--calibration",
            panel=_RECIPE,
            text="For auto and --distill: text file to measure on and to learn from (default: "
            "Python's help topics).",
        ),
    ] = None,
    distill: Annotated[
        int | None,
        option(
            "--distill",
            metavar="STEPS",
            panel=_RECIPE,
            text="Tune scales and biases after rounding, so that the result predicts what the "
            "original does; 100 steps are a beginning. Takes 14 GB of memory for an 8B in 4 bits.",
        ),
    ] = None,
    revision: Annotated[
        str | None, option("--revision", panel=_SOURCE, text="Branch, tag or commit on the hub.")
    ] = None,
    file: GgufFile = None,
    adapter: Annotated[
        str | None,
        option(
            "--adapter",
            panel=_SOURCE,
            text="Merge this fine-tuned adapter (LoRA): a folder of mlx-lm's or PEFT's, or a hub "
            "name.",
        ),
    ] = None,
    force: Annotated[
        bool, option("--force", "-f", panel=_OUTPUT, text="Replace an existing checkpoint.")
    ] = False,
    allow_nonfinite: Annotated[
        bool,
        option("--allow-nonfinite", panel=_SOURCE, text="Accept weights with NaN or infinity."),
    ] = False,
    report: Annotated[
        bool,
        option(
            "--report",
            panel=_OUTPUT,
            text="Compare the result with the source on text, and add report.json and report.svg; "
            "loads both models.",
        ),
    ] = False,
    upload_to: Annotated[
        str | None,
        option("--upload-to", panel=_OUTPUT, text="Upload the result to the hub under this name."),
    ] = None,
    as_json: Annotated[
        bool, option("--json", panel=_OUTPUT, text="Print the result as JSON.")
    ] = False,
) -> None:
    """Convert SOURCE to an MLX checkpoint in the folder OUTPUT, quantized to 4 bits by default.

    [bold]qwen3 convert Qwen/Qwen3-8B qwen3-8b-4bit[/bold]   write what mlx-lm writes.
    [bold]qwen3 convert ./qwen3-8b out --recipe auto --target-bpw 4.5[/bold]   lose less.
    [bold]qwen3 convert Qwen3-8B-Q4_K_M.gguf out[/bold]   keep its codes, as of GPTQ, AWQ ...
    [bold]qwen3 convert Qwen/Qwen3-8B-FP8 out --dequantize[/bold]   write floats.

    Tensors are converted some rows at a time: 1 GB of memory is enough for any
    model (--recipe auto and --distill need more). To resume an interrupted conversion, run
    the same command again.
    """
    source = with_file(source, file) or source
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
            adapter=adapter,
            bits=bits,
            group_size=group_size,
            mode=mode,
            recipe=recipe,
            target_bpw=target_bpw,
            calibration=text,
            distill=distill,
            dtype=dtype,
            dequantize=dequantize,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=bars,
        )
    facts = {key: value for key, value in asdict(made).items() if key != "formats"}
    facts["output"] = str(made.output)
    if report:
        original = CheckpointOptions(revision=revision, adapter=adapter)
        found, modules = compare(source, output, reference_options=original)
        draw(picture, [Point(output.name, made.bits_per_weight, found.mean_kl)], modules)
        facts["report"] = comparison_dict(source, str(output), found, modules)
        (output / "report.json").write_text(json.dumps(facts["report"], indent=2), "utf-8")
    if upload_to:
        facts["commit"] = upload(output, upload_to)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _print(made, facts)


class _Bars:
    """Progress bars for the kinds of work, one after another."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._what = ""
        self._bar: Bar | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Update the bar of this kind of work; a new kind replaces the bar."""
        if what != self._what or self._bar is None:
            self._stack.close()
            self._what = what
            in_bytes = what in (_DOWNLOADING, "writing")
            self._bar = self._stack.enter_context(Bar(what, in_bytes=in_bytes))
            if what != _DOWNLOADING:  # there, Ctrl-C ends the process without waiting for threads
                self._stack.enter_context(interruptible())
        self._bar(done, total)

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is KeyboardInterrupt and self._what in ("writing", _DISTILLING):
            again = "; distilling begins anew" if self._what == _DISTILLING else ""
            note(f"Interrupted; run the same command again to resume{again}.")
            raise typer.Exit(130)


def _print(made: "qwen3_mlx.Conversion", facts: dict[str, Any]) -> None:
    shown = {
        "folder": str(made.output),
        "size": f"{format_bytes(made.bytes)} in {made.tensors:,} tensors",
        "bits per weight": f"{made.bits_per_weight:.2f}",
        "scales, norms": made.dtype,
        "time": f"{made.seconds:,.1f} s",
        "peak memory": format_bytes(made.peak_memory),
    }
    if made.adapter_kept is not None:
        shown["adapter kept"] = f"{100 * made.adapter_kept:.1f} % after quantization"
    if (tuned := made.distilled) and tuned.kept:
        shown["distilled"] = f"KL {tuned.kl_before:.5f} -> {tuned.kl_after:.5f} on held-out text"
    if found := facts.get("report"):
        shown["mean KL divergence"] = f"{found['mean_kl']:.5f} nats a token"
        shown["same likeliest token"] = f"{100 * found['agreement']:.2f} %"
    if "commit" in facts:
        shown["uploaded"] = facts["commit"]
    print_facts(shown)
    note(f"Try it: {made.usage}")
