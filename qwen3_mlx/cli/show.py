"""`qwen3 show`: geometry, formats, template, licence and memory of a model, without its weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from qwen3_mlx.checkpoint.description import read_config
from qwen3_mlx.checkpoint.hub import DESCRIPTION_FILES, Source
from qwen3_mlx.checkpoint.weights import has_all_weights, with_described_head
from qwen3_mlx.cli.console import format_bytes, note, print_facts
from qwen3_mlx.cli.model_facts import ModelFacts
from qwen3_mlx.cli.models import Revision
from qwen3_mlx.cli.options import GgufFile, Json, ModelArgument, with_file
from qwen3_mlx.cli.plan_estimate import Machine
from qwen3_mlx.cli.plan_table import count
from qwen3_mlx.engine.memory import count_weights
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.config import LOGITS, SCORE, STATES
from qwen3_mlx.model.sizes import DEMO, hub_name, published_config, size_named

_CARD = "README.md"
_HEADS = {LOGITS: "", STATES: ", no head", SCORE: ", a score in place of a head"}
_CONTEXTS = (8192, 32768)  # tokens; and the window


def show(
    *,
    model: ModelArgument = None,
    revision: Revision = None,
    file: GgufFile = None,
    as_json: Json = False,
) -> None:
    """Show what a model is: geometry, formats, template, licence, memory here.

    Of a model that is not downloaded, only the files that describe it are fetched.
    """
    place = Source(hub_name(with_file(model, file) or DEMO), revision)
    try:
        folder, config = read_config(place, [*DESCRIPTION_FILES, _CARD])
    except CheckpointError:
        size = size_named(model or "")
        if size is None or place.list_files() is not None:
            raise
        note(f"{place.name} is not downloaded and the hub cannot be reached: only the published")
        note("geometry is shown, as of a 4-bit model.")
        section = {"bits": 4, "group_size": 64}
        folder, config = None, {**published_config(size), "quantization": section}
    if folder:
        config = with_described_head(config, folder)
    facts = ModelFacts.of(config, folder, Machine.here())
    about = {
        "model": place.name if model else DEMO,
        "folder": str(folder) if folder else None,
        "downloaded": bool(folder and has_all_weights(folder)),
        **_of_network(facts, config),
        **(_of_text(folder, facts.config.output) if folder else {}),
        **_of_memory(facts),
    }
    if as_json:
        print(json.dumps(about, indent=1))
    else:
        print_facts(_for_people(about, facts))


def _of_network(facts: ModelFacts, config: Mapping[str, Any]) -> dict[str, Any]:
    network, experts = facts.config, facts.config.experts
    return {
        "architecture": network.model_type,
        "parameters": count_weights(network),
        "layers": network.num_hidden_layers,
        "hidden_size": network.hidden_size,
        "heads": network.num_attention_heads,
        "kv_heads": network.num_key_value_heads,
        "head_dim": network.head_dim,
        "experts": experts and experts.num_experts,
        "experts_per_token": experts and experts.num_experts_per_tok,
        "vocabulary": network.vocab_size,
        "tied_head": network.tie_word_embeddings and network.output == LOGITS,
        "context": network.context_window,
        "yarn_factor": network.yarn and network.yarn.factor,
        "quantization": facts.method or None,
        "format": facts.format,
        "formats": facts.module_formats(),
    }


def _of_text(folder: Path, output: str) -> dict[str, Any]:
    """Return what the template, the files of its kind and the model card say."""
    detect = import_module("qwen3_mlx.text.abilities")  # Jinja, which --help does not need
    return {**asdict(detect.Abilities.of(folder, output)), "licence": _licence(folder)}


def _licence(folder: Path) -> str | None:
    """Return the licence that the model card names; None if there is no card, or no licence."""
    from huggingface_hub import metadata_load

    try:
        stated = (metadata_load(folder / _CARD) or {}).get("license")
    except Exception:  # noqa: BLE001 - no card, or one whose head is not YAML
        return None
    return str(stated) if stated else None


def _of_memory(facts: ModelFacts) -> dict[str, Any]:
    window = facts.config.context_window
    contexts = [*(context for context in _CONTEXTS if context < window), window]
    plans = {context: facts.plan(context) for context in contexts}
    return {
        "weight_bytes": facts.weights,
        "memory": {context: plan.total for context, plan in plans.items()},
        "available": facts.estimate.machine.available,
        "fits": facts.fits,
    }


def _for_people(about: Mapping[str, Any], facts: ModelFacts) -> dict[str, str]:
    """Return the facts as lines."""
    experts = f", {about['experts_per_token']} of {about['experts']} experts a token"
    heads = (
        f"{about['heads']} heads, {about['kv_heads']} for keys and values, of {about['head_dim']}"
    )
    lines = {
        "model": about["model"],
        "folder": about["folder"] or "not downloaded",
        "network": f"{about['architecture']}, {count(about['parameters'])} parameters"
        + (experts if about["experts"] else ""),
        "shape": f"{about['layers']} layers, width {about['hidden_size']:,}; {heads}",
        "vocabulary": f"{about['vocabulary']:,} tokens"
        + (", head tied to the embedding" if about["tied_head"] else _HEADS[facts.config.output]),
        "context": f"{about['context']:,} tokens"
        + (f", by YaRN x {about['yarn_factor']:g}" if about["yarn_factor"] else ""),
        "format": about["format"],
    }
    if about["folder"] and not about["downloaded"]:
        lines["folder"] += " (the weights are not downloaded)"
    for kind, formats in (about["formats"] or {}).items():
        shown = (f"{label} x {n}" if n > 1 else label for label, n in formats.items())
        lines[f"  {kind}"] = ", ".join(shown)
    if about.get("kind", "chat") != "chat":
        lines["kind"] = about["kind"]
    elif "kind" in about:
        thinking = {"hybrid": "on and off", None: "unknown, without its tokenizer"}
        lines["template"] = "chat" if about["chat"] else "none: a base model"
        if about["chat"]:
            mode = thinking.get(about["thinking"], about["thinking"])
            lines["template"] += f"; thinking {mode}; tools {'yes' if about['tools'] else 'no'}"
    if "licence" in about:
        lines["licence"] = about["licence"] or "not stated here"
    if facts.estimate is None:
        lines["memory"] = "planned after conversion: qwen3 plan"
        return lines
    lines["weights"] = format_bytes(about["weight_bytes"])
    sums = (f"{format_bytes(size)} with {n:,}" for n, size in about["memory"].items())
    lines["memory"] = f"{', '.join(sums)} tokens"
    lines["fits here"] = f"up to {about['fits']:,} tokens" if about["fits"] else "no"
    return lines
