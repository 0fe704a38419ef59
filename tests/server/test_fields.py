"""No field of a request is accepted and dropped, by any protocol.

Each field of each request, and of what it is made of, is changed. That must change the request
that the engine gets, or the response, or be warned of; or the field stands among those that may be
silent, in `tests.server.fields`, with the reason. A field that is new and does nothing fails here.
"""

import re
import types
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import httpx
import pytest

from qwen3_mlx import LLM
from qwen3_mlx.api.prepared_request import PreparedRequest
from qwen3_mlx.engine.request import Request, RequestResult, SampledLogprob
from qwen3_mlx.server.wire import WireModel
from tests.server.fields import REQUESTS, Case, RequestFields
from tests.server.serving import Served, serving

SAID = "<think>\nOne.\n</think>\n\nTwo."
# What differs from response to response.
VARIES = re.compile(
    r'"(id|created|created_at|timings|[a-z_]*duration)": ?("[^"]*"|\{[^}]*\}|[0-9.]+)'
)
OF_TYPES = {bool: True, int: 7, float: 0.5, str: "changed"}


class Spy:
    """An engine that makes notes of its requests, and gives the same reply to all."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._ids = llm.tokenizer.encode(SAID)
        self._encode, self._start = llm._open().window.encode, llm.submit
        self.notes: list[Any] = []

    def encode(self, prompt: Any) -> list[int]:
        """Note a prompt, which may only be counted."""
        self.notes.append(prompt)
        return self._encode(prompt)

    def start(self, task: PreparedRequest, *arguments: Any) -> Any:
        """Note what is asked for; tools are in the prompt, as far as they are anywhere."""
        names = {one.name for one in fields(task.options)} - {"tools", "progress"}
        self.notes.append({name: getattr(task.options, name) for name in names})
        return self._start(task, *arguments)

    def submit(self, request: Request) -> None:
        """Note the engine's own request, and reply."""
        names = ("ids", "sampling", "max_tokens", "top_logprobs")
        self.notes.append([getattr(request, name) for name in names])
        self._llm.call_soon(lambda: self._reply(request))

    def _reply(self, request: Request) -> None:
        for token in self._ids:
            if request.on_logprobs:
                request.on_logprobs(
                    SampledLogprob(token, -1.0, [(token, -1.0)] * request.top_logprobs)
                )
            request.sink.advance([token])
        request.on_finish(RequestResult("stop", len(self._ids)))


@pytest.fixture(scope="module")
def spied(demo: LLM) -> Iterator[tuple[httpx.Client, Spy]]:
    """A client of a server whose requests to the engine are seen."""
    with (
        pytest.MonkeyPatch.context() as patched,
        serving(demo) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        spy = Spy(demo)
        patched.setattr(demo._open().window, "encode", spy.encode)
        patched.setattr(demo, "submit", spy.start)
        patched.setattr(demo._open().engine, "submit", spy.submit)
        yield client, spy


@pytest.fixture(scope="module")
def clients(
    spied: tuple[httpx.Client, Spy], embedder: Served, reranker: Served
) -> Iterator[dict[str, tuple[httpx.Client, Spy]]]:
    """Clients by the names of their servers; only the engine of the first is seen."""
    with httpx.Client(base_url=embedder.url) as one, httpx.Client(base_url=reranker.url) as other:
        yield {"demo": spied, "embedder": (one, spied[1]), "reranker": (other, spied[1])}


def leaves(annotation: Any) -> Iterator[Any]:
    """Return the types that an annotation is made of; a `Literal` is one of them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from leaves(get_args(annotation)[0])
    elif origin in (Union, types.UnionType, list):
        for part in get_args(annotation):
            yield from leaves(part)
    else:
        yield annotation


def kinds_of(model: type[WireModel]) -> dict[str, type[WireModel]]:
    """Return the kinds of objects that a request is made of, by their names."""
    found: dict[str, type[WireModel]] = {}
    ahead: list[Any] = [model]
    while ahead:
        one = ahead.pop()
        if isinstance(one, type) and issubclass(one, WireModel) and one.__name__ not in found:
            found[one.__name__] = one
            for info in one.model_fields.values():
                ahead += leaves(info.annotation)
    return found


def has_one_value(annotation: Any) -> bool:
    """Return whether a field can have one value only, such as a type."""
    values = {value for leaf in leaves(annotation) for value in get_args(leaf) if get_origin(leaf)}
    only_words = all(get_origin(leaf) is Literal for leaf in leaves(annotation))
    return only_words and len(values) == 1


def cases_of(spec: RequestFields) -> Iterator[tuple[RequestFields, str, str, Any]]:
    """Return the fields that are to be changed: the name, as clients write it, and its type."""
    for name, kind in kinds_of(spec.model).items():
        for field, info in kind.model_fields.items():
            if not has_one_value(info.annotation):
                yield spec, f"{name}.{field}", info.alias or field, info.annotation
    for name in spec.cases:
        if name.split(".")[0] not in kinds_of(spec.model):
            yield spec, name, "", None


def other_value(annotation: Any, now: Any) -> Any:
    """Return a value of a type, other than the present one."""
    for leaf in leaves(annotation):
        if get_origin(leaf) is Literal:
            return next(value for value in get_args(leaf) if value not in (now, ""))
        if leaf in OF_TYPES:
            value = OF_TYPES[leaf]
            made = value if leaf not in (bool, int) or value != now else leaf(not now)
            return [made] if f"list[{leaf.__name__}]" in str(annotation) else made
        if get_origin(leaf) is dict:
            return {"type": "object", "properties": {"z": {"type": "string"}}}
    raise AssertionError(f"say in tests.server.fields what {annotation} may be changed to")


def bodies(spec: RequestFields, name: str, key: str, annotation: Any) -> tuple[Any, Any]:
    """Return a request without and with a change."""
    case = spec.cases.get(name, Case())
    where, beside = spec.locations.get(name.split(".")[0], ("", {}))
    before = deepcopy({**spec.base, **(beside if case.beside is None else case.beside)})
    after = deepcopy(before)
    steps = [step for step in (where if case.at is None else case.at).split(".") if step]
    if not key:  # of what is not typed
        *steps, key = steps
    place: Any = after
    for step in steps:
        place = place[int(step)] if step.isdecimal() else place[step]
    place[key] = other_value(annotation, place.get(key)) if case.value is None else case.value
    return before, after


ALL = [case for spec in REQUESTS for case in cases_of(spec)]


@pytest.mark.parametrize(
    ("spec", "name", "key", "annotation"),
    ALL,
    ids=[f"{spec.path}-{name}" for spec, name, _, _ in ALL],
)
def test_no_field_is_accepted_and_dropped(
    clients: dict[str, tuple[httpx.Client, Spy]],
    spec: RequestFields,
    name: str,
    key: str,
    annotation: Any,
) -> None:
    client, spy = clients[spec.server]
    before, after = bodies(spec, name, key, annotation)
    seen = []
    for body in (before, after):
        spy.notes = []
        response = client.post(spec.path, json=body)
        told = response.headers.get("warnings"), VARIES.sub("", response.text)
        seen.append((response.status_code, spy.notes, told))
    (first, *_), (second, *_) = seen
    case = spec.cases.get(name, Case())
    assert first == 200 and second in ((400, 404) if case.refused else (200,)), seen[1]
    if name in spec.silent:
        assert seen[0] == seen[1], f"{name} is not silent; tests.server.fields says it is"
    else:
        assert seen[0] != seen[1], f"{name}={after} does nothing, and nothing says so"


def test_what_is_silent_is_a_field() -> None:
    for spec in REQUESTS:
        known = {name for one, name, _, _ in ALL if one is spec}
        assert known >= {*spec.silent, *spec.cases}
