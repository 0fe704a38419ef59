"""Reranking, in the forms of Jina, Cohere, infinity and TEI."""
