"""Tools that are called elsewhere and bring a JSON schema of their own: those of servers."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

_MAX_NAME = 64  # characters, as in OpenAI's API
_ROOM_FOR_NUMBER = 5


@dataclass(frozen=True, slots=True)
class DescribedTool:
    """A tool whose arguments are described by a JSON schema in place of type hints.

    Attributes:
        name: as the model calls it; see `allowed_name`.
        server: where it is called; `server__name` is its name where two tools are called alike.
        description: what it does, for the model.
        parameters: the JSON schema of its arguments.
        function: called with all arguments, a dict; returns the result.
        start: starts a call without asking for approval; cancelling the result cancels the call.
    """

    name: str
    server: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[[dict[str, Any]], Any]
    start: Callable[[dict[str, Any]], Future[str]]

    def __call__(self, /, **arguments: Any) -> Any:
        """Call the tool and return its result."""
        return self.function(arguments)


def allowed_name(name: str) -> str:
    """Return a name with `_` for each character that tools of OpenAI's API may not have, cut."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:_MAX_NAME]


def with_unique_names(
    tools: Sequence[DescribedTool], taken: Sequence[str]
) -> Iterator[DescribedTool]:
    """Yield the tools, renamed where they are called alike or like one of the names `taken`."""
    used, counts = set(taken), Counter([*taken, *(tool.name for tool in tools)])
    for tool in tools:
        short = [tool.name] if counts[tool.name] == 1 else []
        longer = allowed_name(f"{tool.server}__{tool.name}")
        numbered = (f"{longer[: _MAX_NAME - _ROOM_FOR_NUMBER]}_{number}" for number in count(2))
        name = next(name for name in chain(short, [longer], numbered) if name not in used)
        used.add(name)
        yield replace(tool, name=name)
