"""Sampling parameters, and their defaults by checkpoint and mode."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qwen3_mlx.arguments import plain


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters; None means the checkpoint's default for the mode (thinking or not).

    They apply in this order: `logit_bias` and the penalties change the logits, `temperature`
    divides them (0 takes the likeliest token), then `top_k` keeps the k likeliest (0: all), `top_p`
    the fewest whose probabilities reach p, and `min_p` those at least p times as likely as the
    likeliest.

    `repetition_penalty` divides the logits of tokens in prompt and reply (multiplies them if
    negative); `presence_penalty` and `frequency_penalty` are subtracted from those of tokens in the
    reply, once or once an occurrence. Tokens that a grammar, a tool call or a thinking budget
    forces count like sampled ones. `logit_bias` maps token ids to what is added to their logits.

    Raises:
        TypeError: a value is not a number.
        ValueError: a value is out of its range.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is None:
                continue
            is_int = name == "top_k"
            if isinstance(value, bool) or not isinstance(value, int if is_int else int | float):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not low <= value <= high:
                most = f"{high:,}" if is_int else f"{high:g}"
                raise ValueError(f"{name} must be from {low:g} to {most}, not {value}")
        if self.top_p == 0:
            raise ValueError("top_p must be more than 0; temperature 0 takes the likeliest token")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _check_logit_bias(self.logit_bias))

    def over(self, defaults: "SamplingParams") -> "SamplingParams":
        """Return a copy whose None values are filled from `defaults`."""
        missing = {
            entry.name: getattr(defaults, entry.name)
            for entry in fields(self)
            if getattr(self, entry.name) is None
        }
        return replace(self, **missing)


def _check_logit_bias(logit_bias: Any) -> dict[int, float]:
    if not isinstance(logit_bias, Mapping):
        raise TypeError(f"logit_bias maps token ids to numbers; {logit_bias!r} does not")
    biases = {plain(token): plain(bias) for token, bias in logit_bias.items()}
    for token, bias in biases.items():
        if type(token) is not int or not isinstance(bias, int | float):
            raise TypeError(f"logit_bias maps token ids to numbers, not {token!r} to {bias!r}")
        if not math.isfinite(bias):
            raise ValueError(f"logit_bias of {token} must be finite, not {bias}")
    return biases


_RANGES = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 1 << 31),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
}
NEUTRAL = SamplingParams(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    logit_bias={},
)
# The values of Qwen's model cards for each mode.
THINKING = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, min_p=0.0)
DIRECT = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, min_p=0.0)


# The part of these that published generation_config.json files state; one file serves both modes.
_PUBLISHED = [
    {"temperature": mode.temperature, "top_p": mode.top_p, "top_k": mode.top_k}
    for mode in (THINKING, DIRECT)
]


def stated_sampling(generation_config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the sampling parameters of a generation_config.json, and a warning for each oddity.

    Values that cannot be used are left out; values of other programs' conventions are converted.
    """
    stated: dict[str, Any] = {}
    warnings = []
    for name in _RANGES:
        value = generation_config.get(name)
        if value is None:
            continue
        converted: Any = value
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            converted = int(value)
        if name == "top_k" and converted == -1:  # vLLM's spelling of all
            converted = 0
        try:
            SamplingParams(**{name: converted})
        except (ValueError, TypeError) as error:
            warnings.append(f"{error}; the default is taken")
            continue
        if type(converted) is not type(value) or converted != value:
            warnings.append(f"{name} is {value!r}, which is taken as {converted}")
        stated[name] = converted
    if generation_config.get("do_sample") is False:
        stated["temperature"] = 0.0
    return stated, warnings


def sampling_defaults(stated: Mapping[str, Any], *, thinking: bool, hybrid: bool) -> SamplingParams:
    """Return the defaults for a reply with or without thinking, from what a checkpoint states.

    A hybrid checkpoint is published with one generation_config.json for two modes that need
    different values, so the mode's temperature, top_p and top_k override the published ones, even
    where the file has only some of them. Other values are a fine-tune's own and stay, as those of a
    checkpoint with one mode do.
    """
    published_part = {(name, stated[name]) for name in _PUBLISHED[0] if name in stated}
    if hybrid and any(
        published_part <= published_model_config.items() for published_model_config in _PUBLISHED
    ):
        stated = {name: value for name, value in stated.items() if name not in _PUBLISHED[0]}
    mode = THINKING if thinking else DIRECT
    return SamplingParams(**stated).over(mode).over(NEUTRAL)
