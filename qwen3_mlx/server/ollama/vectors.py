"""Endpoints of Ollama's API for vectors of texts: embed, and the older embeddings."""

import time
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from qwen3_mlx.server.ollama.model import check_model
from qwen3_mlx.server.ollama.schema import (
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    VectorFields,
)
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.texts import TextsEndpoint, check_amount, vector_json
from qwen3_mlx.server.wire import check_unknown, json_bytes

VectorBody = TypeVar("VectorBody", bound=VectorFields)


class _Vectors(TextsEndpoint[VectorBody]):
    """Base of both; without a text the model is only loaded, which it is."""

    def __init__(
        self,
        service: Service,
        body: VectorBody,
        texts: Sequence[str],
        dimensions: int | None,
        *,
        truncate: bool,
    ) -> None:
        check_model(service, body.model)
        super().__init__(service, body)
        self.warnings += check_unknown(body, {}, frozenset()) + body.not_honoured(service.context)
        if texts:
            check_amount("input", texts)
        self.contents = texts
        self.prepare = partial(
            service.llm.prepare_embedding, texts, dimensions=dimensions, truncate=truncate
        )

    @staticmethod
    def rename_fields(message: str) -> str:
        """Return an error of the library without the hint at `pooling`, which Ollama has not."""
        return TextsEndpoint.rename_fields(message.partition("; pooling=")[0])


class Embed(_Vectors[OllamaEmbedRequest]):
    """The vectors of one or more texts."""

    def __init__(self, service: Service, body: OllamaEmbedRequest) -> None:
        self._started = time.perf_counter()
        texts = body.input if isinstance(body.input, list) else [body.input] if body.input else []
        super().__init__(service, body, texts, body.dimensions, truncate=body.truncate is not False)

    def complete(self, values: np.ndarray, num_tokens: int) -> bytes:
        """Return the response, one vector at a time, since others wait for the GIL."""
        end = {
            "model": self.service.settings.model,
            "total_duration": int((time.perf_counter() - self._started) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": num_tokens,
        }
        return (
            b'{"embeddings":[' + b",".join(map(vector_json, values)) + b"]," + json_bytes(end)[1:]
        )


class Embeddings(_Vectors[OllamaEmbeddingsRequest]):
    """The vector of one text."""

    def __init__(self, service: Service, body: OllamaEmbeddingsRequest) -> None:
        super().__init__(service, body, [body.prompt] if body.prompt else [], None, truncate=True)

    def complete(self, values: np.ndarray, num_tokens: int) -> bytes:
        """Return the response."""
        vector = vector_json(values[0]) if len(values) else b"[]"
        return b'{"embedding":' + vector + b"}"
