"""/metrics, as Prometheus reads it."""

import httpx

from qwen3_mlx import LLM
from tests.server.harness import endless, samples, until
from tests.server.serving import serving


def test_what_was_done_is_counted(demo: LLM) -> None:
    with serving(demo, api_key="key", max_requests=7) as served:
        sent = {"Authorization": "Bearer key"}
        messages = [{"role": "user", "content": "What is 12 + 34?"}]
        for stream in (False, True):
            body = {"messages": messages, "stream": stream, "seed": 1}
            assert served.post("/v1/chat/completions", body, **sent).status_code == 200
        usage = served.post("/v1/chat/completions", {"messages": messages, "seed": 1}, **sent)
        for path in ("/none/1", "/none/2"):
            assert served.get(path, **sent).status_code == 404
        assert httpx.get(f"{served.url}/metrics").status_code == 401
        found = samples(served)
    chat = "/v1/chat/completions"
    assert found["qwen3_requests_total", "POST", chat, "200"] == 3
    assert found["qwen3_requests_total", "GET", "other", "404"] == 2
    assert found["qwen3_requests_total", "GET", "other", "401"] == 1
    assert found["qwen3_request_seconds_count", chat] == 3
    assert found["qwen3_time_to_first_token_seconds_count", "demo"] == 3
    assert found["qwen3_decode_tokens_per_second_count", "demo"] == 3
    expected = usage.json()["usage"]
    assert found["qwen3_replies_total", "demo"] == 3
    assert found["qwen3_prompt_tokens_total", "demo"] == 3 * expected["prompt_tokens"]
    assert found["qwen3_completion_tokens_total", "demo"] == 3 * expected["completion_tokens"]
    assert 0 < found["qwen3_reasoning_tokens_total", "demo"]
    assert 0 < found["qwen3_cached_tokens_total", "demo"] < 3 * expected["prompt_tokens"]
    assert found["qwen3_up",] == 1 and found["qwen3_replies_admitted",] == 0
    assert found["qwen3_replies_admitted_limit",] == 7
    assert found["qwen3_memory_bytes",] > 0 < found["qwen3_cache_limit_bytes",]


def test_a_reply_that_nobody_reads_to_its_end_is_counted(demo: LLM) -> None:
    body = {**endless(), "stream": True}
    with serving(demo) as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            while "text" not in next(lines):
                pass
            for _ in range(4):  # the tokens of a step are counted after its text is sent
                next(lines)
        until(lambda: samples(served).get(("qwen3_replies_total", "demo"), 0) == 1)
        assert 0 < samples(served)["qwen3_completion_tokens_total", "demo"] < 8000
