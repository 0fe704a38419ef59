"""Reranking: documents in the order of the probability that they answer a query."""

import secrets
from typing import Any

import numpy as np

from qwen3_mlx.api.prepared_texts import PreparedTexts
from qwen3_mlx.server.openai.schema import HARMLESS
from qwen3_mlx.server.rerank.schema import NOT_SUPPORTED, RerankRequest
from qwen3_mlx.server.service import ModelService
from qwen3_mlx.server.texts import TextsEndpoint, check_amount
from qwen3_mlx.server.wire import check_unknown, json_bytes


class Rerank(TextsEndpoint[RerankRequest]):
    """The probabilities of documents; TEI's form of the response if they are called `texts`."""

    param = "query"

    def __init__(self, service: ModelService, body: RerankRequest) -> None:
        super().__init__(service, body)
        self.warnings += service.model_warnings(body)
        self.warnings += check_unknown(body, NOT_SUPPORTED, HARMLESS)
        if body.documents is not None and body.texts is not None:
            raise ValueError("documents and texts are two names of the same; send one of them")
        self._is_tei = body.texts is not None
        given = body.documents or body.texts or []
        self._documents = [one if isinstance(one, str) else one.text for one in given]
        before = len(body.query) + len(body.instruction or "")
        check_amount("documents", self._documents, before)
        self.contents = [body.query, *self._documents]
        self.prepare = self._prepare

    def _prepare(self) -> PreparedTexts:
        body = self.body
        prepared = self.service.llm.prepare_rerank(
            body.query, self._documents, instruction=body.instruction, scoring=body.scoring
        )
        if body.truncate is False and prepared.num_cut:
            raise ValueError(
                f"{prepared.num_cut} of the documents are too long; shorten them, or leave out "
                "truncate, which has them cut at their end"
            )
        return prepared

    def complete(self, values: np.ndarray, num_tokens: int) -> bytes:
        """Return the response."""
        best = np.argsort(-values[:, 0], kind="stable")[: self.body.top_n].tolist()
        results = [self._result(place, float(values[place, 0])) for place in best]
        if self._is_tei:
            return json_bytes(results)
        response = {
            "id": f"rerank-{secrets.token_hex(12)}",
            "model": self.service.name,
            "results": results,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            "meta": {
                "tokens": {"input_tokens": num_tokens},
                "billed_units": {"total_tokens": num_tokens},
            },
        }
        return json_bytes(response)

    def _result(self, place: int, score: float) -> dict[str, Any]:
        result = {"index": place, "score" if self._is_tei else "relevance_score": score}
        if not (self.body.return_documents or self.body.return_text):
            return result
        text = self._documents[place]
        return {**result, **({"text": text} if self._is_tei else {"document": {"text": text}})}
