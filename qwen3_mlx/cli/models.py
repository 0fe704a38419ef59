"""`qwen3 list`, `pull` and `rm`: the models on this machine, and those that the hub has."""

import json
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_mlx.checkpoint.description import MODEL_CARD, fetch_weights, read_config
from qwen3_mlx.checkpoint.download import damaged_files
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.local import HUB, LM_STUDIO, LocalModel, Removal, local_models
from qwen3_mlx.cli.console import Bar, confirm, format_bytes, note, print_table
from qwen3_mlx.cli.model_facts import ModelFacts
from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.cli.options import Json, Quiet, alias_meant, complete_model, without_alias
from qwen3_mlx.cli.plan_estimate import Machine
from qwen3_mlx.engine.memory import in_gb
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.interrupt import interruptible
from qwen3_mlx.model.sizes import hub_name, is_demo

_USEFUL_CONTEXT = 2048  # tokens; a model that has room for less is said not to fit
_HEADER = ("model", "size", "format", "context", "fits here", "last used", "where")
Revision = Annotated[str | None, option(text="Branch, tag or commit on the hub.")]


def list_models(*, as_json: Json = False) -> None:
    """List the Qwen3 models on this machine: size, format, what fits, last use.

    They are in the hub's cache, in LM Studio's folder, and in the folders of
    QWEN3_MODELS (separated by colons). "fits here" is the longest context, prompt
    and reply together, that there is memory for.
    """
    models, complaints = local_models()
    machine = Machine.here()
    rows = [_facts(model, machine) for model in models]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print_table(_HEADER, map(_cells, rows))
    else:
        note("No model is here yet: qwen3 plan recommends one, qwen3 pull 8B downloads it.")
    for complaint in complaints:
        note(complaint)


def _facts(model: LocalModel, machine: Machine) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": model.name,
        "where": model.place,
        "folder": str(model.folder),
        "bytes": model.nbytes,
        "complete": model.complete,
        "last_used": model.used and datetime.fromtimestamp(model.used, UTC).isoformat(),
        "format": None,
        "context": None,
        "fits": None,
    }
    try:
        found = ModelFacts.of(model.config, model.folder, machine)
    except CheckpointError as error:
        return {**facts, "error": str(error)}
    context = found.config.context_window
    return {**facts, "format": found.format, "context": context, "fits": found.fits}


def _cells(facts: dict[str, Any]) -> list[str]:
    fits, context = facts["fits"], facts["context"]
    if fits is None:
        room = "-"
    elif fits < min(_USEFUL_CONTEXT, context):
        room = "no"
    else:
        room = "whole" if fits == context else f"{fits:,}"
    used = facts["last_used"] and datetime.fromisoformat(facts["last_used"]).astimezone()
    return [
        _with_tilde(facts["model"]),
        format_bytes(facts["bytes"]) + ("" if facts["complete"] else ", incomplete"),
        facts["format"] or "cannot be read",
        f"{context:,}" if context else "-",
        room,
        f"{used:%Y-%m-%d %H:%M}" if used else "-",
        facts["where"],
    ]


def _with_tilde(name: str) -> str:
    home = os.path.expanduser("~/")
    return f"~/{name.removeprefix(home)}" if name.startswith(home) else name


def pull(
    *,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Size or hub name to download.",
            callback=alias_meant,
            autocompletion=complete_model,
        ),
    ],
    revision: Revision = None,
    verify: Annotated[
        bool, option(text="Also check the checksums of files that are here already.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Download a model into the hub's cache; print its folder.

    An interrupted download goes on where it stopped when the command is run
    again. The disk is checked before, the checksums after it.
    """
    with Bar("downloading", in_bytes=True) as bar:
        arrived = 0

        def follow(done: int, total: int) -> None:
            nonlocal arrived
            arrived = total
            if not quiet:
                bar(done, total)

        place = Source.to_download(model, revision, follow)
        folder, config = read_config(place)
        facts = ModelFacts.of(config, folder, Machine.here())
        if not quiet:
            _warn(facts)
        folder = fetch_weights(place, folder, also=MODEL_CARD)
    if verify and (damaged := damaged_files(folder)):
        raise CheckpointError(
            f"{place.name}: {', '.join(damaged)} does not match its checksum; remove the model "
            f"(qwen3 rm {model}) and pull it again"
        )
    if not quiet:
        _report(place, arrived, verified=verify)
    print(folder)


def _warn(facts: ModelFacts) -> None:
    """Write what keeps a model from being used here, before it is downloaded."""
    plan = facts.plan(_USEFUL_CONTEXT)
    if not facts.estimate.fits(plan):
        note(
            f"It needs {in_gb(plan.total)} with {_USEFUL_CONTEXT:,} tokens, and "
            f"{facts.estimate.machine.description}; qwen3 plan shows what fits."
        )


def _report(place: Source, arrived: int, *, verified: bool) -> None:
    if verified:
        note("All checksums are right.")
    if place.list_files() is None:
        note(f"{place.name} is here; the hub cannot be reached, so it may have a newer one.")
    elif arrived:
        note(f"{place.name} is here: {format_bytes(arrived)} downloaded and verified.")
    else:
        note(f"{place.name} is here already, and nothing is newer.")


def rm(
    *,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Sizes or hub names to remove.", autocompletion=complete_model
        ),
    ],
    revision: Annotated[
        str | None, option(text="Remove only this branch, tag or commit of the model.")
    ] = None,
    yes: Annotated[bool, option("--yes", "-y", text="Do not ask.")] = False,
) -> None:
    """Remove downloaded models from the hub's cache, after a question; show what is freed.

    Folders elsewhere, those of LM Studio among them, are never touched.
    """
    names = dict.fromkeys(map(without_alias, models))
    removals = [_removal(name, revision) for name in names]
    for removal in removals:
        what = "all of it" if removal.whole else f"revision {removal.revisions[0][:12]}"
        note(f"{removal.name}: {what}, {format_bytes(removal.nbytes)}")
    freed = format_bytes(sum(removal.nbytes for removal in removals))
    if not yes:
        confirm(f"Remove and free {freed}?")
    # The library warns that an interrupted removal may leave a damaged cache: Ctrl-C waits.
    with interruptible(lambda: None, patient=True):
        for removal in removals:
            removal.execute()
    note(f"Freed {freed}.")


def _removal(model: str, revision: str | None) -> Removal:
    if is_demo(model):
        raise Qwen3Error(f"{model} is part of this package and cannot be removed")
    name = hub_name(model)
    folder = Path(os.path.expanduser(name))
    if name and (folder.exists() or name[0] in "./~"):
        known = {found.folder.resolve(): found for found in local_models()[0]}
        found = known.get(folder.resolve())
        if found and found.place == HUB:
            raise Qwen3Error(f"{model} is in the hub's cache; give its name, {found.name}")
        how = f"; to delete it: rm -r {shlex.quote(str(folder))}" if folder.exists() else ""
        if found and found.place == LM_STUDIO:
            how = "; LM Studio removes it"
        raise Qwen3Error(f"{model} is a folder outside of the hub's cache{how}")
    return Removal.of(name, revision)
