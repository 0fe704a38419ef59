"""What a protocol declares of itself: the paths that it owns, and the form of its errors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openapi import json_content
from qwen3_mlx.server.wire import WireModel

_ERRORS = (400, 401, 403, 404, 413, 429, 503)  # that any route may answer with


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A protocol; each folder of one has it as `PROTOCOL`.

    An error on a path that begins with `paths` has this protocol's form, whether it is raised by a
    route or before one is found. The longest match counts: "" claims the paths of no other.
    """

    name: str
    paths: str
    error_model: type[WireModel]
    error_body: Callable[[ApiError], Mapping[str, Any]]
    request_id_header: str | None = None  # where its clients expect the id of a request

    def router(self, prefix: str) -> APIRouter:
        """Create a router whose routes declare the errors of this protocol."""
        errors: dict[int | str, dict[str, Any]] = {
            status: {"content": json_content(self.error_model)} for status in _ERRORS
        }
        return APIRouter(prefix=prefix, tags=[self.name], responses=errors)
