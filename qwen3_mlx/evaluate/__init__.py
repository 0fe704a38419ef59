"""Evaluation: perplexity, divergence, weight errors and plots."""
