"""Quantization of a checkpoint's weights, as its config.json states it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_mlx.checkpoint.formats.methods import METHODS
from qwen3_mlx.checkpoint.names import network_name
from qwen3_mlx.checkpoint.weights import INDEX, index_fault, index_names
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.quantization import AFFINE, Format, FormatOf

# --- what the files of a checkpoint hold --------------------------------------------------------

MODELOPT = "hf_quant_config.json"
MLX = "mlx"
_MLX_KEYS = {"bits", "group_size", "mode"}  # and the paths of modules
_UNNAMED = ""


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantization of a checkpoint: the method, and its section of config.json."""

    method: str
    section: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The name of the method in messages."""
        return METHODS[self.method].title if self.method in METHODS else self.method.upper()


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Return how the weights are quantized, by config.json alone; None if they are not.

    Raises:
        CheckpointError: the method is supported by neither loading nor converting; the message
            names it.
    """
    found = _stated(config)
    if found is None or found.method == MLX:
        return found
    method, section = found.method, found.section
    if method == _UNNAMED:
        raise _unreadable(f"without quant_method ({', '.join(section)})")
    if method not in METHODS:
        raise _unreadable(f"as {method!r}")
    if problem := METHODS[method].problem(section):
        raise _unreadable(f"as {METHODS[method].title}", f" {problem}")
    return found


def _stated(config: Mapping[str, Any]) -> Quantization | None:
    """Return the method and its section, supported or not.

    MLX's own formats are in `quantization`, and mlx-lm writes them to `quantization_config`, too.
    """
    own, foreign = config.get("quantization"), config.get("quantization_config")
    method: object = None
    if not foreign and (foreign := config.get("compression_config")):  # an older spelling
        method = "compressed-tensors"
    if not (section := own or foreign):
        return None
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config.json: quantization is {section!r}, not an object")
    if own and "bits" in own:
        return Quantization(MLX, section)
    if not isinstance(foreign, Mapping):
        return Quantization(MLX if _is_mlx(section) else _UNNAMED, section)
    if foreign.get("load_in_4bit") or foreign.get("load_in_8bit"):  # older files state no method
        method = "bitsandbytes"
    if method := foreign.get("quant_method") or method:
        return Quantization(str(method).lower(), foreign)
    return Quantization(MLX if _is_mlx(section) else _UNNAMED, section)


def _is_mlx(section: Mapping[str, Any]) -> bool:
    """Return whether a section without a method has only the keys of MLX's formats."""
    return all(key in _MLX_KEYS or key == "lm_head" or "." in key for key in section)


def refuse_modelopt(stated: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that only its hf_quant_config.json declares as quantized.

    `stated` are the contents of that file.

    Raises:
        CheckpointError: the file states a method.
    """
    section = stated.get("quantization")
    method = section.get("quant_algo") if isinstance(section, Mapping) else section
    if method:
        raise _unreadable(f"as modelopt's {method}", where=MODELOPT)


def _unreadable(method: str, reason: str = "", *, where: str = "config.json") -> CheckpointError:
    read = ", ".join(method.title for method in METHODS.values())
    reason = reason or f", which is not read ({read} and MLX's own formats are)"
    return CheckpointError(
        f"{where}: the weights are quantized {method}{reason}; take the original weights, or a "
        "build for MLX such as Qwen/Qwen3-8B-MLX-4bit"
    )


class StoredFormats:
    """The formats of an MLX-quantized checkpoint: one for all, and exceptions by module path."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._section = {network_name(name): own for name, own in section.items()}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "StoredFormats | None":
        """Create the formats from a config.json; None if the weights have none of MLX's formats."""
        found = quantization_of(config)
        return cls(found.section) if found and found.method == MLX else None

    def format_of(self, path: str) -> Format:
        """Return the format of the quantized module at `path`.

        Raises:
            CheckpointError: MLX has no such format.
        """
        own = self._section.get(path, True)  # mlx-lm writes true for "like all others"
        if not isinstance(own, Mapping | bool):
            raise CheckpointError(f"config.json: quantization of {path} is {own!r}, not an object")
        section = own if isinstance(own, Mapping) else self._section
        mode = section.get("mode") or AFFINE
        try:
            return Format.of(mode, section.get("bits") or None, section.get("group_size") or None)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"config.json: quantization of {path}: {error}") from error

    def leaves_out(self, path: str) -> bool:
        """Return whether config.json names the module at `path` as not quantized."""
        return self._section.get(path) is False


def formats_stored(config: Mapping[str, Any], folder: Path | None = None) -> FormatOf | None:
    """Return a function from module path to format; None if the checkpoint is not quantized.

    If `folder` has the index of the weight files, it decides which modules are quantized. Without
    an index, all are except those that config.json excludes.

    Foreign formats are `decoded.formats_held`'s.
    """
    stored = StoredFormats.of(config)
    if stored is None:
        return None
    usable = folder and (folder / INDEX).is_file() and not index_fault(folder)
    names = index_names(folder) if folder and usable else None

    def format_of(path: str) -> Format | None:
        if names is not None:
            kept = f"{path}.scales" not in names
        else:
            kept = stored.leaves_out(path)
        return None if kept else stored.format_of(path)

    return format_of
