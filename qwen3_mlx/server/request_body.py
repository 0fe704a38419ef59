"""How a request comes in: its body is read, counted, and made an object, at nobody's cost.

The order bounds what a body can cost: its size (`Guard`), a place among the requests, the number of
values in it, which is seen without reading them, then the fields, then the replies asked for. A
large body is read on one of a few threads, so that neither the event loop nor memory suffers.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError
from pydantic_core import from_json

from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.errors import ApiError, from_validation
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.wire import RequestModel

# No prompt that fits the context has more of the signs of values than this: each token id has one,
# and so, about, has each token of a schema; a message has more tokens than signs.
_VALUES = 250_000
_VALUES_A_TOKEN = 1.1
_BOM = b"\xef\xbb\xbf"
_KINDS: dict[type, str] = {list: "a list", str: "a string", bool: "true or false", int: "a number"}

Body = TypeVar("Body", bound=RequestModel)


class Reply(Protocol):
    """What a request is answered with."""

    async def respond(self, request: Request, place: Slot) -> Response:
        """Answer; whatever is returned or raised, the place is given back in the end."""
        ...


def takes(body: type[RequestModel]) -> dict[str, Any]:
    """Return the keywords by which a route is described as one that takes such a body."""
    schema = {"$ref": reference(body)}
    content = {"application/json": {"schema": schema}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def reference(body: type[RequestModel]) -> str:
    """Return where the description of the API has the schema of a body."""
    return f"#/components/schemas/{body.__name__}"


async def answered(
    service: Service,
    request: Request,
    body: type[Body],
    make: Callable[[Service, Body], Reply],
) -> Response:
    """Answer a request: `make` has what was asked, and must not need the event loop.

    Raises:
        ApiError: the body cannot be read, or there are too many requests.
    """
    coding = request.headers.get("content-encoding", "")
    if coding.strip().lower() not in ("", "identity"):
        raise ApiError(415, f"a body in {coding!r:.100} is not unpacked here; send it as it is")
    sent = await request.body()
    record = request.scope.setdefault("record", {})
    record["model"] = service.settings.model
    with service.places.one(record, request.scope.get("caller", "")) as place:
        asked = await service.aside(len(sent), lambda: parsed(sent, body, service.context))
        place.widen(asked.replies)
        reply = await service.aside(len(sent), lambda: make(service, asked))
        return await reply.respond(request, place)


def parsed(sent: bytes, body: type[Body], context: int) -> Body:
    """Make a body of the bytes that were sent, whatever type they were said to have.

    Raises:
        ApiError: they are no JSON, have more values than any prompt of the context's tokens needs,
            or a field is wrong.
    """
    most = max(_VALUES, round(_VALUES_A_TOKEN * context))
    values = sum(sent.count(sign) for sign in (b",", b"[", b"{"))
    if values > most:
        raise ApiError(
            400,
            f"the request has {values:,} commas and brackets, and at most {most:,} are read; no "
            f"prompt that fits the context of {context:,} tokens needs more",
        )
    data = _json(sent)
    if not isinstance(data, dict):
        kind = _KINDS.get(type(data), "something else")
        raise ApiError(400, f"send the request as a JSON object, {{...}}; this is {kind}")
    try:
        return body.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from error


def _json(sent: bytes) -> Any:
    if not sent.strip():
        raise ApiError(400, "send the request as a JSON object, {...}; this one is empty")
    try:
        return from_json(sent.removeprefix(_BOM), allow_inf_nan=False)
    except ValueError as error:
        why = str(error)
    if why.startswith("recursion limit"):
        why = f"it is nested too deeply ({why})"
    elif b"\0" in sent[:4]:  # where JSON in UTF-8 has none
        why = "it is not in UTF-8"
    elif why.startswith("number out of range"):
        why = f"a number has too many digits ({why})"
    raise ApiError(400, f"the request cannot be read as JSON: {why}")
