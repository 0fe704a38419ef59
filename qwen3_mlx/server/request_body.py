"""Request bodies: counted and parsed, at a bounded cost.

The order of the checks bounds the cost of a body: its size (`Guard`), a slot (`Admission`), the
number of its values, which is counted without parsing, then the fields, then the number of replies.
A large body is parsed on one of a few threads: it does not block the event loop, and few are parsed
in memory at once.
"""

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from qwen3_mlx.server.errors import ApiError, from_validation
from qwen3_mlx.server.wire import RequestModel

# Limit of the commas and brackets of a body, which show how many values it has. No prompt that fits
# the context window needs more than these for each token: a token id has one, a token of a schema
# about one, and a message has more tokens than signs.
_MIN_SIGN_LIMIT = 250_000
_SIGNS_PER_TOKEN = 1.1
_BOM = b"\xef\xbb\xbf"
_TYPES: dict[type, str] = {list: "a list", str: "a string", bool: "true or false", int: "a number"}

Body = TypeVar("Body", bound=RequestModel)


def parse_body(sent: bytes, body: type[Body], context: int) -> Body:
    """Parse a body of the bytes that were sent, whatever their Content-Type.

    Raises:
        ApiError: they are not JSON, have more values than any prompt that fits the context needs,
            or a field is wrong.
    """
    limit = max(_MIN_SIGN_LIMIT, round(_SIGNS_PER_TOKEN * context))
    signs = sum(sent.count(sign) for sign in (b",", b"[", b"{"))
    if signs > limit:
        raise ApiError(
            400,
            f"the request has {signs:,} commas and brackets, and at most {limit:,} are read; no "
            f"prompt that fits the context of {context:,} tokens needs more",
        )
    data = _json(sent)
    if not isinstance(data, dict):
        kind = _TYPES.get(type(data), "something else")
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
        reason = str(error)
    if reason.startswith("recursion limit"):
        reason = f"it is nested too deeply ({reason})"
    elif "hex escape" in reason:
        reason = f"a \\u escape is half of a character, which is not valid Unicode ({reason})"
    elif b"\0" in sent[:4]:  # as in UTF-16 and UTF-32; JSON in UTF-8 has no zero bytes
        reason = "it is not in UTF-8"
    elif reason.startswith("number out of range"):
        reason = f"a number has too many digits ({reason})"
    raise ApiError(400, f"the request cannot be read as JSON: {reason}")
