"""Checkpoints: finding, downloading, checking, loading, quantizing and converting weights."""
