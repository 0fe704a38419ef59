"""Several models behind one server: which one answers, when they are loaded and closed."""

import gc
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import ollama
import pytest

from qwen3_mlx import CheckpointError, backend, load
from qwen3_mlx.api.capacity import plan_load
from qwen3_mlx.arguments import Progress
from qwen3_mlx.checkpoint.load import LoadOptions
from qwen3_mlx.checkpoint.local import local_models
from qwen3_mlx.engine.memory import MIN_CHUNK, Workload, activation_bytes
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.server import models
from qwen3_mlx.server.model_source import ModelSource, local_sources, room_for, stated_sources
from tests.embedding_twins import golden, write_twin
from tests.server.harness import endless, message_of, samples, until, until_idle
from tests.server.serving import Served, serving
from tests.support import write_tiny

NAMES = ["a", "b", "c"]
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("revision", "draft", "bits", "dtype", "dequantize", "kv_bits", "context")),
    "adapter": None,
}
SHORT = {**OPTIONS, "context": 256}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random checkpoints."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        write_tiny(root / name, seed=seed)
    return root


@pytest.fixture(scope="module")
def sources(folder: Path) -> list[ModelSource]:
    """The sources of these checkpoints."""
    return stated_sources([str(folder / name) for name in NAMES], OPTIONS, "a")


@contextmanager
def serving_all(sources: Sequence[ModelSource], **settings: Any) -> Iterator[Served]:
    """Serve models, the first of which is loaded."""
    assert sources[0].load
    with room_for(sources[1:], beside=sources[0]):
        llm = sources[0].load(lambda *_: None)
    with serving(llm, sources=sources, model=sources[0].name, **settings) as served:
        yield served


@pytest.fixture(scope="module")
def served(sources: list[ModelSource]) -> Iterator[Served]:
    """A server with the three models."""
    with serving_all(sources) as running:
        yield running


def states(served: Served) -> dict[str, str]:
    """Return the state of each model."""
    return {model["id"]: model["state"] for model in served.get("/v1/models").json()["data"]}


def wait_for(served: Served, **expected: str) -> None:
    """Wait until models have these states."""
    until(lambda: expected.items() <= states(served).items())


class Gate:
    """Makes the loading of a source wait."""

    def __init__(self, source: ModelSource) -> None:
        self.begun, self.opened, self.count = threading.Event(), threading.Event(), 0
        self._load = source.load
        self.source = replace(source, load=self._wait)

    def _wait(self, progress: Progress) -> Any:
        self.count += 1
        self.begun.set()
        while not self.opened.wait(0.01):
            progress(1, 4)  # as the real one, it may be ended here
        assert self._load
        return self._load(progress)


@pytest.fixture
def gate(sources: list[ModelSource]) -> Iterator[tuple[Gate, Served]]:
    """A server whose model b loads once the gate is opened."""
    gate = Gate(sources[1])
    with serving_all([sources[0], gate.source], keep_alive=0.05) as served:
        yield gate, served


# --- names --------------------------------------------------------------------------------------


def test_the_model_that_a_request_names_answers(served: Served, folder: Path) -> None:
    for name, expected in (
        *((name, name) for name in NAMES),
        ("B:latest", "b"),
        (str(folder / "c"), "c"),
        ("default", "a"),
        ("", "a"),
        (None, "a"),
    ):
        response = served.post("/v1/chat/completions", body_of("/v1/chat/completions", name))
        assert response.json()["model"] == expected and "warnings" not in response.headers
    texts = set[str]()
    for name in NAMES:
        with load(folder / name) as llm:
            text = llm.chat("Hi", max_tokens=4, temperature=0, thinking=False).text
        body = body_of("/api/chat", name) | {"think": False, "options": {"temperature": 0}}
        body["options"]["num_predict"] = 4
        assert served.post("/api/chat", body).json()["message"]["content"] == text
        texts.add(text)
    assert len(texts) > 1


def body_of(path: str, name: str | None, **more: Any) -> dict[str, Any]:
    """Return the body of a request for a few tokens."""
    limit = {"options": {"num_predict": 2}} if path == "/api/chat" else {"max_tokens": 2}
    if path == "/v1/responses":
        return {"model": name, "input": "Hi", "max_output_tokens": 2, "stream": False, **more}
    return {"model": name, "messages": HI, "stream": False, **limit, **more}


def test_an_unknown_name_is_an_error_in_the_form_of_each_protocol(served: Served) -> None:
    words = "model 'x' not found; there are a, b, c"
    for path, expected in (
        ("/v1/chat/completions", openai_error(words)),
        ("/v1/responses", openai_error(words)),
        (
            "/v1/messages",
            {"type": "error", "error": {"type": "not_found_error", "message": words}},
        ),
        ("/api/chat", {"error": words}),
        ("/api/show", {"error": words}),
    ):
        response = served.post(path, body_of(path, "x"))
        assert (response.status_code, response.json()) == (404, expected)
    response = served.get("/v1/models/x")
    assert response.status_code == 404 and message_of(response) == words


def openai_error(message: str) -> dict[str, Any]:
    """Return an error of OpenAI's API for an unknown model."""
    kind = {"type": "invalid_request_error", "param": None, "code": "model_not_found"}
    return {"error": {"message": message, **kind}}


def test_lists_have_all_models(served: Served) -> None:
    tags = served.get("/api/tags").json()["models"]
    assert [entry["name"] for entry in tags] == [*NAMES, "default"]
    assert all(entry["size"] > 100_000 for entry in tags)
    found = served.get("/v1/models").json()["data"]
    assert [(model["id"], model["kind"]) for model in found] == [(name, "chat") for name in NAMES]
    assert served.get("/v1/models/B").json()["id"] == "b"
    assert served.post("/api/show", {"model": "c"}).json()["capabilities"][0] == "completion"


def test_the_models_of_this_machine_are_served(
    folder: Path, sources: list[ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_MODELS", str(folder))
    found = local_sources(local_models()[0], OPTIONS, sources[:1])
    assert [source.name for source in found if folder.name in str(source.aliases)] == ["b", "c"]


def test_models_of_one_name_keep_apart(folder: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "a", seed=5)
    found = stated_sources([str(folder / "a"), str(other), str(folder / "a")], OPTIONS, "a")
    assert [source.name for source in found] == ["a", str(other)]


# --- kinds --------------------------------------------------------------------------------------


@pytest.fixture
def kinds(sources: list[ModelSource], tmp_path: Path) -> Iterator[Served]:
    """A server of a chat model, with an embedding model and a reranker beside it."""
    twins = [str(write_twin(name, tmp_path / name)) for name in ("embedding", "reranker")]
    beside = stated_sources(twins, SHORT, "embedding")
    with serving_all([sources[0], *beside]) as served:
        yield served


def test_a_chat_model_and_models_of_vectors_and_scores_answer_beside_each_other(
    kinds: Served,
) -> None:
    found = kinds.get("/v1/models").json()["data"]
    known = [(model["kind"], model["state"], model["thinking"]) for model in found]
    idle = "not-loaded"
    assert known[1:] == [("embedding", idle, "never"), ("reranker", idle, "never")]
    for name, capability in (("embedding", "embedding"), ("reranker", "reranking")):
        described = kinds.post("/api/show", {"model": name}).json()
        assert described["capabilities"] == [capability]
    case = next(iter(golden("embeddings")["embedding"]["cases"]))
    embeds = {"input": case["texts"][:2], "model": "embedding"}
    with ThreadPoolExecutor(2) as pool:
        reply = pool.submit(kinds.chat, model="a", max_tokens=4)
        made = kinds.post("/v1/embeddings", embeds).json()
        assert reply.result().json()["model"] == "a"
    assert made["model"] == "embedding"
    vectors = np.array([one["embedding"] for one in made["data"]])
    assert np.abs(vectors - np.array(case["vectors"][:2])).max() < 1e-5
    assert kinds.post("/api/embed", {**embeds, "model": "embedding:latest"}).is_success
    ranks = {"query": "a", "documents": ["b"], "model": "reranker"}
    assert kinds.post("/v1/rerank", ranks).json()["model"] == "reranker"
    counts = samples(kinds)
    assert all(counts["qwen3_prompt_tokens_total", one["id"]] > 0 for one in found)
    says = {"messages": HI, "max_tokens": 1}
    for path, body, model, kind, right in (
        ("/v1/chat/completions", says, "embedding", "an embedding model", "chat models here: a"),
        ("/v1/embeddings", embeds, "reranker", "a reranker", "embedding models here: embedding"),
        ("/v1/rerank", ranks, "a", "a chat model", "reranker models here: reranker"),
    ):
        response = kinds.post(path, {**body, "model": model})
        assert response.status_code == 400, response.text
        assert message_of(response).startswith(f"this checkpoint is {kind}")
        assert message_of(response).endswith(f"; {right}")
    for path, body in (("/v1/embeddings", embeds), ("/api/embed", embeds), ("/rerank", ranks)):
        response = kinds.post(path, {**body, "model": "x"})
        assert response.status_code == 404 and "there are a, embedding, rer" in response.text


def test_the_default_may_be_an_embedding_model(sources: list[ModelSource], tmp_path: Path) -> None:
    twin = write_twin("embedding", tmp_path / "twin")
    first = stated_sources([str(twin)], SHORT, "vectors")
    bias = SamplingParams(logit_bias={1023: 1.0})  # a token that only the chat model has
    with serving_all([*first, sources[0]], thinking_budget=64, sampling=bias) as served:
        assert served.post("/v1/embeddings", {"input": "a"}).json()["model"] == "vectors"
        assert message_of(served.chat()).startswith("this checkpoint is an embedding model")
        assert served.chat(model="a", max_tokens=1).json()["model"] == "a"
        vectors, chats = served.get("/v1/models").json()["data"]
        assert (vectors["kind"], chats["kind"]) == ("embedding", "chat")
        assert chats["thinking"] == "hybrid"


def test_without_a_text_an_embedding_model_is_loaded_and_unloaded(kinds: Served) -> None:
    for path, nothing in (("/api/embed", "embeddings"), ("/api/embeddings", "embedding")):
        for keep, state in ((None, "loaded"), (0, "not-loaded")):
            response = kinds.post(path, {"model": "embedding", "keep_alive": keep})
            assert response.is_success and response.json()[nothing] == []
            wait_for(kinds, embedding=state, reranker="not-loaded")
    body = {"model": "embedding", "input": "a", "keep_alive": 0}
    assert len(kinds.post("/api/embed", body).json()["embeddings"]) == 1
    wait_for(kinds, embedding="not-loaded")
    assert kinds.post("/api/embed", {**body, "keep_alive": "soon"}).status_code == 400


# --- loaded and closed --------------------------------------------------------------------------


def test_a_model_stays_as_long_as_is_asked(
    sources: list[ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = 0.0
    monkeypatch.setattr(models, "time", Clock(lambda: passed))
    with serving_all(sources[:2], model_keep_alive=100) as served:
        for keep, reason in ((None, "load"), (0, "unload")):
            body: dict[str, Any] = {"model": "b", "messages": [], "keep_alive": keep}
            assert served.post("/api/chat", body).json()["done_reason"] == reason
            wait_for(served, b="loaded" if keep is None else "not-loaded")
        assert served.post("/api/chat", body_of("/api/chat", "b", keep_alive=0)).is_success
        wait_for(served, a="loaded", b="not-loaded")
        assert served.post("/api/chat", body_of("/api/chat", "b", keep_alive="1m")).is_success
        with_ttl: dict[str, Any] = {"model": "b", "ttl": 0}  # LM Studio's field
        assert served.chat(max_tokens=1, **with_ttl).is_success
        wait_for(served, a="loaded", b="not-loaded")
        assert served.chat(max_tokens=1, **{**with_ttl, "ttl": 60}).is_success
        b, a = served.get("/api/ps").json()["models"][::-1]
        assert (a["name"], b["name"]) == ("a", "b") and a["expires_at"] > b["expires_at"]
        passed = 61
        wait_for(served, a="loaded", b="not-loaded")
        assert served.chat(model="a", max_tokens=1).is_success  # sets the clock anew
        passed = 150
        assert served.post("/api/chat", body_of("/api/chat", "b", keep_alive=-1)).is_success
        assert states(served) == {"a": "loaded", "b": "loaded"}
        passed = 1e6
        wait_for(served, a="not-loaded", b="loaded")
        assert [model["name"] for model in served.get("/api/ps").json()["models"]] == ["b"]
        assert served.get("/api/ps").json()["models"][0]["expires_at"].startswith("9999")
        state = served.get("/health").json()
        assert state["model"] == "a" and [model["bytes"] > 0 for model in state["models"]] == [
            False,
            True,
        ]
        assert 'qwen3_model_bytes{model="a"} 0.0' in served.get("/metrics").text
        assert served.chat(max_tokens=1).json()["model"] == "a"


class Clock:
    """The module `time`, with another monotonic clock."""

    time = staticmethod(time.time)

    def __init__(self, passed: Callable[[], float]) -> None:
        self.monotonic = passed


def test_requests_share_a_load_and_streams_show_that_it_goes_on(
    gate: tuple[Gate, Served],
) -> None:
    slow, served = gate
    lines: list[list[str]] = []

    def read(path: str) -> None:
        body = body_of(path, "b", stream=True)
        with httpx.stream("POST", f"{served.url}{path}", json=body, timeout=60) as response:
            lines.append([line for line in response.iter_lines() if line])

    paths = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat")
    with ThreadPoolExecutor(5) as pool:
        reading = [pool.submit(read, path) for path in paths]
        whole = pool.submit(served.chat, model="b", max_tokens=1)
        until(lambda: served.get("/health").json()["models"][1]["requests"] == 5)
        assert states(served) == {"a": "loaded", "b": "loading"}
        assert served.chat(model="a", max_tokens=1).is_success  # others go on meanwhile
        time.sleep(0.15)
        slow.opened.set()
        for read_one in reading:
            read_one.result()
        assert whole.result().json()["model"] == "b"
    assert slow.count == 1
    begun = [found[0] for found in lines]
    assert sum(line.startswith(": loading ") for line in begun) == 3
    [line] = [json.loads(line) for line in begun if line[0] == "{"]  # JSON has no comments
    assert (line["message"]["content"], line["done"], line["model"]) == ("", False, "b")
    assert line["status"].startswith("loading ")
    ends = {found[-1] for found in lines if found[-1].startswith("data: ")}
    assert "data: [DONE]" in ends and len(ends) == 3


def test_a_load_that_fails_is_an_error_of_its_requests_alone(
    sources: list[ModelSource],
) -> None:
    failing, right = True, sources[1].load
    assert right

    def may_fail(progress: Progress) -> Any:
        time.sleep(0.2)
        if failing:
            raise CheckpointError("the disk is gone")
        return right(progress)

    both = [sources[0], replace(sources[1], load=may_fail)]
    with serving_all(both, keep_alive=0.05) as served:
        response = served.chat(model="b")
        assert response.status_code == 500 and message_of(response) == "the disk is gone"
        for path, field in (("/v1/chat/completions", "message"), ("/v1/messages", "type")):
            text = served.post(path, body_of(path, "b", stream=True)).text
            [event, data] = [line for line in text.splitlines() if line and line[0] != ":"]
            assert event == "event: error"
            assert json.loads(data.removeprefix("data: "))["error"][field]
            assert "the disk is gone" in data
        with pytest.raises(ollama.ResponseError, match="^the disk is gone"):
            for part in ollama.Client(served.url).chat("b", HI, stream=True):
                assert not part.message.content and not part.done
        assert served.chat(model="a", max_tokens=1).is_success
        failing = False
        assert served.chat(model="b", max_tokens=1).json()["model"] == "b"
        assert not served.server.service.active


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_during_a_load_frees_its_slot(
    gate: tuple[Gate, Served], stream: bool
) -> None:
    slow, served = gate
    body = body_of("/v1/chat/completions", "b", stream=stream)
    with pytest.raises(httpx.ReadTimeout):
        with httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json=body, timeout=0.4
        ) as response:
            next(response.iter_lines())
            raise httpx.ReadTimeout("leaves")
    until_idle(served)
    assert states(served)["b"] == "loading"
    slow.opened.set()
    wait_for(served, b="loaded")
    assert served.get("/health").json()["models"][1]["requests"] == 0


def test_the_server_ends_while_a_model_is_loaded(sources: list[ModelSource]) -> None:
    slow = Gate(sources[1])
    with ThreadPoolExecutor(1) as pool:
        with serving_all([sources[0], slow.source], shutdown=0.2) as served:
            waiting = pool.submit(served.chat, model="b")
            assert slow.begun.wait(30)
        response = waiting.result()
    assert response.status_code == 503 and "shutting down" in message_of(response)


# --- memory -------------------------------------------------------------------------------------


@pytest.fixture
def room_for_two(
    sources: list[ModelSource], whole_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limit the memory to what two of the models take."""
    gc.collect()
    config, options = sources[0].config, LoadOptions(backend.compute_dtype())
    plan = plan_load(config, None, options)
    fused = backend.has_fused_attention(options.dtype.size)
    work = Workload(config.context_window, options.dtype.size, chunk=MIN_CHUNK, fused=fused)
    guaranteed = plan.held + activation_bytes(config, work)
    limit = mx.get_active_memory() + plan.total + 1.5 * guaranteed
    monkeypatch.setenv("QWEN3_MEMORY", str(limit / 1e9))


def test_the_least_recently_used_model_makes_room(
    sources: list[ModelSource], room_for_two: None
) -> None:
    with serving_all(sources) as served:
        for name, loaded in (("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")):
            assert served.chat(model=name, max_tokens=1).json()["model"] == name
            assert "".join(n for n, state in states(served).items() if state == "loaded") == loaded


def test_the_first_model_leaves_room_for_the_others(
    folder: Path, whole_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "a" / "config.json").read_text())
    config |= {"max_position_embeddings": 1 << 20, "num_hidden_layers": 1}
    pair = [str(write_tiny(folder.parent / "long" / name, config)) for name in "ab"]
    gc.collect()
    monkeypatch.setenv("QWEN3_MEMORY", str((mx.get_active_memory() + 6e8) / 1e9))
    sources = stated_sources(pair, OPTIONS, "a")
    with serving_all(sources) as served:
        assert served.chat(model="b", max_tokens=1).is_success
        assert set(states(served).values()) == {"loaded"}


@pytest.mark.heavy
def test_busy_models_are_waited_for_up_to_a_limit(
    sources: list[ModelSource], room_for_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_PATIENCE", 0.1)
    with serving_all(sources) as served, ThreadPoolExecutor(2) as pool:
        body = {**endless(), "max_tokens": 250}
        busy = [pool.submit(served.post, "/v1/completions", {**body, "model": n}) for n in "ab"]
        until(
            lambda: states(served)["b"] == "loaded" and served.get("/health").json()["running"] == 2
        )
        response = served.chat(model="c")
        assert response.status_code == 503 and response.headers["retry-after"] == "10"
        assert "c does not fit" in message_of(response) and " GB" in message_of(response)
        monkeypatch.setattr(models, "_PATIENCE", 60)
        waiting = served.chat(model="c", max_tokens=1)
        assert waiting.json()["model"] == "c"
        assert all(reply.result().is_success for reply in busy)


def test_a_model_that_never_fits_closes_no_other(
    sources: list[ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_all(sources) as served:
        monkeypatch.setenv("QWEN3_MEMORY", "0.5")
        response = served.chat(model="c")
        assert response.status_code == 500 and "does not fit" in message_of(response)
        assert states(served)["a"] == "loaded"


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_models_take_turns_under_load(
    sources: list[ModelSource], room_for_two: None, count: int
) -> None:
    random_ = random.Random(count)
    paths = ("/v1/chat/completions", "/v1/messages", "/api/chat")
    asked = [
        (random_.choice(paths), random_.choice(NAMES), random_.random() < 0.5) for _ in range(count)
    ]
    before = mx.get_active_memory()
    with serving_all(sources) as served, ThreadPoolExecutor(12) as pool:

        def ask(path: str, name: str, stream: bool) -> None:
            response = served.post(path, body_of(path, name, stream=stream))
            assert response.is_success and f'"model":"{name}"' in response.text, response.text
            assert '"error"' not in response.text

        for reply in [pool.submit(ask, *one) for one in asked]:
            reply.result()
        state = served.get("/health").json()
        assert not state["active"] and sum(model["requests"] for model in state["models"]) == 0
        assert 1 <= sum(model["state"] == "loaded" for model in state["models"]) <= 2
    gc.collect()
    assert mx.get_active_memory() - before < 100_000
