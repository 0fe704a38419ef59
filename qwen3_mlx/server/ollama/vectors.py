"""Endpoints of Ollama's API for vectors of texts: embed, and the older embeddings."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi.responses import Response

from qwen3_mlx.server.models import ServedModel
from qwen3_mlx.server.ollama.model import keep_alive_warnings, unloaded
from qwen3_mlx.server.ollama.schema import (
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    VectorFields,
)
from qwen3_mlx.server.service import ModelService, Service
from qwen3_mlx.server.texts import TextsEndpoint, check_amount, vector_json
from qwen3_mlx.server.wire import check_unknown, json_bytes

VectorBody = TypeVar("VectorBody", bound=VectorFields)


class _Vectors(TextsEndpoint[VectorBody]):
    """Base of both; without a text the model is only loaded or unloaded."""

    strict = True  # as chat and generate

    def __init__(
        self,
        service: ModelService,
        body: VectorBody,
        texts: Sequence[str],
        dimensions: int | None,
        *,
        truncate: bool,
    ) -> None:
        super().__init__(service, body)
        self.warnings += check_unknown(body, {}, frozenset()) + body.not_honoured(service.context)
        self.warnings += keep_alive_warnings(service.model, body)
        if texts:
            check_amount("input", texts)
        self.contents = texts
        self.prepare = partial(
            service.llm.prepare_embedding, texts, dimensions=dimensions, truncate=truncate
        )

    @classmethod
    def answer_unloaded(
        cls, service: Service, model: ServedModel, body: VectorBody
    ) -> Response | None:
        """Return the response to a request to unload the model; None if it asks for more."""
        name = model.source.shown_name(body.model)
        return unloaded(service.models, model, body, cls.nothing(name))

    @staticmethod
    @abstractmethod
    def nothing(name: str) -> dict[str, Any]:
        """Return the response of the model `name` without vectors."""

    @staticmethod
    def rename_fields(message: str) -> str:
        """Return an error of the library without the hint at `pooling`, which Ollama has not."""
        return TextsEndpoint.rename_fields(message.partition("; pooling=")[0])


class Embed(_Vectors[OllamaEmbedRequest]):
    """The vectors of one or more texts."""

    def __init__(self, service: ModelService, body: OllamaEmbedRequest) -> None:
        self._started = time.perf_counter()
        texts = body.input if isinstance(body.input, list) else [body.input] if body.input else []
        super().__init__(service, body, texts, body.dimensions, truncate=body.truncate is not False)

    @staticmethod
    def nothing(name: str) -> dict[str, Any]:
        """Return the response of the model `name` without vectors."""
        counts = {"total_duration": 0, "load_duration": 0, "prompt_eval_count": 0}
        return {"model": name, "embeddings": [], **counts}

    def complete(self, values: np.ndarray, num_tokens: int) -> bytes:
        """Return the response, one vector at a time, since others wait for the GIL."""
        end = self.nothing(self.service.name) | {
            "total_duration": int((time.perf_counter() - self._started) * 1e9),
            "prompt_eval_count": num_tokens,
        }
        del end["embeddings"]
        return (
            b'{"embeddings":[' + b",".join(map(vector_json, values)) + b"]," + json_bytes(end)[1:]
        )


class Embeddings(_Vectors[OllamaEmbeddingsRequest]):
    """The vector of one text."""

    def __init__(self, service: ModelService, body: OllamaEmbeddingsRequest) -> None:
        super().__init__(service, body, [body.prompt] if body.prompt else [], None, truncate=True)

    @staticmethod
    def nothing(name: str) -> dict[str, Any]:
        """Return the response of any model without a vector."""
        return {"embedding": []}

    def complete(self, values: np.ndarray, num_tokens: int) -> bytes:
        """Return the response."""
        vector = vector_json(values[0]) if len(values) else b"[]"
        return b'{"embedding":' + vector + b"}"
