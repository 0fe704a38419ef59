"""Configurations of MCP servers, in the notation that MCP clients share (`mcp.json`)."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StrictBool, ValidationError

from qwen3_mlx.errors import Qwen3Error

_Text = Annotated[str, Field(coerce_numbers_to_str=False, min_length=1)]
Source = str | os.PathLike[str] | Mapping[str, Any]
"""A file, or what it contains."""

_OUTER_KEYS = ("mcpServers", "servers")  # LM Studio, Cursor, Claude Desktop; VS Code
_TRANSPORTS = ("stdio", "http", "streamablehttp", "sse")
_FIRST_MILLISECONDS = 1_000  # a timeout from here on is not in seconds: 17 minutes would be long
_VARIABLE = re.compile(r"\$\{(?:env:)?([^}]*?)(?::-([^}]*))?\}")


class ServerConfig(BaseModel):
    """How to reach one server: a command to start, or a URL.

    Attributes:
        timeout: seconds that the start, and each call, may take.
    """

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True, frozen=True)

    command: _Text | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: _Text | None = None
    url: Annotated[_Text | None, Field(validation_alias=AliasChoices("url", "serverUrl"))] = None
    headers: dict[str, str] = {}
    type: Annotated[_Text | None, Field(validation_alias=AliasChoices("type", "transport"))] = None
    timeout: float = Field(60.0, gt=0)
    disabled: StrictBool = False

    @property
    def transport(self) -> str:
        """`stdio`, `http` or `sse`."""
        if self.command is not None:
            return "stdio"
        return "sse" if self.type and self.type.lower() == "sse" else "http"

    @property
    def unknown_keys(self) -> list[str]:
        """Keys that have no effect here."""
        return list(self.model_extra or ())


def read_servers(source: Source) -> dict[str, Any]:
    """Return the entries of a configuration's servers as they are written, not of disabled ones.

    Raises:
        Qwen3Error: the file cannot be read, or names no servers.
    """
    name, content = "the configuration of MCP servers", source
    if not isinstance(source, Mapping):
        name = os.fspath(source)
        try:
            content = json.loads(Path(name).expanduser().read_text("utf-8-sig"))
        except OSError as error:
            raise Qwen3Error(f"{name} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise Qwen3Error(f"{name} is not JSON: {error}") from error
    if isinstance(content, Mapping):
        for key in _OUTER_KEYS:
            if isinstance(servers := content.get(key), Mapping):
                if not all(map(str.strip, servers)):
                    raise Qwen3Error(f"{name}: an entry of {key} has an empty name: give it one")
                return {name: entry for name, entry in servers.items() if not _is_disabled(entry)}
    raise Qwen3Error(f"{name} needs an object mcpServers, with an entry for each server")


def _is_disabled(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("disabled") is True


def server_config(entry: Any) -> ServerConfig:
    """Return the configuration of a server from its entry, with variables replaced.

    Raises:
        ValueError: the entry is wrong, or names a variable that the environment lacks.
    """
    if not isinstance(entry, Mapping):
        raise ValueError("its entry must be an object")
    try:
        config = ServerConfig.model_validate(_expanded(entry))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].replace("a valid dictionary", "an object")
        raise ValueError(f"{place}: {message}") from None
    if (config.command is None) == (config.url is None):
        raise ValueError("its entry needs a command or a url, one of them")
    if config.url is not None and not config.url.startswith(("http://", "https://")):
        raise ValueError(f"url: it must begin with http:// or https://, not {config.url!r:.100}")
    if config.type and re.sub("[-_]", "", config.type.lower()) not in _TRANSPORTS:
        raise ValueError(f"its type must be stdio, http or sse, not {config.type!r}")
    if config.timeout >= _FIRST_MILLISECONDS:
        return config.model_copy(update={"timeout": config.timeout / 1_000})
    return config


def _expanded(value: Any) -> Any:
    """Replace `${NAME}`, `${NAME:-default}` and `${env:NAME}` in all text of a JSON value."""
    if isinstance(value, str):
        return _VARIABLE.sub(_variable, value)
    if isinstance(value, Mapping):
        return {key: _expanded(item) for key, item in value.items()}
    return [_expanded(item) for item in value] if isinstance(value, list) else value


def _variable(match: re.Match[str]) -> str:
    name, default = match[1], match[2]
    value = os.environ.get(name, default)
    if value is None:
        raise ValueError(f"it needs the environment variable {name}, which is not set")
    return value
