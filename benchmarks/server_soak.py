"""Leak test of the server: python -m benchmarks.server_soak [REQUESTS].

Chats, streams, tool calls, structured output, and requests of the other protocols go to
`qwen3 serve` with the demo, 32 at once; 30 % are aborted at a random moment. The resources of the
process are sampled twenty times, each time when no request runs; every other sample is printed.
Fails if a line fitted to the memory of the second half rises by more than 2 %, if threads or files
have grown there, or if a reply that was not aborted is incomplete.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from typing import Any

from benchmarks.served import Held, Serve, held, serve

_AT_ONCE = 32
_LOOKS = 20
_CANCELLED = 0.3
_LIMIT = 0.02
_OPTIONS = ("--quiet", "--context", "1024", "--max-requests", "256")
_PATIENCE = 120.0  # seconds for a reply
_WORDS = ("What is 2 + 3?", "What is 123 + 456?", "Count from 1 to 9.", "Repeat: a b c", "x " * 150)
_OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
_FUNCTION = {"name": "f", "description": "Does it.", "parameters": _OBJECT}
_TOOL = {"type": "function", "function": _FUNCTION}
_FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": _OBJECT}}
# The end of a complete stream, by path.
_ENDS = {"/v1/messages": b"message_stop", "/api/chat": b'"done":true'}


def main() -> None:
    """Run the requests and print the table."""
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    draw = random.Random(0)
    started = time.perf_counter()
    print(f"{'requests':>10}{'resident, bytes':>18}{'threads':>10}{'files':>8}{'CPU, s':>10}")
    with serve(_OPTIONS) as served:
        asyncio.run(some(served, draw, _AT_ONCE))  # warm-up: modules are loaded on first use
        ends: Counter[str] = Counter()
        states: list[Held] = []
        for look in range(_LOOKS):
            ends += asyncio.run(some(served, draw, requests // _LOOKS))
            states.append(now := held(served.pid))
            if look % 2:
                print(
                    f"{ends.total():>10,}{now.resident:>18,}{now.threads:>10}{now.files:>8}"
                    f"{now.seconds:>10.0f}",
                    flush=True,
                )
        log = served.log()
    first, second = states[: _LOOKS // 2], states[_LOOKS // 2 :]
    line = statistics.linear_regression(range(len(second)), [now.resident for now in second])
    growth = line.slope * (len(second) - 1) / line.intercept
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{dict(sorted(ends.items()))}, {minutes:.1f} minutes")
    print(f"memory has grown in the second half by {growth:+.2%}")
    wrong = [end for end in ends if end not in ("whole", "broken off")]
    wrong += ["a traceback in the log"] * ("Traceback" in log)
    wrong += ["memory grows"] * (growth > _LIMIT)
    for name in ("threads", "files"):
        if max(getattr(now, name) for now in second) > max(getattr(now, name) for now in first):
            wrong.append(f"{name} grow")
    sys.exit("; ".join(wrong) or 0)


async def some(served: Serve, draw: random.Random, count: int) -> Counter[str]:
    """Send `count` requests, wait until no request runs, and return how they ended."""
    asked = [(*make(draw), _moment(draw)) for _ in range(count)]
    ends: Counter[str] = Counter()

    async def client() -> None:
        while asked:
            path, body, moment = asked.pop()
            ends[await ask(served.port, path, body, moment)] += 1

    await asyncio.gather(*(client() for _ in range(_AT_ONCE)))
    while b'"active":0' not in await _get(served.port, "/health"):
        await asyncio.sleep(0.1)
    return ends


def _moment(draw: random.Random) -> float | None:
    return draw.choice((0.0, 0.01, 0.1, 0.5, 1.0)) if draw.random() < _CANCELLED else None


def make(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Return the path and body of a random request with a short reply."""
    words, count, stream = draw.choice(_WORDS), draw.randint(8, 24), draw.random() < 0.6
    body: dict[str, Any] = {"stream": stream, "max_tokens": count, "seed": draw.randrange(1000)}
    if draw.random() < 0.1:
        fields = {"prompt": [words, "1 2 3"], "logprobs": 2, "n": draw.choice((1, 2))}
        return "/v1/completions", body | fields
    body["messages"] = [{"role": "user", "content": words}]
    match draw.randrange(6):
        case 0:
            return "/v1/messages", body
        case 1:
            options = {"num_predict": count}
            return "/api/chat", {"messages": body["messages"], "stream": stream, "options": options}
        case 2:
            fields = {"tools": [_TOOL], "tool_choice": draw.choice(("auto", "required"))}
            return "/v1/chat/completions", body | fields | {"enable_thinking": False}
        case 3:
            fields = {"response_format": _FORM, "enable_thinking": False}
            return "/v1/chat/completions", body | fields
        case _:
            return "/v1/chat/completions", body | {"enable_thinking": draw.random() < 0.5}


async def ask(port: int, path: str, body: dict[str, Any], moment: float | None) -> str:
    """Send a request, abort it after `moment` seconds if given, and return how it ended."""
    reading = asyncio.create_task(_post(port, path, json.dumps(body).encode()))
    try:
        answer = await asyncio.wait_for(reading, _PATIENCE if moment is None else moment)
    except TimeoutError:
        return "no answer in time" if moment is None else "broken off"
    except OSError as error:
        return type(error).__name__
    if not answer.startswith(b"HTTP/1.1 200"):
        return f"{path} answers {answer[9:12].decode(errors='replace')}"
    end = _ENDS.get(path, b"data: [DONE]") if body["stream"] else b"}"
    return "whole" if end in answer else f"{path} is not whole"


async def _post(port: int, path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return await _exchange(port, head.encode(), body)


async def _get(port: int, path: str) -> bytes:
    return await _exchange(port, f"GET {path} HTTP/1.1".encode(), b"")


async def _exchange(port: int, head: bytes, body: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n" + body)
        return await reader.read()
    finally:
        writer.close()


if __name__ == "__main__":
    main()
