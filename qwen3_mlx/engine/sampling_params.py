"""How the next token is chosen: what callers, checkpoints and modes say of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qwen3_mlx.arguments import plain


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; None means the default of the checkpoint's mode.

    The steps are taken in this order: `logit_bias` and the penalties change the logits,
    `temperature` divides them (0 takes the likeliest token), then `top_k` keeps the k likeliest
    (0: all), `top_p` the fewest whose probabilities reach p, and `min_p` those at least p times as
    likely as the likeliest.

    `repetition_penalty` divides the logits of tokens in prompt and reply (multiplies them if
    negative); `presence_penalty` and `frequency_penalty` are subtracted from those of tokens in the
    reply, once or once an occurrence. Tokens that a form, a call or a budget of thinking forces
    count like chosen ones. `logit_bias` maps token ids to what is added to their logits.

    Raises:
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
            whole = name == "top_k"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not low <= value <= high:
                most = f"{high:,}" if whole else f"{high:g}"
                raise ValueError(f"{name} must be from {low:g} to {most}, not {value}")
        if self.top_p == 0:
            raise ValueError("top_p must be more than 0; temperature 0 takes the likeliest token")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked(self.logit_bias))

    def over(self, defaults: "SamplingParams") -> "SamplingParams":
        """Fill what is None from `defaults`."""
        missing = {
            entry.name: getattr(defaults, entry.name)
            for entry in fields(self)
            if getattr(self, entry.name) is None
        }
        return replace(self, **missing)


def _checked(logit_bias: Any) -> dict[int, float]:
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


# Of those, what the published generation_config.json files state, one of which serves two modes.
_PUBLISHED = [
    {"temperature": mode.temperature, "top_p": mode.top_p, "top_k": mode.top_k}
    for mode in (THINKING, DIRECT)
]


def stated_sampling(generation_config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the sampling that a generation_config.json states, and a sentence for each oddity.

    What cannot be used is left out; what other programs understand is taken as they do.
    """
    stated: dict[str, Any] = {}
    complaints = []
    for name in _RANGES:
        value = generation_config.get(name)
        if value is None:
            continue
        meant: Any = value
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            meant = int(value)
        if name == "top_k" and meant == -1:  # vLLM's way to write all
            meant = 0
        try:
            SamplingParams(**{name: meant})
        except (ValueError, TypeError) as error:
            complaints.append(f"{error}; the default is taken")
            continue
        if type(meant) is not type(value) or meant != value:
            complaints.append(f"{name} is {value!r}, which is taken as {meant}")
        stated[name] = meant
    if generation_config.get("do_sample") is False:
        stated["temperature"] = 0.0
    return stated, complaints


def sampling_defaults(stated: Mapping[str, Any], *, thinking: bool, hybrid: bool) -> SamplingParams:
    """Return the defaults for a reply that thinks or does not, by what a checkpoint states.

    A checkpoint that can do both is published with one generation_config.json for two modes that
    need different values, so there the mode's temperature, top_p and top_k win over the published
    ones, be they all there or some. Others are a fine-tune's own and win, as those of a checkpoint
    with one mode do.
    """
    known = {(name, stated[name]) for name in _PUBLISHED[0] if name in stated}
    if hybrid and any(known <= published.items() for published in _PUBLISHED):
        stated = {name: value for name, value in stated.items() if name not in _PUBLISHED[0]}
    mode = THINKING if thinking else DIRECT
    return SamplingParams(**stated).over(mode).over(NEUTRAL)
