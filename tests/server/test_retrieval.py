"""Vectors and scores over HTTP, as published clients and plain requests get them."""

import base64
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest

from qwen3_mlx import LLM, Qwen3Error
from qwen3_mlx.engine.core import EngineCore
from tests.embedding_twins import golden
from tests.server.harness import message_of, samples, until, until_idle, warnings_of
from tests.server.serving import Served, serving

CASES = {case["case"]: case for case in golden("embeddings")["embedding"]["cases"]}
DOCUMENTS: dict[str, Any] = next(iter(CASES.values()))
TEXTS, VECTORS = DOCUMENTS["texts"][:3], np.array(DOCUMENTS["vectors"][:3])
RANKED = golden("reranker")["cases"][0]
QUERY, CANDIDATES = RANKED["query"], RANKED["documents"][:4]  # of the others one is a forgery
SCORES = RANKED["scores"][:4]
ORDER = sorted(range(4), key=lambda place: -SCORES[place])


@pytest.fixture(scope="module")
def client(embedder: Served) -> Iterator[Any]:
    """OpenAI's client."""
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def vectors_of(response: httpx.Response) -> np.ndarray:
    """Return the vectors of a response in OpenAI's form."""
    assert response.status_code == 200, response.text
    return np.array([one["embedding"] for one in response.json()["data"]])


def embed(served: Served, given: Any, **fields: Any) -> httpx.Response:
    """Ask for vectors by OpenAI's API."""
    return served.post("/v1/embeddings", {"input": given, **fields})


# --- vectors ------------------------------------------------------------------------------------


def test_openais_client_gets_the_references_vectors(client: Any, embedder: Served) -> None:
    made = client.embeddings.create(model="demo", input=TEXTS)  # in base64, though nobody asked
    assert np.abs(np.array([one.embedding for one in made.data]) - VECTORS).max() < 1e-5
    assert [one.index for one in made.data] == [0, 1, 2] and made.model == "demo"
    ids = golden("embeddings")["embedding"]["ids"][:3]
    assert made.usage.prompt_tokens == made.usage.total_tokens == sum(map(len, ids))
    short = client.embeddings.create(model="demo", input=TEXTS[0], dimensions=8)
    assert abs(np.linalg.norm(short.data[0].embedding) - 1) < 1e-6
    with pytest.raises(openai.BadRequestError, match="dimensions must be from 1 to 64, not 65"):
        client.embeddings.create(model="demo", input="a", dimensions=65)


def test_numbers_and_base64_are_the_librarys(embedder: Served) -> None:
    vectors = np.array(embedder.llm.embed(TEXTS))
    as_numbers = vectors_of(embed(embedder, TEXTS))
    assert (as_numbers.astype(np.float32) == vectors).all()
    coded = embed(embedder, TEXTS, encoding_format="base64").json()["data"]
    bytes_of = [base64.b64decode(one["embedding"]) for one in coded]
    assert (np.array([np.frombuffer(one, "<f4") for one in bytes_of]) == vectors).all()


def test_token_ids_stand_for_the_text_that_they_encode(embedder: Served) -> None:
    *ids, end = golden("embeddings")["embedding"]["ids"][0]
    for given in (ids, [ids], [[*ids, end]]):
        assert np.abs(vectors_of(embed(embedder, given)) - VECTORS[:1]).max() < 1e-5
    assert "token ids are 0 to" in message_of(embed(embedder, [-1]))
    assert "input[1]" in message_of(embed(embedder, [[1], [99_999]]))


def test_a_query_has_its_prompt(embedder: Served) -> None:
    case = next(case for case in CASES.values() if "prompt_name" in case)
    found = vectors_of(embed(embedder, case["texts"], prompt_name=case["prompt_name"]))
    assert np.abs(found - np.array(case["vectors"])).max() < 1e-5
    case = next(case for case in CASES.values() if "prompt" in case)
    task = case["prompt"].removeprefix("Instruct: ").removesuffix("\nQuery:")
    found = vectors_of(embed(embedder, case["texts"], instruction=task))
    assert np.abs(found - np.array(case["vectors"])).max() < 1e-5


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"input": []}, "input is empty; give some text"),
        ({"input": [[]] * 2049}, "input has 2,049 texts, and at most 2,048 are taken at once"),
        ({"input": "a" * (8 << 20), "instruction": "b"}, "input has 8,388,609 characters with"),
        ({"input": ["a", "b " * 300]}, "input[1] has "),
        ({"input": "a " * 300}, "or have it cut at its end (truncate=true)"),
        ({"input": "a", "dimensions": 0}, "dimensions must be from 1 to 64, not 0"),
        ({"input": "a", "encoding_format": "x"}, "should be 'float' or 'base64'"),
        ({"input": "a", "prompt_name": "x"}, "prompt_name must be one of the checkpoint's"),
        ({"input": [1], "instruction": "x"}, "goes with texts, not with token ids"),
        ({"input": ["a", 1]}, "input"),
        ({}, "input: Field required"),
    ],
)
def test_what_cannot_be_embedded_is_refused(embedder: Served, body: Any, complaint: str) -> None:
    response = embedder.post("/v1/embeddings", body)
    assert response.status_code == 400 and complaint in message_of(response)


def test_a_text_too_long_is_cut_where_that_is_asked_for(embedder: Served) -> None:
    long = "b " * 300
    refused = embed(embedder, long).json()["error"]
    assert (refused["code"], refused["param"]) == ("context_length_exceeded", "input")
    response = embed(embedder, ["a", long], truncate=True)
    assert "1 of 2 texts were cut at their end" in warnings_of(response)
    assert response.json()["usage"]["prompt_tokens"] == 2 + 256


def test_ignored_fields_are_named(embedder: Served) -> None:
    assert warnings_of(embed(embedder, "a", user="ann", model="default")) == ""
    warned = warnings_of(embed(embedder, "a", task="search", model="text-embedding-3-small"))
    assert "unknown field 'task' was ignored" in warned and "demo answers" in warned


def test_ollamas_client(embedder: Served) -> None:
    with ollama.Client(host=embedder.url) as client:
        made: Any = client.embed(model="demo", input=TEXTS)
        assert np.abs(np.array(made.embeddings) - VECTORS).max() < 1e-5
        assert made.prompt_eval_count > 3 and made.total_duration > 0 == made.load_duration
        assert len(client.embed(model="demo", input="a", dimensions=8).embeddings[0]) == 8
        old: Any = client.embeddings(model="demo", prompt=TEXTS[0])
        assert np.abs(np.array(old.embedding) - VECTORS[0]).max() < 1e-5
        assert client.embed(model="demo", input="").embeddings == []
        assert client.embeddings(model="demo").embedding == []
        long = "b " * 300
        assert client.embed(model="demo", input=long).prompt_eval_count == 256
        with pytest.raises(ollama.ResponseError, match=r"input\[0\] has ") as told:
            client.embed(model="demo", input=long, truncate=False)
        assert told.value.status_code == 400
        with pytest.raises(ollama.ResponseError, match="not found"):
            client.embed(model="bge-m3", input="a")
        shown: Any = client.show("demo")
        assert shown.capabilities == ["embedding"]
        assert shown.modelinfo["qwen3.embedding_length"] == 64


def test_ollamas_options_without_effect_are_named(embedder: Served) -> None:
    options = {"temperature": 0.5, "num_ctx": 256, "num_gpu": 1, "seed": None}
    body = {"input": "a", "options": options, "keep_alive": "5m", "truncate": None}
    warned = warnings_of(embedder.post("/api/embed", body))
    assert warned == (
        "options.temperature has no effect on vectors; "
        "keep_alive was ignored: the model stays loaded"
    )


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_are_ranked_the_best_first(reranker: Served, path: str) -> None:
    documents = [*CANDIDATES[:2], *({"text": text} for text in CANDIDATES[2:])]
    body = {"model": "demo", "query": QUERY, "documents": documents}
    found = reranker.post(path, body).json()
    assert [one["index"] for one in found["results"]] == ORDER
    for one in found["results"]:
        assert abs(one["relevance_score"] - SCORES[one["index"]]) < 1e-5 and "document" not in one
    count = sum(map(len, RANKED["ids"][:4]))
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert found["meta"]["tokens"] == {"input_tokens": count} and found["model"] == "demo"
    best = reranker.post(path, {**body, "top_n": 1, "return_documents": True}).json()["results"]
    assert len(best) == 1 and best[0]["document"] == {"text": CANDIDATES[ORDER[0]]}


def test_teis_form_is_told_by_its_texts(reranker: Served) -> None:
    body = {"query": QUERY, "texts": CANDIDATES, "raw_scores": False, "truncate": True}
    ranks = reranker.post("/rerank", body).json()
    assert [one["index"] for one in ranks] == ORDER and set(ranks[0]) == {"index", "score"}
    assert abs(ranks[0]["score"] - SCORES[ORDER[0]]) < 1e-5
    ranks = reranker.post("/rerank", {**body, "return_text": True}).json()
    assert [one["text"] for one in ranks] == [CANDIDATES[place] for place in ORDER]


def test_the_task_of_a_rerank_may_be_named(reranker: Served) -> None:
    body = {"query": QUERY, "documents": CANDIDATES, "instruction": "Find the nonsense"}
    [*scores] = reranker.llm.rerank(QUERY, CANDIDATES, instruction="Find the nonsense")
    for one in reranker.post("/v1/rerank", body).json()["results"]:
        assert one["relevance_score"] == scores[one["index"]]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"query": "a"}, "documents is empty"),
        ({"query": "a", "documents": []}, "documents is empty"),
        ({"query": "a", "documents": ["b"], "texts": ["b"]}, "two names of the same"),
        ({"query": "a", "documents": [""] * 2049}, "2,049 texts"),
        ({"query": "a" * 4097, "documents": [""] * 2048}, "8,390,656 characters"),
        ({"query": "a " * 300, "documents": ["b"]}, "leave no room for a document"),
        ({"query": "a", "documents": [{"title": "b"}]}, "Field required"),
        ({"query": "a", "texts": ["b"], "raw_scores": True}, "raw_scores is not supported"),
        ({"query": "a", "texts": ["b " * 300], "truncate": False}, "1 of the documents are too"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ({"documents": ["b"]}, "query: Field required"),
    ],
)
def test_what_cannot_be_ranked_is_refused(reranker: Served, body: Any, complaint: str) -> None:
    response = reranker.post("/v1/rerank", body)
    assert response.status_code == 400 and complaint in message_of(response)


def test_a_document_too_long_is_cut_with_a_warning(reranker: Served) -> None:
    response = reranker.post("/v1/rerank", {"query": "a", "documents": ["b", "c " * 300]})
    assert warnings_of(response).startswith("1 of 2 texts were cut at their end")


# --- the kind of the model ----------------------------------------------------------------------


def test_what_a_model_is_not_for_is_refused_by_its_kind(
    embedder: Served, reranker: Served, demo: LLM
) -> None:
    chat: Any = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    embeds: Any = ("/v1/embeddings", {"input": "a"})
    ranks: Any = ("/v1/rerank", {"query": "a", "documents": ["b"]})
    with serving(demo) as chats:
        for served, kind, refused in (
            (embedder, "an embedding model", (chat, ranks)),
            (reranker, "a reranker", (chat, embeds)),
            (chats, "a chat model", (embeds, ranks)),
        ):
            for path, body in refused:
                response = served.post(path, body)
                assert response.status_code == 400
                assert message_of(response).startswith(f"this checkpoint is {kind}")
                assert "()" not in message_of(response)  # addresses, not the library's methods
            old = served.post("/api/embed", {"input": "a"})
            assert old.status_code == (200 if served is embedder else 400)
            assert "pooling" not in old.text
        last = vectors_of(embed(chats, "a", pooling="last"))
        assert (last.astype(np.float32) == np.array(demo.embed(["a"], pooling="last"))).all()
        assert chats.get("/v1/models/demo").json()["kind"] == "chat"


def test_no_protocol_chats_with_an_embedding_model(embedder: Served) -> None:
    turns = [{"role": "user", "content": "a"}]
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": turns, "max_tokens": 4}),
        ("/api/chat", {"messages": turns}),
        ("/api/generate", {"prompt": "a"}),
    ):
        response = embedder.post(path, body)
        assert response.status_code == 400, path
        said = "this checkpoint is an embedding model; load a chat model such as Qwen/Qwen3-8B, or"
        assert message_of(response) == f"{said} compute vectors with /v1/embeddings"


def test_the_kind_is_where_clients_look(embedder: Served, reranker: Served) -> None:
    for served, kind, capability in (
        (embedder, "embedding", "embedding"),
        (reranker, "reranker", "reranking"),
    ):
        [model] = served.get("/v1/models").json()["data"]
        assert (model["kind"], model["thinking"]) == (kind, "never")
        assert served.post("/api/show", {}).json()["capabilities"] == [capability]


# --- operation ----------------------------------------------------------------------------------


def test_texts_are_counted_logged_and_paid_for(
    embedder: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qwen3_mlx.server.access")
    file = tmp_path / "keys"
    file.write_text("ann key - 4\n")
    file.chmod(0o600)
    with serving(embedder.llm, key_file=file, log_content=True) as served:
        sent = {"Authorization": "Bearer key"}
        statuses = [served.post("/v1/embeddings", {"input": ["a", "b"]}, **sent).status_code]
        statuses.append(served.post("/v1/embeddings", {"input": "a"}, **sent).status_code)
        assert statuses == [200, 429]
        found = samples(served)
    assert found["qwen3_prompt_tokens_total", "demo"] == 4
    (line,) = [line for line in caplog.messages if '"ann"' in line and '"texts"' in line]
    record = json.loads(line)
    assert (record["texts"], record["prompt_tokens"]) == (2, 4)
    assert record["prompts"] == ["a", "b"] and record["model"] == "demo"


def test_computing_ends_with_its_client_and_its_time(
    embedder: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, ended, release = embedder.llm, threading.Event(), threading.Event()
    seen = list[float]()

    def compute(_: Any, follow: Any) -> Any:
        """Compute without end, until `follow` ends it."""
        seen.append(served.get("/health").json()["computing"]["requests"])
        seen.append(samples(served)["qwen3_requests_computing",])
        try:
            while not release.wait(0.01):
                follow(7, 1000)
        finally:
            ended.set()

    with serving(llm, request_timeout=0.3) as served:
        monkeypatch.setattr(llm, "compute_texts", compute)
        late = embed(served, "a")
        assert late.status_code == 504 and "not computed within 0.3 s" in late.text
        assert seen == [1, 1]
        assert ended.wait(60)
        ended.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/embeddings", json={"input": "a"}, timeout=0.1)
        assert ended.wait(60)
        until_idle(served)
        until(lambda: samples(served)["qwen3_prompt_tokens_total", "demo"] == 14)


def test_what_is_not_the_requests_fault_is_a_503(
    embedder: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = embedder.server.service

    def stop(*_: Any) -> None:
        service.admission.cancel_all()
        threading.Event().wait(0.3)

    def fail(*_: Any) -> None:
        raise Qwen3Error("the longest text, of 9 tokens, does not fit")

    for compute, sentence in ((stop, "the server is shutting down"), (fail, "does not fit")):
        monkeypatch.setattr(embedder.llm, "compute_texts", compute)
        response = embed(embedder, "a")
        assert response.status_code == 503 and sentence in message_of(response)


def test_a_reply_ends_while_texts_are_computed(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    advance, begun = EngineCore.advance_job, threading.Event()

    def in_short_chunks(self: EngineCore, job: Any) -> bool:
        job.chunk = 2
        begun.set()
        return advance(self, job)

    monkeypatch.setattr(EngineCore, "advance_job", in_short_chunks)
    made: list[httpx.Response] = []
    with serving(demo) as served:
        given = ["1 2 3 " * 25]
        work = threading.Thread(target=lambda: made.append(embed(served, given, pooling="last")))
        work.start()
        assert begun.wait(60)
        assert served.chat(max_tokens=2).status_code == 200 and not made
        work.join()
    assert len(vectors_of(made[0])) == 1
