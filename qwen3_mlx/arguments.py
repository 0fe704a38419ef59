"""Normalises and checks arguments: numpy scalars, token ids, option names, functions as tools."""

import inspect
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with how much of the work is done, and how much there is."""


def plain(value: Any) -> Any:
    """Return a numpy scalar as a Python value, and any other value unchanged."""
    numpy = sys.modules.get("numpy")  # not imported here: that takes 0.1 s
    return value.item() if numpy and isinstance(value, numpy.generic) else value


def items(name: str, given: Iterable[T]) -> list[T]:
    """Return what a list, an array, a generator and the like have; a text is none of them.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(
            f"{name} must be a list, not {given!r:.100}; for a single one, a list of it"
        )
    return list(given)


def token_ids(ids: Iterable[Any]) -> list[int]:
    """Return the token ids of a list or a numpy array as a list of ints.

    Raises:
        TypeError: an id is not a whole number.
    """
    if isinstance(ids, bytes | str) or not isinstance(ids, Iterable):
        raise TypeError(f"token ids must be whole numbers, not {ids!r}")
    tokens = [plain(token) for token in ids]
    for token in tokens:
        if type(token) is not int:
            raise TypeError(f"token ids must be whole numbers, not {token!r}")
    return tokens


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a keyword that does not exist; the message names the closest one that does.

    Raises:
        TypeError: an unknown keyword is given.
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
        TypeError: the tool is an async function or a generator.
    """
    # A callable object is judged by its __call__, too.
    for called in (function, getattr(function, "__call__", None)):  # noqa: B004
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
