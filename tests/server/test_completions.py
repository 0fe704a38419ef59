"""Log probabilities of prompts: `echo` with `logprobs` on /v1/completions, and below it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from qwen3_mlx import LLM, ToolCallDelta, backend, load
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.engine import prompt_logprobs
from qwen3_mlx.engine.forward import BatchSlice, forward
from qwen3_mlx.engine.request import SampledLogprob
from qwen3_mlx.errors import CheckpointError
from tests.engine.harness import Client, engine_of, model_of, run
from tests.server.serving import Served, serving
from tests.support import assert_close, make_model, random_ids, write_tiny

SUM = "What is 2 + 3?"


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo."""
    with serving(demo) as running:
        yield running


def log_probabilities(demo: LLM, ids: Sequence[int]) -> mx.array:
    """Return log p [N, V], computed by `llm.logits`."""
    logprobs: mx.array = nn.log_softmax(demo.logits(ids), axis=-1)
    return logprobs


def expected(demo: LLM, ids: Sequence[int]) -> mx.array:
    """Return log p [N - 1] of all ids but the first."""
    following = mx.array(list(ids[1:]))[:, None]
    return mx.take_along_axis(log_probabilities(demo, ids)[:-1], following, axis=1)[:, 0]


def ask(served: Served, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    """Return the choices of a completion."""
    response = served.post("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


@pytest.mark.heavy
@pytest.mark.parametrize("most", [0, 1])
def test_echoed_logprobs_are_those_of_the_network(
    served: Served, demo: LLM, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    monkeypatch.setattr(prompt_logprobs, "_BLOCK", 20 * demo.config.vocab_size)
    prompts = [SUM * 25, "One é two, 你 three.", "x"]
    texts = ask(served, prompts, echo=True, logprobs=2, max_tokens=most)
    ids = [demo.tokenizer.encode(prompt) for prompt in prompts]
    assert len(ids[1]) < 64 and len(ids[2]) == 1 and len(ids[0]) > 3 * 64
    for number, (choice, tokens) in enumerate(zip(texts, ids, strict=True)):
        found = choice["logprobs"]
        assert choice["index"] == number and choice["text"].startswith(prompts[number])
        assert {len(found[name]) for name in found} == {len(tokens) + most}
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        if len(tokens) == 1:
            continue
        logprobs = found["token_logprobs"][1 : len(tokens)]
        assert_close(mx.array(logprobs), expected(demo, tokens), 1e-4)
        rows = np.array(log_probabilities(demo, tokens)[:, : len(demo.tokenizer)])
        for top, row in zip(found["top_logprobs"][1 : len(tokens)], rows, strict=False):
            assert list(top.values()) == pytest.approx(np.sort(row)[-2:][::-1].tolist(), abs=1e-4)
        for text, start in zip(found["tokens"], found["text_offset"], strict=True):
            assert "\ufffd" in text or choice["text"][start : start + len(text)] == text
    again = ask(served, ids, echo=True, logprobs=2, max_tokens=most)
    for one, other in zip(again, texts, strict=True):
        assert one["text"] == other["text"]
        logprobs = [choice["logprobs"]["token_logprobs"][1:] for choice in (one, other)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_what_evaluations_ask_is_scored_as_the_logits_say(served: Served, demo: LLM) -> None:
    question = demo.tokenizer.encode(demo.render(SUM, thinking=False))
    end = demo.tokenizer.encode("<|im_end|>")
    answers = [demo.tokenizer.encode(text) for text in ("2 + 3 = 4", "2 + 3 = 5", "no")]
    pairs = [*((question, answer) for answer in answers), (end, demo.tokenizer.encode("Hello"))]
    asked = {"logprobs": 1, "max_tokens": 1, "seed": 1234, "echo": True, "temperature": 0}
    # A question that was answered before is kept in the cache; its choices are scored all the same.
    ask(served, [question], max_tokens=2)
    choices = ask(served, [context + answer for context, answer in pairs], **asked)
    greedy = []
    for (context, answer), choice in zip(pairs, choices, strict=True):
        found, start = choice["logprobs"], len(context)
        # The last entry is the token that is chosen, be it the end: evaluations leave it out.
        assert len(found["tokens"]) == len(context + answer) + 1
        logprobs, tops = found["token_logprobs"][start:-1], found["top_logprobs"][start:-1]
        exact = expected(demo, context + answer)[start - 1 :].sum().item()
        assert sum(logprobs) == pytest.approx(exact, abs=1e-4)
        greedy.append(all(one == max(t.values()) for one, t in zip(logprobs, tops, strict=True)))
    assert greedy == [False, True, False, False]
    assert choices[1]["finish_reason"] == "stop" and choices[1]["text"].endswith("= 5")
    assert choices[1]["logprobs"]["tokens"][-1] == "<|im_end|>"


def test_a_stream_has_the_same(served: Served) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0}
    (whole,) = ask(served, "Count é: 1, 2", **fields)
    response = served.post("/v1/completions", {"prompt": "Count é: 1, 2", **fields, "stream": True})
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        pieces = [value for chunk in chunks for value in chunk["logprobs"][name]]
        if name == "token_logprobs":
            assert pieces[1:] == pytest.approx(values[1:], abs=1e-5)
        elif name != "top_logprobs":
            assert pieces == values


def test_no_tokens_are_no_text(served: Served, demo: LLM) -> None:
    (nothing,) = ask(served, SUM, max_tokens=0)
    assert nothing["text"] == "" and nothing["finish_reason"] == "length"
    (echoed,) = ask(served, SUM, max_tokens=0, echo=True)
    assert echoed["text"] == SUM and echoed["logprobs"] is None
    count = len(demo.tokenizer.encode(SUM))
    chosen = ask(served, [SUM], max_tokens=0, echo=True, logprobs=0, n=2)
    assert [choice["index"] for choice in chosen] == [0, 1]
    assert chosen[0]["logprobs"]["top_logprobs"] == [None, *[{}] * (count - 1)]
    body = {"prompt": SUM, "max_tokens": 0, "echo": True}
    usage = served.post("/v1/completions", body).json()["usage"]
    assert usage["completion_tokens"] == 0 and usage["prompt_tokens"] == count
    (free,) = ask(served, demo.render(SUM, thinking=False), max_tokens=-1)
    assert free["finish_reason"] == "stop" and free["text"] == "2 + 3 = 5"


def test_a_prompt_that_fills_the_context_can_be_scored() -> None:
    with load(context=64, dequantize=False) as llm, serving(llm) as small:
        for most, count, status in ((0, 64, 200), (0, 65, 400), (1, 63, 200), (1, 64, 400)):
            body = {"prompt": [7] * count, "max_tokens": most, "echo": True, "logprobs": 0}
            assert small.post("/v1/completions", body).status_code == status


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"logprobs": 6}, "logprobs must be at most 5 with echo, not 6"),
        ({"prompt": [[1, 5000]]}, "token ids are 0 to 1,279, not 5000"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"prompt": [7] * 8193}, "the context window is 8,192"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    served: Served, fields: dict[str, Any], complaint: str
) -> None:
    body = {"prompt": "x", "echo": True, "logprobs": 1, "max_tokens": 0, **fields}
    response = served.post("/v1/completions", body)
    assert response.status_code == 400 and complaint in response.json()["error"]["message"]


def test_an_id_of_no_token_has_no_logprob(tmp_path: Path) -> None:
    """Published checkpoints have more rows than tokens."""
    with load(write_tiny(tmp_path, padding=64)) as llm, serving(llm) as served:
        body = {"prompt": [[1, 1300]], "echo": True, "logprobs": 1, "max_tokens": 1}
        refused = served.post("/v1/completions", body)
        assert refused.status_code == 400
        assert "token id 1300 is not in the vocabulary" in refused.json()["error"]["message"]
        assert served.post("/v1/completions", body | {"echo": False}).status_code == 200


def test_what_a_prompt_may_be_is_told(served: Served) -> None:
    for prompt in ([1, "a"], [1.5], ["a", [1]]):
        error = served.post("/v1/completions", {"prompt": prompt}).json()["error"]
        kinds = "a valid string or a valid integer or a valid list"
        assert error["message"] == f"prompt: Input should be {kinds}" and error["param"] == "prompt"
    body = {"messages": [{"role": "user", "content": "a"}], "tool_choice": 5}
    error = served.post("/v1/chat/completions", body).json()["error"]
    assert error["message"].endswith("'auto' or 'required' or an object")


# --- the engine ---------------------------------------------------------------------------------


class Scored(Client):
    """Asks for the scores of a prompt."""

    def __init__(self, ids: Sequence[int], max_tokens: int = 0) -> None:
        self.scores: list[SampledLogprob] = []
        super().__init__(ids, max_tokens, on_prompt_logprobs=self.scores.extend, top_logprobs=1)

    def check(self) -> None:
        """Check that each token after the first was scored once, in order."""
        assert [score.token for score in self.scores] == self.request.ids[1:]


def test_streams_go_on_while_a_prompt_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    rows, head = [], model.head

    def noted(x: mx.array) -> mx.array:
        rows.append(x.shape[-2])
        return head(x)

    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    monkeypatch.setattr(prompt_logprobs, "_BLOCK", 10 * model.config.vocab_size)
    monkeypatch.setattr(model, "head", noted)
    engine = engine_of(model)
    other, scored = Client(random_ids(8), 40), Scored(random_ids(300, seed=1))
    engine.submit(other.request)
    while not other.tokens:
        engine.step()
    engine.submit(scored.request)
    seen: list[tuple[int, int]] = []
    while engine.step():
        seen.append((len(scored.scores), len(other.tokens)))
    parts = [next(tokens for known, tokens in seen if known >= part) for part in (64, 128, 256)]
    assert parts[0] < parts[1] < parts[2] < 40  # a chunk a step, and a token beside it
    scored.check()
    assert max(rows) <= 10  # no more logits at once, of a chunk of 64
    logprobs = nn.log_softmax(model(mx.array([list(scored.request.ids)]))[0, :-1], axis=-1)
    following = mx.array(list(scored.request.ids[1:]))[:, None]
    found = mx.array([score.logprob for score in scored.scores])
    assert_close(found, mx.take_along_axis(logprobs, following, axis=1)[:, 0], 1e-4)
    assert scored.outcome.completion_tokens == 0 and not scored.tokens


@pytest.mark.parametrize("way", ["plain", "draft"])
def test_a_prompt_is_scored_once_whatever_is_kept_or_put_aside(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    engine, ids = engine_of(model_of("dense"), way), random_ids(400)
    first = Scored(ids, max_tokens=2)
    run(engine, first)
    again, other = Scored(ids), Client(random_ids(200, seed=2), 1)
    engine.submit(again.request)
    for kept in (True, False):
        engine.step()
        engine.step()
        (sequence,) = engine._core.scheduler.running
        engine._core.scheduler._preempt(sequence)  # as for want of room
        if not kept:
            engine.forget()  # all is read anew, and what is scored is not scored again
        assert 0 < len(again.scores) < 399
    run(engine, other)
    for client in (first, again):
        client.check()
    assert again.outcome.cached_tokens == 0 and first.outcome.completion_tokens == 2
    found, before = ([one.logprob for one in client.scores] for client in (again, first))
    assert found == pytest.approx(before, abs=1e-4)


def test_a_client_that_goes_away_ends_the_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 64)
    engine, scored = engine_of(make_model()), Scored(random_ids(400))
    engine.submit(scored.request)
    engine.step()
    engine.step()
    scored.request.cancelled.set()
    run(engine)
    assert scored.outcome.reason == "cancelled" and len(scored.scores) <= 128


def test_a_broken_network_scores_nothing() -> None:
    model = make_model()
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, float("nan"))
    scored = Scored(random_ids(5))
    run(engine_of(model), scored)
    (error,) = scored.outcomes
    assert isinstance(error, CheckpointError) and not scored.scores


def test_a_piece_of_a_call_is_no_end() -> None:
    said = ReplyBuilder()
    said.add(ToolCallDelta("a", "f", "{"))
    assert not said.ended


def test_several_prompts_are_only_read(served: Served) -> None:
    """In a step of which no logits are wanted."""
    prompts = [f"{number} + 34 =" for number in range(8)]
    asked: list[dict[str, Any]] = [{}, {"echo": True}, {"logprobs": 1}]
    for fields in asked:
        for choice, prompt in zip(
            ask(served, prompts, max_tokens=0, **fields), prompts, strict=True
        ):
            assert choice["text"] == (prompt if "echo" in fields else "")
    model = make_model()
    caches = [model.make_cache() for _ in range(2)]
    parts = [BatchSlice(layers, length, 0) for layers, length in zip(caches, (3, 2), strict=True)]
    assert forward(model, mx.array([1, 2, 3, 4, 5]), parts).outputs is None
