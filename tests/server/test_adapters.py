"""Adapters behind a server: a request names the model and, after a colon, an adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_mlx import load
from qwen3_mlx.server.model_source import stated_sources
from tests.adapters import all_linear, peft_tensors, write_peft
from tests.cli.harness import piped
from tests.server.harness import message_of
from tests.server.serving import Served, serving
from tests.support import write_tiny

OPTIONS: dict[str, Any] = dict.fromkeys(
    ("revision", "draft", "bits", "dtype", "dequantize", "kv_bits", "context")
)
HI = [{"role": "user", "content": "Hi"}]
NAMES = ["tiny", "tiny:one", "tiny:two"]
LIMITS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"max_tokens": 8, "temperature": 0},
    "/v1/responses": {"max_output_tokens": 16, "temperature": 0},
    "/v1/messages": {"max_tokens": 8, "temperature": 0},
    "/api/chat": {"stream": False, "options": {"num_predict": 8, "temperature": 0}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and two adapters."""
    root = tmp_path_factory.mktemp("adapters")
    write_tiny(root / "base")
    for seed, name in enumerate(("one", "two")):
        write_peft(root / name, peft_tensors(all_linear(seed=seed)))
    return root


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    adapters = {name: folder / name for name in ("one", "two")}
    with (
        load(folder / "base", adapter=adapters) as llm,
        serving(llm, model="tiny") as running,
    ):
        yield running


def answer(served: Served, path: str, model: str | None) -> tuple[str, str]:
    """Return what a reply calls its model, and the reply."""
    messages = {"input": "Hi"} if path == "/v1/responses" else {"messages": HI}
    named = {} if model is None else {"model": model}
    response = served.post(path, {**messages, **LIMITS[path], **named})
    assert response.status_code == 200, response.text
    body = response.json()
    content = body.get("choices") or body.get("output") or body.get("content") or body["message"]
    return body["model"], str(content)


@pytest.mark.parametrize("path", LIMITS)
def test_every_protocol_chooses_by_the_name(path: str, served: Served) -> None:
    found = [answer(served, path, name) for name in NAMES]
    assert [model for model, _ in found] == NAMES
    if path != "/v1/responses":  # whose items have ids
        assert len({content for _, content in found}) == 3
        assert answer(served, path, "TINY:Two:latest") == found[2]
        assert answer(served, path, None) == found[0]


def test_lists_have_them(served: Served) -> None:
    listed = [model["id"] for model in served.get("/v1/models").json()["data"]]
    assert listed == NAMES
    tags = [model["name"] for model in served.get("/api/tags").json()["models"]]
    assert tags[:3] == NAMES
    assert served.get("/v1/models/tiny:two").json()["id"] == "tiny:two"
    assert served.post("/api/show", {"model": "tiny:one"}).json()["name"] == "tiny:one"


def test_an_adapter_that_is_not_there_is_not_found(served: Served) -> None:
    response = served.post("/v1/chat/completions", {"model": "tiny:three", "messages": HI})
    assert response.status_code == 404
    assert "'tiny:three' not found; there are tiny, tiny:one, tiny:two" in message_of(response)


def test_adapters_are_those_of_the_first_model(folder: Path) -> None:
    options = {"adapter": {"one": str(folder / "one")}, **OPTIONS}
    first, second = stated_sources([str(folder / "base"), "demo"], options, "tiny")
    assert (first.names, second.names) == (["tiny", "tiny:one"], ["demo"])
    assert first.load and second.load
    with first.load(lambda *_: None) as llm, second.load(lambda *_: None) as other:
        assert (llm.adapters, other.adapters) == (("one",), ())


@pytest.mark.parametrize("stated", [["a=x", "a=y"], ["a=x", "y"], ["a b=x"], ["a="]])
def test_adapters_without_names_of_their_own_are_refused(stated: list[str]) -> None:
    done = piped(["serve", *(f"--adapter={one}" for one in stated)])
    assert done.returncode != 0
    assert "--adapter takes NAME=DIR, with another name for each" in done.stderr
