"""Embeddings: vectors of texts."""

from base64 import b64encode
from functools import partial

import numpy as np

from qwen3_mlx.server.openai.schema import HARMLESS, EmbeddingRequest, texts_of
from qwen3_mlx.server.service import ModelService
from qwen3_mlx.server.texts import TextsEndpoint, check_amount, vector_json
from qwen3_mlx.server.wire import check_unknown, json_bytes


class Embeddings(TextsEndpoint[EmbeddingRequest]):
    """The vectors of one or more texts, as numbers or in base64."""

    def __init__(self, service: ModelService, body: EmbeddingRequest) -> None:
        super().__init__(service, body)
        self.warnings += service.model_warnings(body)
        self.warnings += check_unknown(body, {}, HARMLESS)
        self.contents = texts_of(body.input)
        check_amount("input", self.contents, len(body.instruction or ""))
        self.prepare = partial(
            service.llm.prepare_embedding,
            self.contents,
            instruction=body.instruction,
            prompt_name=body.prompt_name,
            dimensions=body.dimensions,
            pooling=body.pooling,
            truncate=bool(body.truncate),
        )

    def complete(self, values: np.ndarray, num_tokens: int) -> bytes:
        """Return the response, one vector at a time, since others wait for the GIL."""
        as_json = _base64_json if self.body.encoding_format == "base64" else vector_json
        data = (
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, as_json(vector))
            for index, vector in enumerate(values)
        )
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        end = json_bytes({"model": self.service.name, "usage": usage})
        return b'{"object":"list","data":[' + b",".join(data) + b"]," + end[1:]


def _base64_json(vector: np.ndarray) -> bytes:
    """Return a vector as OpenAI's clients decode it: little-endian float32."""
    return b'"' + b64encode(vector.astype("<f4").tobytes()) + b'"'
