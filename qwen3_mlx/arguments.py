"""Arguments as callers write them: numpy's scalars, lists of ids, options, functions as tools."""

import inspect
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any


def plain(value: Any) -> Any:
    """Return a numpy scalar as the Python value that it stands for, and all else unchanged."""
    numpy = sys.modules.get("numpy")  # importing it takes a tenth of a second
    return value.item() if numpy and isinstance(value, numpy.generic) else value


def token_ids(ids: Iterable[Any]) -> list[int]:
    """Return token ids, of a list or a numpy array, as a list of ints.

    Raises:
        TypeError: one of them is no whole number.
    """
    if isinstance(ids, bytes | str) or not isinstance(ids, Iterable):
        raise TypeError(f"token ids must be whole numbers, not {ids!r}")
    found = [plain(token) for token in ids]
    for token in found:
        if type(token) is not int:
            raise TypeError(f"token ids must be whole numbers, not {token!r}")
    return found


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first keyword that does not exist, and name the closest one that does.

    Raises:
        TypeError: there is such a keyword.
    """
    known = list(known)
    for name in given:
        if name not in known:
            closest = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {closest[0]}?" if closest else f"there are {', '.join(known)}"
            raise TypeError(f"there is no option {name!r}; {hint}")


def refuse_deferred(name: str, function: Callable[..., Any]) -> None:
    """Refuse a tool that does not return its result when it is called.

    Raises:
        TypeError: it is an async function or a generator.
    """
    for called in (function, getattr(function, "__call__", None)):  # noqa: B004 - objects, too
        kind = None
        if inspect.iscoroutinefunction(called):
            kind = "an async function"
        elif inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
            kind = "a generator"
        if kind:
            raise TypeError(
                f"the tool {name} is {kind}, which does not return its result when it is called: "
                f"give a plain function that does, or call the tools of `chat` yourself"
            )
