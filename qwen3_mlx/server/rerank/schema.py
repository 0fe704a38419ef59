"""Request and response models of reranking."""

from typing import Annotated, Any, Literal

from pydantic import Field

from qwen3_mlx.server.openai.response_models import TextsUsageOut
from qwen3_mlx.server.wire import FailFast, RequestModel, WireModel

# Unsupported fields, each with the values that have no effect and are accepted.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "raw_scores": (False,),
    "truncation_direction": ("Right", "right"),
}


class DocumentIn(WireModel):
    """A document as an object."""

    text: str


class RerankRequest(RequestModel):
    """`POST /v1/rerank`; `texts` and `return_text` are TEI's names, the last two fields our own."""

    query: str
    documents: FailFast[str | DocumentIn] | None = None
    texts: FailFast[str] | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    instruction: str | None = None
    scoring: Literal["yes-no"] | None = None


class DocumentOut(WireModel):
    """A document of a result."""

    text: str


class ResultOut(WireModel):
    """A document's place in the request, and its probability."""

    index: int
    relevance_score: float
    document: DocumentOut | None = None


class RerankOut(WireModel):
    """The response, the best document first; the counts under Jina's and under Cohere's names."""

    id: str
    model: str
    results: list[ResultOut]
    usage: TextsUsageOut
    meta: dict[str, dict[str, int]]


class RankOut(WireModel):
    """TEI's form of a result."""

    index: int
    score: float
    text: str | None = None
