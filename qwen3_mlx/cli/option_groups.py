"""How options are declared: with a help text and a panel, and in groups that commands share.

A command takes a group of options as one parameter, a dataclass; `with_options` shows typer the
fields of that class in its place.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar

import typer

T = TypeVar("T")


def option(*names: str, text: str, panel: str | None = None, **more: Any) -> Any:
    """Create an option, shown in `panel`; without `names`, it is called like its parameter."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **{"show_default": False, **more})


def with_options(command: Callable[..., T]) -> Callable[..., T]:
    """Replace each parameter of a command that is a dataclass by the fields of that class.

    A field without a default is a required option.
    """
    groups: dict[str, Any] = {}
    parameters = []
    for parameter in signature(command).parameters.values():
        group = parameter.annotation
        if is_dataclass(group):
            groups[parameter.name] = group
            options = [
                (entry.name, ... if entry.default is MISSING else entry.default, entry.type)
                for entry in fields(group)
            ]
        else:
            options = [(parameter.name, parameter.default, group)]
        parameters += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, default, kind in options
        ]

    @wraps(command)
    def run(**values: Any) -> T:
        for name, group in groups.items():
            values[name] = group(**{entry.name: values.pop(entry.name) for entry in fields(group)})
        return command(**values)

    # Typer reads both.
    vars(run)["__signature__"] = Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
