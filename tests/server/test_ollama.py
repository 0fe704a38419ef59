"""Ollama's protocol as its documentation's lines and its clients use it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from qwen3_mlx import LLM, backend
from tests.server.serving import Served, serving

SUM = "What is 12 + 34?"
ASKED = [{"role": "user", "content": SUM}]
TOOL = {"name": "calculator", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo."""
    with serving(demo) as running:
        yield running


def generate(served: Served, prompt: str | None = SUM, **fields: Any) -> Any:
    """Return the response of `/api/generate`."""
    fields = {"stream": False, "options": {"temperature": 0}, **fields}
    response = served.post("/api/generate", {"model": "demo", "prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def chat(served: Served, **fields: Any) -> httpx.Response:
    """Send a message, and return a reply of a few tokens."""
    options = {"temperature": 0, "num_predict": 3, **fields.pop("options", {})}
    body = {"messages": ASKED, "stream": False, "think": False, "options": options, **fields}
    return served.post("/api/chat", body)


def test_generate_is_a_turn_of_its_own(served: Served, demo: LLM) -> None:
    said = generate(served, think=True)
    reply = demo.chat(SUM, temperature=0)
    assert (said["response"], said["thinking"]) == (reply.text, reply.reasoning)
    assert said["done"] and said["done_reason"] == "stop" and said["eval_count"] > 10
    said = generate(served, think=False, system="You are brief.")
    turns = [{"role": "system", "content": "You are brief."}, *ASKED]
    assert said["response"] == demo.chat(turns, thinking=False, temperature=0).text
    assert said["prompt_eval_count"] > 18 and "thinking" not in said
    assert generate(served, "Give a number", think=False, format={"enum": [7]})["response"] == "7"


def test_generate_streams_lines(served: Served) -> None:
    body = {"model": "default:latest", "prompt": SUM, "options": {"temperature": 0}}
    response = served.post("/api/generate", body)
    assert response.headers["content-type"] == "application/x-ndjson"
    *parts, last = [json.loads(line) for line in response.text.splitlines()]
    whole = generate(served)
    for name in ("response", "thinking"):
        assert "".join(part.get(name, "") for part in parts) == whole[name]
    assert not any(part["done"] for part in parts) and last["done"]
    assert last["response"] == "" and last["eval_count"] == whole["eval_count"]


def test_raw_text_goes_on(served: Served, demo: LLM) -> None:
    prompt = demo.render(SUM, thinking=False) + "12 + "
    said = generate(served, prompt, raw=True)
    assert said["response"] == demo.complete(prompt, temperature=0).text
    assert said["prompt_eval_count"] == len(demo.tokenizer.encode(prompt))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"suffix": "x"}, "suffix is not supported"),
        ({"template": "{{ .Prompt }}"}, "template is not supported"),
        ({"context": [1, 2]}, "context is not supported"),
        ({"images": ["aGk="]}, "images is not supported"),
        ({"raw": True, "system": "x"}, "system needs the chat template"),
        ({"raw": True, "think": True}, "think needs the chat template"),
        ({"keep_alive": "five minutes"}, "keep_alive must be seconds"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"options": {"num_predict": 3.5}}, "num_predict must be a whole number, not 3.5"),
        ({"options": {"num_ctx": "4096"}}, "num_ctx must be a whole number, not '4096'"),
        ({"options": {"temperature": True}}, "temperature must be a number"),
        (
            {"think": "x"},
            "think: Input should be a valid boolean or 'low', 'medium', 'high' or 'max'",
        ),
        ({"format": []}, " or an object"),
        ({"options": {"repeat_penalty": 0}}, "options.repeat_penalty must be from 0.01 to 100"),
        ({"format": {"type": "bogus"}}, "format: Invalid type: bogus"),
        ({"options": {"stop": [1]}}, "stop must be"),
        ({"options": {"stop": 5}}, "stop must be one or more non-empty strings, not 5"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    served: Served, fields: dict[str, Any], complaint: str
) -> None:
    response = served.post("/api/generate", {"prompt": "x", **fields})
    assert response.status_code == 400 and complaint in response.json()["error"]
    assert response.json().keys() == {"error"}


@pytest.mark.parametrize(("keep", "reason"), [(None, "load"), (0, "unload"), ("0s", "unload")])
def test_no_words_load_the_model(served: Served, keep: Any, reason: str) -> None:
    more = {"model": "demo"} | ({} if keep is None else {"keep_alive": keep})
    for path, fields in (
        ("/api/generate", {}),
        ("/api/generate", {"prompt": ""}),
        ("/api/chat", {"messages": []}),
    ):
        response = served.post(path, {**fields, **more})
        body = response.json()
        assert body["done"] and body["done_reason"] == reason and not body["eval_count"]
        assert body.get("response", body.get("message", {}).get("content")) == ""
        assert ("stays loaded" in response.headers.get("warnings", "")) == (reason == "unload")


def test_a_budget_beyond_the_context_is_shortened_by_its_own_name(served: Served) -> None:
    warnings = chat(served, options={"num_predict": 9000}).headers["warnings"]
    assert warnings.startswith("options.num_predict=9,000 was shortened to 8,")


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"options": {"num_ctx": 100_000}}, "num_ctx=100000 was ignored"),
        ({"options": {"num_ctx": 2048.0}}, "num_ctx=2048 was ignored"),
        ({"options": {"num_ctx": 8192}}, None),
        ({"options": {"repeat_last_n": 64}}, "repeat_last_n=64 was ignored"),
        ({"options": {"repeat_last_n": -1, "top_k": -1, "seed": -1, "stop": ""}}, None),
        ({"options": {"stop": ["", "never"], "num_predict": 2.0, "num_gpu": 1}}, None),
        ({"options": {"mirostat": 2}}, "options.mirostat is not supported"),
        ({"options": {"mirostat": 0, "tfs_z": 1.0, "typical_p": 1}}, None),
        ({"options": {"wings": 2}}, "unknown option 'wings'"),
        ({"keep_alive": "5m"}, "the model stays loaded"),
        ({"keep_alive": 300}, "the model stays loaded"),
        ({"keep_alive": "-1"}, None),
        ({"keep_alive": -1}, None),
        ({"truncate": True}, "truncate was ignored"),
        ({"shift": True}, "shift was ignored"),
        ({"truncate": False, "shift": False}, None),
        ({"wings": 2}, "unknown field 'wings'"),
    ],
)
def test_nothing_is_dropped_in_silence(
    served: Served, fields: dict[str, Any], warning: str | None
) -> None:
    response = chat(served, **fields)
    assert response.status_code == 200, response.text
    found = response.headers.get("warnings")
    assert found is None if warning is None else warning in (found or "")
    assert response.json()["eval_count"] == (2 if "num_gpu" in str(fields) else 3)


@pytest.mark.parametrize("most", [0, -1, -2])
def test_no_number_of_tokens_is_no_limit(served: Served, most: int) -> None:
    response = chat(served, options={"num_predict": most})
    assert response.json()["done_reason"] == "stop" and response.json()["eval_count"] > 3
    assert ("num_predict=0 is no limit" in response.headers.get("warnings", "")) == (most == 0)


def test_without_a_window_nothing_is_penalised(served: Served) -> None:
    plain = chat(served, options={"num_predict": 12}).json()["message"]
    harsh = {"num_predict": 12, "repeat_penalty": 5, "presence_penalty": 2}
    assert chat(served, options=harsh).json()["message"] != plain
    assert chat(served, options={**harsh, "repeat_last_n": 0}).json()["message"] == plain


def test_a_seed_of_minus_one_is_another_each_time(served: Served) -> None:
    hot = {"temperature": 5, "top_k": 0, "top_p": 1.0, "num_predict": 12, "seed": -1}
    once, again = (chat(served, options=hot).json()["message"]["content"] for _ in range(2))
    assert once != again


def test_a_call_in_the_history_may_be_text(served: Served) -> None:
    prompts = set()
    for arguments in ({"expression": "12 + 34"}, '{"expression": "12 + 34"}'):
        call = {"function": {"name": "calculator", "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        answer = {"role": "tool", "tool_name": "calculator", "content": "46"}
        tools = [{"type": "function", "function": TOOL}]
        body = chat(served, messages=[*ASKED, turn, answer], tools=tools).json()
        prompts.add(body["prompt_eval_count"])
    assert len(prompts) == 1


def test_a_tool_that_is_none_is_refused(served: Served) -> None:
    for parameters in ([1], "x"):
        tools = [{"type": "function", "function": {**TOOL, "parameters": parameters}}]
        response = chat(served, tools=tools)
        assert response.status_code == 400 and "parameters" in response.json()["error"]


def test_names_are_those_of_the_model(served: Served) -> None:
    for name in ("demo", "demo:latest", "default", "Default:latest", "", None):
        assert chat(served, model=name).status_code == 200
    words = "model 'llama3.2' not found; there is demo"
    for path in ("/api/chat", "/api/generate", "/api/show"):
        body = {"model": "llama3.2", "messages": ASKED, "prompt": "x"}
        response = served.post(path, body)
        assert response.status_code == 404 and response.json() == {"error": words}


def test_log_probabilities(served: Served, demo: LLM) -> None:
    fields = {"logprobs": True, "top_logprobs": 2}
    whole = chat(served, **fields).json()
    reply = demo.chat(SUM, thinking=False, temperature=0, max_tokens=3, logprobs=2)
    found = [(one["token"], bytes(one["bytes"])) for one in whole["logprobs"]]
    assert found == [(one.token.decode(), one.token) for one in reply.logprobs]
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in whole["logprobs"])
    lines = chat(served, stream=True, **fields).text.splitlines()
    pieces = [one for line in lines for one in json.loads(line).get("logprobs", ())]
    assert [one["token"] for one in pieces] == [one["token"] for one in whole["logprobs"]]
    assert "logprobs" not in chat(served).json()


def test_what_clients_look_at_first(served: Served) -> None:
    for path in ("/", "/api/tags", "/api/version"):
        assert httpx.head(f"{served.url}{path}", timeout=60).status_code == 200
    version = served.get("/api/version").json()["version"]
    assert tuple(int(part) for part in version.split(".")) >= (0, 12, 0)
    models = served.get("/api/tags").json()["models"]
    assert [model["name"] for model in models] == ["demo", "default"]
    assert all(len(model["digest"]) == 64 for model in models)
    for path in ("push", "create", "copy", "delete"):
        method = "DELETE" if path == "delete" else "POST"
        body = {"model": "demo", "stream": False}
        response = httpx.request(method, f"{served.url}/api/{path}", json=body, timeout=60)
        assert response.status_code == 501 and "this server " in response.json()["error"]


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    """Ollama's client."""
    with ollama.Client(host=served.url) as made:
        yield made


def test_its_own_client(client: Any) -> None:
    said = client.generate(model="demo", prompt=SUM, think=False, options={"temperature": 0})
    assert said.response.startswith("12 + 34 =") and said.thinking is None and said.context is None
    raw: Any = {"prompt": "What is", "raw": True, "options": {"num_predict": 4}}
    parts = list(client.generate(model="default", stream=True, **raw))
    assert parts[-1].done and "".join(part.response for part in parts)
    assert client.chat(model="demo", messages=[]).done_reason == "load"
    assert client.generate(model="demo", keep_alive=0).done_reason == "unload"
    noted = client.chat(model="demo", messages=ASKED, think=False, logprobs=True, top_logprobs=1)
    assert noted.logprobs[0].token and noted.logprobs[0].top_logprobs[0].token
    with pytest.raises(ollama.ResponseError, match="demo") as told:
        client.show("llama3.2")
    assert told.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="--allow-pull") as told:
        client.pull("8B")
    assert told.value.status_code == 403


def test_the_loaded_model_is_described(client: Any, demo: LLM) -> None:
    [loaded], listed = client.ps().models, client.list().models[0]
    weights = sum(array.nbytes for array in demo.model.tensors().values())
    assert listed.size == weights <= loaded.size and loaded.digest == listed.digest
    assert loaded.size_vram == (loaded.size if backend.on_gpu() else 0)
    assert loaded.context_length == demo.context and loaded.expires_at.year == 9999
    assert loaded.details.parameter_size == "1.9M" and "bits" in loaded.details.quantization_level
