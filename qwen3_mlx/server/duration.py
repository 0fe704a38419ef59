"""Durations as Ollama's clients and the command line write them."""

import math
import re

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_PART = r"(\d+\.?\d*)(h|ms|m|s|us|µs|ns)"
_FOREVER = 1e9
_DURATION = re.compile(rf"([-+]?)((?:{_PART})+)")


def read_duration(stated: float | str, name: str = "keep_alive") -> float:
    """Return seconds from a number, or a text such as "5m", "1h30m" or "-1".

    It is inf if that is negative, or some decades.

    Raises:
        ValueError: it is not a duration; `name` is that of the field.
    """
    try:
        seconds = float(stated)
    except ValueError:
        match = _DURATION.fullmatch(str(stated))
        if not match:
            raise ValueError(
                f"{name} must be seconds, or a duration such as 5m, not {stated!r}"
            ) from None
        parts = re.findall(_PART, match[2])
        seconds = sum(float(count) * _UNITS[unit] for count, unit in parts)
        seconds = -seconds if match[1] == "-" else seconds
    if math.isnan(seconds):
        raise ValueError(f"{name} must be seconds, or a duration such as 5m, not {stated!r}")
    return math.inf if seconds < 0 or seconds > _FOREVER else seconds
