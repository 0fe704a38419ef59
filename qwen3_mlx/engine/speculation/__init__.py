"""Speculative decoding: proposes draft tokens where checking them pays."""
