"""The model card (README.md) of a converted checkpoint: its source, its formats, how to use it."""

from collections import Counter

from qwen3_mlx.checkpoint.convert import Job, Written
from qwen3_mlx.version import __version__

# The hub's name of what a model does, and a command that shows it.
_USES = {
    "chat": ("text-generation", 'qwen3 --model {name} "Why is the sky blue?"'),
    "embedding": ("feature-extraction", "qwen3 embed --model {name} texts.txt"),
    "reranker": ("text-ranking", 'qwen3 rerank --model {name} "Why is the sky blue?" texts.txt'),
}


def usage(kind: str, name: str) -> str:
    """Return a command that uses a checkpoint of a kind, called `name`."""
    return _USES[kind][1].format(name=name)


def model_card(base_model: str | None, kind: str, recipe: str, job: Job, written: Written) -> str:
    """Return the text of the card; `base_model` is the source's hub name, None for a folder.

    `kind` is what the checkpoint is for: "chat", "embedding" or "reranker".
    """
    counts = Counter(fmt for fmt in job.formats.values() if fmt)
    rows = [
        f"| {fmt.bits} | {fmt.group_size} | {fmt.mode} | {count} |"
        for fmt, count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    if rows:
        rows = ["| bits | group size | mode | modules |", "| --- | --- | --- | --- |", *rows]
    others = [
        "It loads in mlx-lm, LM Studio and other programs that read MLX checkpoints, too.",
        "",
    ]
    if kind == "reranker":  # its head may be one that they do not have
        others = []
    base = [f"base_model: {base_model}", "base_model_relation: quantized"] if base_model else []
    tuned = ""
    if written.distilled and written.distilled.kept:
        found = written.distilled
        tuned = (
            f" Scales and biases are tuned by {found.steps} steps of distillation: on text that is "
            "not learned from, the mean KL divergence from the original fell from "
            f"{found.kl_before:.5f} to {found.kl_after:.5f} nats a token."
        )
    merged = f" and the adapter {job.adapter.name}" if job.adapter else ""
    return "\n".join(
        [
            "---",
            "library_name: mlx",
            f"pipeline_tag: {_USES[kind][0]}",
            *base,
            "tags:",
            "- mlx",
            "- qwen3",
            "---",
            "",
            f"# {job.output.name}",
            "",
            f"Made from {base_model or 'a local checkpoint'}{merged} with qwen3-mlx {__version__}, "
            f"recipe `{recipe}`: {written.weights:,} weights in {written.bytes:,} bytes, "
            f"{written.bits_per_weight:.2f} bits per weight.{tuned}",
            "",
            *rows,
            "",
            "```sh",
            usage(kind, f"./{job.output.name}"),
            "```",
            "",
            *others,
        ]
    )
