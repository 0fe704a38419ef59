"""Retrieval: the document that answers a question, by vectors and then by a reranker.

python examples/retrieval.py [EMBEDDING_MODEL [RERANKER]]
"""

import sys

import numpy as np

from qwen3_mlx import load

DOCUMENTS = [
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other.",
    "The Great Wall is more than 20,000 km long.",
]
QUESTION = "What is the capital of China?"
MODELS = ["Qwen/Qwen3-Embedding-0.6B", "Qwen/Qwen3-Reranker-0.6B"]


def main() -> None:
    """Print the documents in the order of the vectors, then in that of the reranker."""
    embedding_model, reranker = [*sys.argv[1:], *MODELS[len(sys.argv) - 1 :]]
    with load(embedding_model) as llm:
        documents = np.array(llm.embed(DOCUMENTS))
        question = np.array(llm.embed([QUESTION], prompt_name="query"))[0]
    cosines = documents @ question
    best = [DOCUMENTS[place] for place in np.argsort(-cosines)[:2]]
    with load(reranker) as llm:
        scores = llm.rerank(QUESTION, best)
    for score, text in sorted(zip(scores, best, strict=True), reverse=True):
        print(f"{score:.3f}  {text}")


if __name__ == "__main__":
    main()
