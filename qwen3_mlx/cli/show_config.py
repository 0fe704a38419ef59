"""`qwen3 config`: the user's settings, and where each of them comes from."""

import json
import os
from typing import Annotated

from qwen3_mlx.cli.console import print_facts
from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.cli.options import MODEL_VARIABLE, user_config
from qwen3_mlx.cli.user_files import config_file


def config(
    path_only: Annotated[bool, option("--path", text="Print only the path of the file.")] = False,
) -> None:
    """Show the settings: each value, and where it comes from.

    [bold]model = "fast"[/bold]   the model where --model and QWEN3_MODEL name none.
    [bold]log = false[/bold]   record no conversations.
    [bold]\\[aliases][/bold]
    [bold]fast = "4B"[/bold]   qwen3 -m fast is qwen3 -m 4B.
    [bold]\\[presets.coder][/bold]   options of qwen3 --preset coder, by their names:
    [bold]system = "Answer with code."[/bold]
    [bold]temperature = 0.3[/bold]
    [bold]thinking = true[/bold]
    [bold]tools = "tools.py"[/bold]

    The command line beats the environment, and that beats this file.
    """
    path = config_file()
    if path_only:
        print(path)
        return
    settings, stated = user_config(), "the file"
    print(f"{path}{'' if path.exists() else ' (there is none)'}\n")
    model, source = settings.model, stated
    if from_environment := os.environ.get(MODEL_VARIABLE):
        model, source = from_environment, MODEL_VARIABLE
    rows = [
        ("model", model or "demo", source if model else "default"),
        ("log", "true" if settings.log else "false", "default" if settings.log else stated),
        *((f"aliases.{name}", model, stated) for name, model in settings.aliases.items()),
        *(
            (f"presets.{name}.{key}", json.dumps(value, ensure_ascii=False), stated)
            for name, preset in settings.presets.items()
            for key, value in preset.items()
        ),
    ]
    print_facts({name: f"{value}  ({source})" for name, value, source in rows})
