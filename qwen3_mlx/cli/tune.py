"""`qwen3 tune`: fine-tunes a checkpoint with lessons, into an adapter."""

import json
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx.cli.console import Bar, format_bytes, note, print_facts
from qwen3_mlx.cli.option_groups import option, with_options
from qwen3_mlx.cli.options import FormatOptions, Json, ModelArgument
from qwen3_mlx.interrupt import interruptible
from qwen3_mlx.tuning.events import SampleReply, StepDone, TuningEvent, TuningPlan, Validated

_DATA, _TRAINING = "Data", "Training"
_TAG = re.compile(r"<[^<>]*>")  # of a template, such as <|im_end|> and <think>
_SHOWN = 100  # characters of a sample's prompt, reply and lesson


@dataclass(frozen=True, slots=True)
class DataOptions:
    """The lessons, and where the adapter goes."""

    data: Annotated[
        Path,
        option(
            panel=_DATA,
            metavar="FILE.jsonl",
            text="Lessons, a JSON object a line: messages (and tools), prompt and completion, or "
            "text.",
        ),
    ]
    out: Annotated[Path, option(panel=_DATA, text="Folder to write.", show_default=True)] = Path(
        "adapter"
    )
    valid: Annotated[
        Path | None,
        option(
            panel=_DATA,
            metavar="FILE.jsonl",
            text="Lessons to validate with (default: a tenth of the lines).",
        ),
    ] = None
    keep: Annotated[
        Path | None,
        option(
            panel=_DATA,
            metavar="FILE",
            text="Replies that shall not change: lessons (.jsonl), or as text a question a line.",
        ),
    ] = None
    max_length: Annotated[
        int, option(panel=_DATA, text="Cut lessons after so many tokens.", show_default=True)
    ] = 2048


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """The trained matrices, and the steps."""

    type: Annotated[
        str,
        option(
            panel=_TRAINING,
            text="lora (the default): low-rank matrices beside the weights; dora: their magnitudes "
            "as well; full: the weights themselves.",
        ),
    ] = "lora"
    rank: Annotated[
        int, option(panel=_TRAINING, text="Rank of the matrices.", show_default=True)
    ] = 8
    scale: Annotated[
        float,
        option(panel=_TRAINING, text="Scale of their product: alpha / rank.", show_default=True),
    ] = 2.0
    layers: Annotated[
        int | None, option(panel=_TRAINING, text="Train only the last so many layers.")
    ] = None
    steps: Annotated[
        int | None, option(panel=_TRAINING, text="Batches to train with (default: 200).")
    ] = None
    epochs: Annotated[
        float | None,
        option(panel=_TRAINING, text="How often to go through all lessons, instead of --steps."),
    ] = None
    batch: Annotated[
        int, option(panel=_TRAINING, text="Lessons computed at once.", show_default=True)
    ] = 4
    accumulate: Annotated[
        int,
        option(
            panel=_TRAINING,
            text="Batches in a step: that of a larger batch, in less memory.",
            show_default=True,
        ),
    ] = 1
    learning_rate: Annotated[
        float | None,
        option(panel=_TRAINING, text="Of Adam (default: 2e-4; 1e-5 with --type full)."),
    ] = None
    keep_weight: Annotated[
        float,
        option(
            panel=_TRAINING,
            text="Weight of the divergence from what is to be kept.",
            show_default=True,
        ),
    ] = 1.0
    checkpointing: Annotated[
        bool,
        option(
            "--checkpointing",
            panel=_TRAINING,
            text="Compute activations twice, to hold fewer of them.",
        ),
    ] = False
    seed: Annotated[int, option(panel=_TRAINING, text="Random seed.", show_default=True)] = 0


@with_options
def tune(
    *,
    model: ModelArgument = None,
    lessons: DataOptions,
    training: TrainingOptions,
    loading: FormatOptions,
    resume: Annotated[
        bool, option("--resume", panel=_TRAINING, text="Continue the training in --out.")
    ] = False,
    plan: Annotated[
        bool, option("--plan", panel=_TRAINING, text="Show the plan and its memory; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune MODEL with lessons; writes an adapter, in mlx-lm's format, to a folder.

    [bold]qwen3 tune 4B --data lessons.jsonl[/bold]   train a LoRA, on quantized weights as well.
    [bold]qwen3 --model 4B --adapter adapter "Hello"[/bold]   use it; also chat, serve, convert.

    Each turn of the assistant's is a lesson of its own; what stands before it is
    context. The adapter with the lowest validation loss is kept, and training
    stops early when that no longer falls. Ctrl-C keeps everything; the same
    command with --resume continues.
    """
    with _Display(plan_only=plan, as_json=as_json) as display:
        made = qwen3_mlx.tune(
            model,
            **asdict(lessons),
            **asdict(training),
            **asdict(loading),
            resume=resume,
            report=display,
            download_progress=display.downloading,
        )
    if as_json:
        typer.echo(json.dumps({**asdict(made), "folder": str(made.folder)}))
        return
    before = "" if made.loss_before is None else f", {made.loss_before:.4f} before"
    early = ", where validations were no better any more" if made.stopped_early else ""
    facts = {
        "adapter": str(made.folder),
        "steps": f"{made.steps:,}{early}, the best after {made.best_step:,}",
        "loss": f"{made.loss:.4f} nats a token{before}",
        "time": f"{made.seconds:,.1f} s",
        "peak memory": format_bytes(made.peak_memory),
    }
    if made.kept_kl is not None:
        facts["forgotten"] = f"{made.kept_kl:.4f} nats a token: KL divergence on {lessons.keep}"
    if (picture := made.folder / "losses.svg").is_file():
        facts["picture"] = str(picture)
    print_facts(facts)
    options = made.usage.removeprefix("qwen3 ")
    note(f"Try it: {made.usage}")
    note(f"Serve it: qwen3 serve {options}; in Python: load(..., adapter={str(made.folder)!r})")
    note("Merge it into a checkpoint: qwen3 convert MODEL OUT --adapter; see docs/adapters.md")


class _Display:
    """Shows the events of a training: a table, a bar, a line for each validation and sample."""

    def __init__(self, *, plan_only: bool, as_json: bool) -> None:
        self._plan_only, self._as_json = plan_only, as_json
        self._stack = ExitStack()
        self.downloading = self._stack.enter_context(Bar("downloading", in_bytes=True))
        self._bar = self._stack.enter_context(Bar("training"))
        self._step = 0
        self._loss = ""

    def __call__(self, event: TuningEvent) -> None:
        """Show an event."""
        if isinstance(event, TuningPlan):
            if self._plan_only and self._as_json:
                typer.echo(json.dumps(asdict(event)))
            else:
                self._show_plan(event)
            if self._plan_only:
                raise typer.Exit
            # From here on there is something to save.
            self._stack.enter_context(interruptible())
        elif isinstance(event, StepDone):
            self._step, self._loss = event.step, f"loss {event.loss:.4f}"
            if event.kept_kl is not None:
                self._loss += f", kept {event.kept_kl:.4f}"
            self._bar(event.step, event.steps, f"step {event.step:,}: {self._loss}")
        elif isinstance(event, Validated):
            before = f"step {event.step:,}: {self._loss}, " if event.step else "before: "
            note(f"{before}validation {event.loss:.4f}{' (best so far)' if event.best else ''}")
        elif isinstance(event, SampleReply):
            asked, said = _one_line(_TAG.sub(" ", event.prompt)), _one_line(event.reply)
            note(f"{asked} -> {said} (the lesson: {_one_line(event.expected)})")

    @staticmethod
    def _show_plan(plan: TuningPlan) -> None:
        rows = {
            "lessons": f"{plan.lessons:,}, and {plan.valid:,} to validate with",
            "tokens": f"{plan.tokens:,}, of which {plan.learned:,} are learned; the longest lesson "
            f"has {plan.longest:,}",
            "cut": f"{plan.cut:,} at their end; {plan.left_out:,} left out, of which nothing to "
            "learn would remain",
            "keep": f"{plan.keep:,} replies",
            "training": f"{plan.steps:,} steps, {plan.epochs:.2f} epochs",
            "trained": f"{plan.trained:,} parameters",
            "memory": f"{format_bytes(plan.memory)} beside the model, at most",
        }
        if not plan.cut + plan.left_out:
            del rows["cut"]
        if not plan.keep:
            del rows["keep"]
        for name, fact in rows.items():
            note(f"{name:10} {fact}")

    def __enter__(self) -> "_Display":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is KeyboardInterrupt:
            note(
                f"Interrupted after step {self._step:,}; the same command with --resume continues."
            )
            raise typer.Exit(130)


def _one_line(text: str) -> str:
    """Return the end of a text, on one line."""
    return (
        f"...{text[-_SHOWN:]}".replace("\n", " ") if len(text) > _SHOWN else " ".join(text.split())
    )
