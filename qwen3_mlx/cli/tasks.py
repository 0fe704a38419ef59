"""`qwen3 eval tasks`: evaluation tasks of lm-eval."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_mlx.cli.console import Bar, note, print_table
from qwen3_mlx.cli.model_facts import refuse_other_kinds
from qwen3_mlx.cli.option_groups import option, with_options
from qwen3_mlx.cli.options import CheckpointOptions, Json, ModelArgument, load_model
from qwen3_mlx.evaluate.tasks import Answering, TaskResults, check_lm_eval, run_tasks


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Which documents are asked, and in which form."""

    include: Annotated[
        Path | None, option(file_okay=False, exists=True, text="Folder with further tasks.")
    ] = None
    limit: Annotated[
        float | None, option(text="Documents of each task; below 1, a share of them.")
    ] = None
    num_fewshot: Annotated[
        int | None, option(min=0, text="Examples before each question (default: the task's own).")
    ] = None
    apply_chat_template: Annotated[
        bool, option("--apply-chat-template", text="Ask in the form of a conversation.")
    ] = False
    thinking: Annotated[
        bool | None,
        option(text="Think before the answer, or not; both imply --apply-chat-template."),
    ] = None
    gen_kwargs: Annotated[
        str | None,
        option(
            metavar="NAME=VALUE,...",
            text="Generate differently: do_sample=true,temperature=0.6,max_gen_toks=8192.",
        ),
    ] = None
    seed: Annotated[
        int | None, option(text="Seed of examples and sampling (default: lm-eval's).")
    ] = None


@with_options
def tasks(
    *,
    model: ModelArgument = None,
    names: Annotated[
        str, option("--tasks", metavar="NAME,...", text="Tasks, groups or tags of lm-eval.")
    ],
    asking: TaskOptions,
    loading: CheckpointOptions,
    as_json: Json = False,
) -> None:
    """Evaluate MODEL on tasks of lm-eval, such as gsm8k, mmlu_pro or hellaswag.

    The data sets come from the Hugging Face hub. What requests have in common
    is read once. The thinking is no part of the answers; it needs room, so give
    --gen-kwargs max_gen_toks=8192 with --thinking. Code that a model writes is
    never run: tasks that would, such as humaneval, are refused.
    """
    check_lm_eval()
    chat = asking.apply_chat_template or asking.thinking is not None
    with load_model(model, loading, what=f"loading {model or 'the demo'}") as llm:
        refuse_other_kinds(llm.kind, "tasks measure")
        with Bar("answering") as bar:
            found = run_tasks(
                llm,
                [name.strip() for name in names.split(",")],
                include=asking.include,
                limit=asking.limit,
                num_fewshot=asking.num_fewshot,
                gen_kwargs=asking.gen_kwargs,
                answering=Answering(chat, asking.thinking, asking.seed),
                progress=bar,
            )
    _print_notes(found)
    if as_json:
        from lm_eval.utils import handle_non_serializable

        metrics = found.results["results"]
        typer.echo(json.dumps(metrics, indent=2, default=handle_non_serializable))
    else:
        _print_metrics(found.results)


def _print_metrics(results: dict[str, Any]) -> None:
    """Print the metrics, and their standard errors, of tasks and groups."""
    rows = []
    for name, metrics in results["results"].items():
        shown, examples = metrics["alias"], str(results["n-shot"].get(name, ""))
        for key, value in metrics.items():
            metric, is_metric, variant = key.partition(",")
            if is_metric and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{variant}", "")
                rows.append((shown, examples, variant, metric, _number(value), _number(error)))
                shown = examples = ""
    print_table(("task", "examples", "filter", "metric", "value", "standard error"), rows)


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _print_notes(found: TaskResults) -> None:
    times = found.prompt_tokens / max(1, found.tokens_read)
    note(
        f"Read {found.tokens_read:,} tokens of prompts; without sharing what they begin with, "
        f"{found.prompt_tokens:,} ({times:.1f} times as many)."
    )
    if found.shortened:
        note(f"{found.shortened:,} requests lost their beginning: the context window is too short.")
    if found.unfinished:
        note(
            f"{found.unfinished:,} replies ended inside their thinking, so without an answer; "
            "--gen-kwargs max_gen_toks=N allows more tokens."
        )
