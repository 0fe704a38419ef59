"""Metrics in the text format of Prometheus: requests, tokens, durations, the queue, memory."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from starlette.types import Scope

from qwen3_mlx.text.events import Usage

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_RATES = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300)  # tokens/s
_OTHER = "other"  # the path of what is at no route: a client may send any number of them


class Metrics:
    """Counts and durations since the start of the server. Only the event loop uses it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("requests", "Requests answered.", "method", "path", "status")
        self._durations = self._histogram(
            "request_seconds",
            "Seconds from a request to the end of its response.",
            _SECONDS,
            "path",
        )
        self._firsts = self._histogram(
            "time_to_first_token_seconds",
            "Seconds from the admission of a request to its first token.",
            _SECONDS,
            "model",
        )
        self._rates = self._histogram(
            "decode_tokens_per_second",
            "Tokens per second of a request, once it has its first.",
            _RATES,
            "model",
        )
        self._replies = self._counter("replies", "Replies that ended.", "model")
        self._tokens = {
            field: self._counter(field, f"{text} of replies that ended.", "model")
            for field, text in {
                "prompt_tokens": "Tokens of prompts, reused ones included,",
                "cached_tokens": "Tokens of prompts reused from a cache,",
                "completion_tokens": "Tokens generated, thinking included,",
                "reasoning_tokens": "Tokens of thinking",
            }.items()
        }

    def add_request(
        self, scope: Scope, status: int, seconds: float, record: Mapping[str, Any]
    ) -> None:
        """Count a request whose response has ended; `record` is its line of the access log."""
        path = getattr(scope.get("route"), "path", _OTHER)
        self._requests.labels(scope["method"], path, status).inc()
        self._durations.labels(path).observe(seconds)
        if "first_ms" in record:
            self._firsts.labels(record["model"]).observe(record["first_ms"] / 1e3)
            self._rates.labels(record["model"]).observe(record["tokens_per_second"])

    def add_reply(self, model: str, usage: Usage) -> None:
        """Count the tokens of a reply that has ended, however it did."""
        self._replies.labels(model).inc()
        for field, counter in self._tokens.items():
            counter.labels(model).inc(getattr(usage, field))

    def render(self, state: Mapping[str, Any]) -> bytes:
        """Return all metrics, with the present `state` as /health has it."""
        present = CollectorRegistry()
        present.register(_Gauges(state))
        return generate_latest(self._registry) + generate_latest(present)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"qwen3_{name}", text, labels, registry=self._registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"qwen3_{name}", text, labels, buckets=buckets, registry=self._registry)


class _Gauges:
    """The present state of the server as a collector."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield a family for each figure of the state."""
        state, memory = self._state, self._state["memory"]
        preparing, computing = (state[work]["requests"] for work in ("preparing", "computing"))
        for name, text, value in (
            ("up", "1 if the server is well, 0 if it is stuck or stops.", state["status"] == "ok"),
            ("replies_admitted", "Replies in any state.", state["active"]),
            ("replies_admitted_limit", "Replies that there may be.", state["max_requests"]),
            ("requests_preparing", "Requests that are rendered and encoded.", preparing),
            ("requests_computing", "Requests whose texts are encoded and computed.", computing),
            ("replies_waiting", "Replies that wait for memory or a turn.", state["waiting"]),
            ("replies_running", "Replies in prefill or decode.", state["running"]),
            ("memory_bytes", "Bytes that MLX holds.", memory["used"]),
            ("cache_bytes", "Bytes of KV caches.", memory["caches"]),
            ("cache_limit_bytes", "Bytes that KV caches may take.", memory["caches_limit"]),
        ):
            yield GaugeMetricFamily(f"qwen3_{name}", text, value)
        for name, text, field in (
            ("model_requests", "Requests that use a model or wait for it.", "requests"),
            ("model_bytes", "Bytes of a loaded model, caches included; 0 if not loaded.", "bytes"),
        ):
            family = GaugeMetricFamily(f"qwen3_{name}", text, labels=["model"])
            for model in state["models"]:
                family.add_metric([model["name"]], model[field])
            yield family
