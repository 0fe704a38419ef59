"""Bodies of malicious and malformed requests; `hostile` sends them.

A body is a value to encode as JSON, or bytes to send as they are. Large ones are built on demand.
"""

import json
import random
from collections.abc import Callable
from functools import reduce
from typing import Any

TOKENS = 4  # of a reply, whose text does not matter
SECRET = "zanzibarian"  # part of every prompt; must never appear in the log
_SAID = f"What is 1 + 2, {SECRET}?"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ANTHROPIC, COUNT = "/v1/messages", "/v1/messages/count_tokens"
RESPONSES = "/v1/responses"
OLLAMA, GENERATE = "/api/chat", "/api/generate"
VECTORS, RERANK = "/v1/embeddings", "/v1/rerank"
_FUNCTION = {"name": "f", "parameters": {"type": "object"}}
_TURNS: list[Any] = [{"role": "user", "content": _SAID}]
VALID: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "default",
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": [{"type": "text", "text": _SAID}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "3"},
        ],
        "tools": [{"type": "function", "function": _FUNCTION}],
        "tool_choice": "auto",
        "max_tokens": TOKENS,
        "temperature": 0.7,
        "top_p": 0.9,
        "n": 1,
        "stop": ["x"],
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1.0},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        "stream": False,
        "enable_thinking": False,
        "reasoning": {"effort": "low"},
    },
    TEXT: {"prompt": [_SAID, "x"], "max_tokens": TOKENS, "echo": True, "logprobs": 1, "n": 2},
    RESPONSES: {
        "instructions": "You are brief.",
        "input": [
            {"role": "developer", "content": "Count."},
            {"role": "user", "content": [{"type": "input_text", "text": _SAID}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "x", "text": "hm"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "3"},
        ],
        "tools": [{"type": "function", **_FUNCTION}, {"type": "web_search"}],
        "tool_choice": "auto",
        "max_output_tokens": TOKENS,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {}}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["message.output_text.logprobs"],
        "metadata": {"a": "b"},
        "store": True,
    },
    ANTHROPIC: {
        "max_tokens": TOKENS,
        "system": [{"type": "text", "text": "You are brief."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": _SAID}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": "3"}],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "stop_sequences": ["x"],
        "thinking": {"type": "disabled"},
        "stream": True,
    },
    COUNT: {"messages": _TURNS, "system": "x", "tools": [{"name": "f", "input_schema": {}}]},
    OLLAMA: {
        "messages": _TURNS,
        "tools": [{"type": "function", "function": _FUNCTION}],
        "think": False,
        "options": {"num_predict": TOKENS, "stop": ["x"], "seed": 1, "top_k": 3},
        "format": "json",
    },
    GENERATE: {
        "prompt": _SAID,
        "system": "You are brief.",
        "think": False,
        "keep_alive": "5m",
        "options": {"num_predict": TOKENS, "num_ctx": 4096.0, "stop": ["x"], "seed": 1},
        "logprobs": True,
        "raw": False,
        "stream": False,
    },
    "/api/show": {"model": "default"},
    VECTORS: {
        "input": [_SAID, "x"],
        "encoding_format": "base64",
        "dimensions": 8,
        "instruction": "Find it",
        "pooling": "last",
    },
}
_ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 1 << 70, 1e308, -0.0, "", "x", "\x00", "\ud800", "<|im_end|>"),
    *([], {}, [None], {"type": "text"}, {"": None}, [[[]]], "<think>", {"$ref": "#"}, "9" * 5000),
    *(float("nan"), float("inf"), "a\nb", {"type": "image_url"}, ["x"] * 40, "*", 4096.0, "4096"),
]
_BYTES = [b"\x00", b"\xff", b'"', b"{", b"}", b"[", b",", b":", b"\\u", b"\\", b"1e999", b"null"]


def mutated(value: Any, draw: random.Random) -> Any:
    """Return the value with a random change at a random place."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        made: Any = value.copy()
        if draw.random() < 0.15:
            del made[key]
        else:
            made[key] = mutated(value[key], draw)
        return made
    return draw.choice(_ODD)


def mutated_request(draw: random.Random) -> tuple[str, bytes]:
    """Return a path and a valid body whose JSON, bytes or both are randomly changed."""
    path, body = draw.choice(list(VALID.items()))
    changed: Any = body
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        changed = mutated(changed, draw)
    content = bytearray(encoded(changed))
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        place = draw.randrange(len(content) + 1)
        match draw.randrange(3):
            case 0:
                del content[place : place + draw.choice((1, 1, 10, 1000))]
            case 1:
                content[place:place] = draw.choice(_BYTES)
            case _:
                content[place : place + 1] = bytes([draw.randrange(256)])
    return path, bytes(content)


def encoded(body: Any) -> bytes:
    """Return the bytes of a body."""
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def chat(**fields: Any) -> dict[str, Any]:
    """Return an ordinary chat request with these fields."""
    return {"messages": _TURNS, "max_tokens": TOKENS, "enable_thinking": False, **fields}


def _text(fields: str) -> bytes:
    """Return an ordinary chat request that ends with fields given as JSON text."""
    return encoded(chat())[:-1] + f", {fields}}}".encode()


_LISTED = {"type": "function", "function": {"name": "t", "parameters": [1]}}
_HUGE, _DEEP = "9" * 5000, 100_000
_NO_TURNS: tuple[Any, ...] = ([], {}, "x", [{}], [None], None)
_NO_PROMPTS: tuple[Any, ...] = ("", [], [[]], [-1, 5], [True])
ODDITIES: list[tuple[str, Any]] = [
    *((CHAT, _text(f'"temperature": {word}')) for word in ("NaN", "Infinity", "1e999", _HUGE)),
    *((CHAT, _text(f'"seed": {word}')) for word in ("-1", f"{1 << 64}", _HUGE[:4000], _HUGE)),
    *((CHAT, _text(f'"logit_bias": {{"5": {word}}}')) for word in ("NaN", "-1e999", _HUGE)),
    *((CHAT, chat(logit_bias={word: 1})) for word in ("x", "-1", "9" * 400, _HUGE)),
    *((CHAT, chat(max_tokens=word)) for word in (0, -1, 10**12, 1.5, "4", None)),
    *((CHAT, chat(n=word)) for word in (0, -1, 1000, 10**30)),
    *((CHAT, chat(messages=word)) for word in _NO_TURNS),
    *((CHAT, chat(stop=word)) for word in ("", [""], ["\x00"], ["x" * 100_000], [1])),
    *((CHAT, chat(logprobs=True, top_logprobs=word)) for word in (21, -1, 10**9)),
    (CHAT, _text('"presence_penalty": NaN')),
    (CHAT, _text('"max_tokens": 4, "max_tokens": "x"')),
    (CHAT, _text('"foo": ' + "[" * _DEEP + "]" * _DEEP)),
    (CHAT, _text('"foo": ' + '{"a":' * _DEEP + "1" + "}" * _DEEP)),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800 \\udfff"}], "max_tokens": 4}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}], "max_tokens": 4}'),
    (CHAT, chat(messages=[{"role": "user", "content": "a\x00b"}])),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])),
    (CHAT, chat(messages=[{"role": "nobody", "content": "x"}])),
    (CHAT, chat(messages=[{"role": "tool", "content": "x"}])),
    (CHAT, b"\xef\xbb\xbf" + encoded(chat())),
    (CHAT, json.dumps(chat()).encode("utf-16")),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": 'a"b\n<|im_end|>\x00'}}])),
    (CHAT, chat(tools=[_LISTED])),
    (CHAT, chat(response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}})),
    *((TEXT, {"prompt": word, "max_tokens": TOKENS}) for word in _NO_PROMPTS),
    *((TEXT, {"prompt": [word, 5], "max_tokens": TOKENS}) for word in (5 * 10**9, 10**20, 973)),
    (TEXT, {"prompt": "x", "max_tokens": TOKENS, "suffix": "y", "best_of": 3}),
    *((OLLAMA, {"messages": _TURNS, "options": {"top_k": word}}) for word in (10**30, -1, "x")),
    (OLLAMA, {"messages": _TURNS, "stream": False, "tools": [_LISTED]}),
    (OLLAMA, {"messages": _TURNS, "stream": False, "options": {"num_ctx": 10**9}}),
    (OLLAMA, {"messages": _TURNS, "stream": False, "format": {"type": 1}}),
    *((path, body) for path in VALID for body in (b"", b"[]", b'"x"', b"null", b"{", b"{}")),
    *((VECTORS, {"input": word, "pooling": "last"}) for word in _NO_PROMPTS),
    *((VECTORS, {"input": "x", "pooling": "last", "dimensions": n}) for n in (0, -1, 1 << 70)),
    *((RERANK, {"query": "x", "documents": word, "scoring": "yes-no"}) for word in _NO_PROMPTS),
    (ANTHROPIC, chat(max_tokens=10**12, stop_sequences=["1"])),
    (ANTHROPIC, chat(thinking={"type": "enabled", "budget_tokens": -5})),
]


def _turns(count: int) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": "hi"} for i in range(count)]


def _tools(count: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"t{i}"}} for i in range(count)]


Made = Callable[[], Any]
LARGE: dict[str, tuple[str, Made]] = {
    "1M bad messages": (CHAT, lambda: b'{"messages":[' + b"0," * 999_999 + b"0]}"),
    "1M bad blocks": (ANTHROPIC, lambda: b'{"messages":[' + b"0," * 999_999 + b"0]}"),
    "100,000 prompts": (TEXT, lambda: {"prompt": ["a"] * 100_000}),
    "30,000 prompts, n 32": (TEXT, lambda: {"n": 32, "prompt": ["a"] * 30_000}),
    "100,000 vectors": (VECTORS, lambda: {"input": ["a"] * 100_000, "pooling": "last"}),
    "100,000 documents": (RERANK, lambda: {"query": "a", "documents": ["a"] * 100_000}),
    "30 MB of documents": (RERANK, lambda: {"query": "a", "documents": ["a " * 15_000_000]}),
    "a query of 30 KB, 2,000 times": (
        RERANK,
        lambda: {"query": "a " * 15_000, "documents": ["a"] * 2000, "scoring": "yes-no"},
    ),
    "400,000 nulls": (TEXT, lambda: {"prompt": [None] * 400_000}),
    "500,000 fields": (CHAT, lambda: chat(**{f"k{i}": 1 for i in range(500_000)})),
    "100,000 turns": (CHAT, lambda: chat(messages=_turns(100_000))),
    "100,000 turns, Ollama": (OLLAMA, lambda: {"messages": _turns(100_000)}),
    "100,000 turns, counted": (COUNT, lambda: {"messages": _turns(100_000)}),
    "100,000 stops": (CHAT, lambda: chat(stop=[f"zq{i}" for i in range(100_000)])),
    "200,000 biases": (CHAT, lambda: chat(logit_bias={str(i): 1 for i in range(200_000)})),
    "30 MB of text": (
        CHAT,
        lambda: chat(messages=[{"role": "user", "content": "x " * 15_000_000}]),
    ),
    "30 MB, counted": (
        COUNT,
        lambda: {"messages": [{"role": "user", "content": "x" * 30_000_000}]},
    ),
    "50 MB of text": (CHAT, lambda: chat(messages=[{"role": "user", "content": "x" * 50_000_000}])),
}


def _form(schema: Any) -> dict[str, Any]:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return chat(response_format=wanted, max_tokens=8)


def _never_ends() -> Any:
    """Return a schema whose compilation builds the product of two automata of prime size."""
    return _form({"allOf": [{"type": "integer", "multipleOf": n} for n in (7919, 7907)]})


def _doubled(schema: Any, _: int) -> Any:
    return {"anyOf": [schema, schema]}


def _parts(**kind: str) -> dict[str, Any]:
    return chat(structured_outputs=kind)


_CHOICES: Made = lambda: chat(structured_outputs={"choice": [f"v{i}" for i in range(100_000)]})  # noqa: E731


def _chain(length: int) -> dict[str, Any]:
    """Return a schema of chained references, on which a recursive parser overflows its stack."""
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "integer"}}}


def _rules(length: int) -> str:
    lines = [f'a{i}: a{i + 1} "x"' for i in range(length)]
    return "\n".join(["start: a0", *lines, f'a{length}: "y"', ""])


_ANY = {f"^.*{chr(97 + i)}.*$": {"type": "integer"} for i in range(20)}
_PATTERN = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(.*a.{12}b){9}"}}}
_ODD_TOOL = {"type": "function", "function": {"name": "f", "parameters": _PATTERN}}
# Each body with the number of copies that are sent at once.
BOMBS: dict[str, tuple[Made, int]] = {
    "8 x a schema without end": (_never_ends, 8),
    "8 x 100,000 choices": (_CHOICES, 8),
    "100,000 tools": (lambda: chat(tools=_tools(100_000)), 1),
    "5,000 tools, required": (lambda: chat(tools=_tools(5000), tool_choice="required"), 1),
    "an enum of 1M": (lambda: _form({"enum": [f"v{i}" for i in range(1_000_000)]}), 1),
    "20,000 properties": (lambda: _form({"properties": {f"p{i}": {} for i in range(20_000)}}), 1),
    "2^18 ways": (lambda: _form(reduce(_doubled, range(18), {"type": "integer"})), 1),
    "a repeated pattern": (lambda: _form({"type": "string", "pattern": "^(a{1,999}){1,999}$"}), 1),
    "20 patterns of names": (lambda: _form({"type": "object", "patternProperties": _ANY}), 1),
    "a tool's pattern": (lambda: chat(tools=[_ODD_TOOL], tool_choice="required"), 1),
    "8 x a regex": (lambda: _parts(regex="(.*a.{20}b){9}"), 8),
    "a product of regexes": (
        lambda: _parts(grammar="start: R\nR: /(.*x.*){8}/ & /(.*y.*){8}/ & /(.*z.*){8}/"),
        1,
    ),
    "3,000 references": (lambda: _form(_chain(3000)), 1),
    "20,000 rules": (lambda: _parts(grammar=_rules(20_000)), 1),
    "a regex of 100,000 (": (lambda: _parts(regex="(" * 100_000 + "a" + ")" * 100_000), 1),
    "an ambiguous grammar": (lambda: _parts(grammar='start: e\ne: e e | "a" | ""\n'), 1),
    "1M repetitions": (lambda: _parts(grammar='start: ("a" | "b"){1000000}'), 1),
}
