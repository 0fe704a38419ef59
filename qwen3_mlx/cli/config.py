"""The user's settings: a TOML file with the default model, aliases and presets."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_mlx.cli.error_wording import hint
from qwen3_mlx.cli.user_files import config_file
from qwen3_mlx.errors import Qwen3Error

_KEYS: dict[str, Any] = {"model": str, "log": bool, "aliases": dict, "presets": dict}
_EXPECTED = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a table",
    list[str]: "a list of texts",
    Path: "the path of a file",
    list[Path]: "a list of paths of files",
}


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of the file; a key that it lacks has its default."""

    model: str | None = None
    log: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def preset(self, name: str) -> Mapping[str, Any]:
        """Return the options of a preset; paths in it start at the settings' folder.

        Raises:
            Qwen3Error: there is none of that name.
        """
        if name not in self.presets:
            known = f"known: {', '.join(self.presets)}"
            others = known if self.presets else f"{config_file()} defines none"
            raise Qwen3Error(f"there is no preset {name!r}; {others}")
        preset = dict(self.presets[name])
        if "tools" in preset:
            preset["tools"] = _beside_settings(preset["tools"])
        if "mcp" in preset:
            preset["mcp"] = [_beside_settings(file) for file in preset["mcp"]]
        return preset


def _beside_settings(file: str) -> str:
    return str(config_file().parent / Path(file).expanduser())


def read_config(preset_options: Mapping[str, Any]) -> Config:
    """Read the user's settings; `preset_options` are the options of presets and their types.

    Raises:
        Qwen3Error: the file cannot be read, or has an unknown key or a value of the wrong type.
    """
    path = config_file()
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return Config()
    except (OSError, ValueError) as error:
        raise Qwen3Error(f"{path} cannot be read: {error}") from error
    _check(path, "", content, _KEYS)
    aliases, presets = content.get("aliases", {}), content.get("presets", {})
    _check(path, "aliases.", aliases, dict.fromkeys(aliases, str))
    _check(path, "presets.", presets, dict.fromkeys(presets, dict))
    for name, preset in presets.items():
        _check(path, f"presets.{name}.", preset, preset_options)
    return Config(**content)


def _check(path: Path, place: str, table: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if key not in kinds:
            raise Qwen3Error(f"{path}: there is no key {place}{key}; {hint(key, kinds)}")
        if not _fits(value, kinds[key]):
            expected = _EXPECTED[kinds[key]]
            raise Qwen3Error(f"{path}: {place}{key} must be {expected}, not {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    if kind in (list[str], list[Path]):
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if isinstance(value, bool):  # which is an int in Python
        return kind is bool
    types: Any = {float: (int, float), Path: str}
    return isinstance(value, types.get(kind, kind))
